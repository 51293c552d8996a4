"""Text that a language model writes itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lbyl
from lbyl.moments.base import Probes
from lbyl.moments.token_inputs import token_ids
from lbyl.runtime.inputs import ExampleInputs

WORDS = 60


class Plain(nn.Module):
    """A causal model of somebody's own: no cache, no way to generate, and as many positions as ``length``."""

    def __init__(self, length: int = 24, causal: bool = True, strict: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 16), nn.Embedding(length, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, WORDS)
        self.causal, self.length, self.strict = causal, length, strict

    def forward(self, ids: Tensor) -> Tensor:
        if self.strict and ids.shape[1] != self.length:
            raise ValueError("only whole windows")
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(x + self.down(torch.relu(self.up(x))))


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2)
    )


def example(length: int = 12) -> Tensor:
    return torch.randint(WORDS, (1, length), generator=torch.Generator().manual_seed(0))


def probes(model: nn.Module, inputs: object, seed: int = 0, **settings: object) -> Probes:
    torch.manual_seed(0)
    source = lbyl.Generated(**{"sequences": 6, **settings})  # pyright: ignore
    return source.probes(model.eval(), ExampleInputs.of(inputs), torch.Generator().manual_seed(seed), None)  # pyright: ignore


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_a_hugging_face_model_writes_as_long_as_it_has_positions(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    made = probes(make(), {"input_ids": example(), "attention_mask": torch.ones(1, 12, dtype=torch.int64)})
    (batch,) = made.batches
    ids = token_ids(batch)
    assert ids is not None
    assert ids.shape == (6, 40)
    assert batch.kwargs["attention_mask"].shape == (6, 40)
    assert bool((ids[:, 0] == 1).all())
    assert not bool(torch.isin(ids[:, 1:], torch.tensor([1, 2])).any())
    held_out = token_ids(made.held_out)
    assert held_out is not None
    assert len(held_out) == 2


def test_the_models_own_distribution() -> None:
    """A model that gives one word nearly all the weight writes that word."""
    net = Plain()
    with torch.no_grad():
        net.head.bias[7] += 50
    ids = token_ids(probes(net, example()).batches[0])
    assert ids is not None
    assert bool((ids[:, 1:] == 7).all())
    warm = token_ids(probes(net, example(), temperature=1e4).batches[0])
    assert warm is not None
    assert len(warm.unique()) > 30


def test_equal_seeds_write_equal_texts_and_leave_the_users_alone() -> None:
    net = llama()
    before = torch.random.get_rng_state()
    first, again, other = (token_ids(probes(net, example(), seed).batches[0]) for seed in (0, 0, 1))
    torch.random.set_rng_state(before)
    assert first is not None and again is not None and other is not None  # noqa: PT018
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_that_insists_on_whole_windows() -> None:
    ids = token_ids(probes(Plain(strict=True), example(24)).batches[0])
    assert ids is not None
    assert ids.shape == (6, 24)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Plain(causal=False), example()),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4)),
    ],
    ids=["not causal", "no tokens"],
)
def test_what_writes_no_text_gets_one_clear_error(model: nn.Module, inputs: Tensor) -> None:
    with pytest.raises(lbyl.InputError, match="causal"):
        lbyl.compress(
            model.eval(), inputs, restore=lbyl.LeastSquares(moments=lbyl.Generated()), ratio=0.5, forecast=False
        )


def test_the_default_for_causal_models_only() -> None:
    torch.manual_seed(0)
    texts = lbyl.compress(Plain().eval(), example(), ratio=0.25, forecast=False).report
    assert any("model writes itself" in note for note in texts.notes)
    bert = BertModel(
        BertConfig(vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    notes = lbyl.compress(bert.eval(), {"input_ids": example()}, ratio=0.25, forecast=False).report.notes
    assert not any("model writes itself" in note for note in notes)


class LastOnly(nn.Module):
    """Tells the next token of a whole text alone, as many models do when they are not trained."""

    def __init__(self, classes: int = WORDS, keep: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.states = nn.Embedding(WORDS, 16), nn.LSTM(16, 16, batch_first=True)
        self.up, self.head, self.keep = nn.Linear(16, 24), nn.Linear(24, classes), keep

    def forward(self, ids: Tensor) -> Tensor:
        last = self.states(self.words(ids))[0][:, [-1]]
        scores = self.head(torch.relu(self.up(last)))
        return scores if self.keep else scores[:, 0]


@pytest.mark.parametrize("keep", [False, True])
def test_a_model_that_only_tells_what_follows_a_text_writes_too(keep: bool) -> None:
    net = LastOnly(keep=keep).eval()
    found = probes(net, example())
    ids = token_ids(found.batches[0])
    assert ids is not None
    assert ids.shape[1] == 12
    report = lbyl.compress(net, example(), ratio=0.25).report
    assert any("model writes itself" in note for note in report.notes)
    assert any(row.group == "up" and row.after < 24 for row in report.rows)


def test_a_classifier_of_texts_does_not_write() -> None:
    notes = lbyl.compress(LastOnly(classes=5).eval(), example(), ratio=0.25, forecast=False).report.notes
    assert not any("model writes itself" in note for note in notes)


@pytest.mark.parametrize("settings", [{"sequences": 0}, {"length": 1}, {"temperature": 0.0}])
def test_settings(settings: dict[str, float]) -> None:
    with pytest.raises(lbyl.InputError):
        lbyl.Generated(**settings)  # pyright: ignore


def test_random_tokens_are_common_ones_more_often() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(3000, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    inputs = ExampleInputs.of(torch.zeros(1, 50, dtype=torch.long))
    ids = lbyl.Noise(64).probes(net, inputs, torch.Generator().manual_seed(0), None).batches[0].tensors()[0]
    assert int(ids.max()) > 2500
    assert 250 < float(ids.float().quantile(0.5)) < 700
