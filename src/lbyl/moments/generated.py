"""Text that a language model writes itself: probes that are like what it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lbyl.errors import InputError
from lbyl.moments.base import Probes
from lbyl.runtime.batches import affordable, held_out_size, macs_per_input
from lbyl.runtime.checks import check_number
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.progress import Progress

_LENGTH = 256
"""Tokens a sequence, where nothing else is asked for: what comes early in a text is no measure of the rest."""


@dataclass(frozen=True)
class Generated:
    """Text that a causal language model samples from itself, token by token.

    A model's own text was found on par with real text for calibration (Williams, Chrysostomou, Aletras 2024,
    "Self-calibration for Language Model Quantization and Pruning", arXiv 2410.17170). Each sequence starts with the
    model's start token, where it has one, and a token drawn at random; special tokens are not drawn.

    Attributes:
        sequences: that moments are collected on; a quarter more is held out. None takes as many as 4e12
            multiply-accumulates allow, between 16 and 96.
        length: tokens of each. None takes 256, or what the model has positions for.
        temperature: logits are divided by it; 1 is the model's own distribution.
    """

    sequences: int | None = None
    length: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("Generated(sequences={})", self.sequences, whole=True, least=1, optional=True)
        check_number("Generated(length={})", self.length, whole=True, least=2, optional=True)
        check_number("Generated(temperature={})", self.temperature, above=0)

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs."""
        return True

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Sampled sequences, in batches of 16 at most; the last batches are held out.

        Raises:
            InputError: the model does not give logits of the next token for integer tokens.
        """
        ids = token_ids(inputs)
        if ids is None or not writes_text(model, inputs):
            raise InputError(
                "Generated: the model is no causal language model (integer tokens in, a logit for each token of the "
                "vocabulary out); use lbyl.Data with texts of yours"
            )
        length = self.length or _longest(model, ids)
        each = macs_per_input(model, inputs) * length / ids.shape[1]
        count = self.sequences or affordable(each, 4e12, 16, 96, ceiling=4e13)
        held = held_out_size(count)
        written = self._written(model, inputs, count + held, length, generator, progress)
        batches = [like_example(inputs, part) for part in [*written[:count].split(16)]]
        held_out = like_example(inputs, written[count:])
        tokens = f"{count} texts of {length} tokens that the model wrote itself"
        return Probes(tuple(batches), held_out, batch_statistics=False, note=tokens, matches_training_statistics=True)

    @torch.no_grad()
    def _written(
        self,
        model: nn.Module,
        inputs: ExampleInputs,
        count: int,
        length: int,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> Int[Tensor, "sequences tokens"]:
        """Sequences, all of one length, in batches of 48 at most."""
        example = token_ids(inputs)
        assert example is not None
        logits = _logits(inputs.call(model), example)
        assert logits is not None
        allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
        config = getattr(model, "config", None)
        allowed[[token for token in _special_tokens(config) if token < len(allowed)]] = False
        start, drawn = getattr(config, "bos_token_id", None), allowed.nonzero().flatten()
        found: list[Tensor] = []
        for rows in torch.arange(count).split(_TOGETHER):
            first = drawn[torch.randint(len(drawn), (len(rows), 1), generator=generator)]
            text = first if not isinstance(start, int) else torch.cat([torch.full_like(first, start), first], 1)
            done = sum(map(len, found))

            def report(tokens: int, done: int = done, now: int = len(rows)) -> None:
                if progress:
                    progress("writing text", done * length + tokens * now, count * length)

            write = self._by_generate if _generates(model) else self._by_hand
            found.append(write(model, inputs, text.to(example), length, allowed, generator, report))
        return torch.cat(found)

    def _by_generate(
        self,
        model: Any,
        inputs: ExampleInputs,
        text: Tensor,
        length: int,
        allowed: Tensor,
        generator: torch.Generator,
        report: Callable[[int], None],
    ) -> Tensor:
        """By the model's own way to generate, which keeps keys and values of what was read."""

        def watch(ids: Tensor, scores: Tensor) -> Tensor:
            report(ids.shape[1])
            return scores

        devices = [text.device] if text.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            return model.generate(
                text,
                attention_mask=torch.ones_like(text),
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
                max_new_tokens=length - text.shape[1],
                min_new_tokens=length - text.shape[1],
                suppress_tokens=(~allowed).nonzero().flatten().tolist() or None,
                pad_token_id=int(allowed.nonzero()[0]),
                logits_processor=[watch],
            )

    def _by_hand(
        self,
        model: nn.Module,
        inputs: ExampleInputs,
        text: Tensor,
        length: int,
        allowed: Tensor,
        generator: torch.Generator,
        report: Callable[[int], None],
    ) -> Tensor:
        """Token by token, each of which reads the whole text anew."""
        fixed = _needs_length(model, inputs)
        while text.shape[1] < length:
            # What stands later does not count for a causal model, so that it may be anything.
            shown = functional.pad(text, (0, fixed - text.shape[1])) if fixed else text
            logits = _logits(like_example(inputs, shown).call(model), shown)
            assert logits is not None
            scores = logits[:, text.shape[1] - 1].float().cpu() / self.temperature
            scores[:, ~allowed] = -torch.inf
            token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            text = torch.cat([text, token.to(text)], 1)
            report(text.shape[1])
        return text


_TOGETHER = 48
"""Sequences that are written at a time."""


def _generates(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can())


def _needs_length(model: nn.Module, inputs: ExampleInputs) -> int:
    """The number of tokens that a model insists on; 0 where it takes fewer."""
    ids = token_ids(inputs)
    assert ids is not None
    try:
        like_example(inputs, ids[:, :1]).call(model)
    except Exception:  # whatever somebody's code raises
        return ids.shape[1]
    return 0


def token_ids(inputs: ExampleInputs) -> Int[Tensor, "batch tokens"] | None:
    """The tokens among the inputs: ``input_ids``, or the first integer tensor with a row an example."""
    named = inputs.kwargs.get("input_ids")
    candidates = [named] if isinstance(named, Tensor) else inputs.tensors()
    for tensor in candidates:
        if tensor.dtype in (torch.int32, torch.int64) and tensor.dim() == 2 and tensor.numel():
            return tensor
    return None


def writes_text(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a model is a causal language model: its logits at a position do not depend on later tokens."""
    ids = token_ids(inputs)
    config = getattr(model, "config", None)
    if ids is None or ids.shape[1] < 2 or getattr(config, "is_encoder_decoder", False):
        return False
    if hasattr(model, "can_generate") and not _generates(model):
        return False
    try:
        with torch.no_grad():
            first = _logits(inputs.call(model), ids)
            changed = ids.clone()
            changed[:, -1] = (changed[:, -1] + 1) % 7
            second = _logits(inputs.map(lambda t: changed if t is ids else t).call(model), ids)
    except Exception:  # whatever somebody's code raises: then it is none that can be run
        return False
    if first is None or second is None:
        return False
    scale = first.abs().max().clamp_min(1e-6)
    same = (first[:, :-1] - second[:, :-1]).abs().max() <= _ROUNDING * scale
    return bool(same) and bool((first[:, -1] - second[:, -1]).abs().max() > _ROUNDING * scale)


_ROUNDING = 1e-5
"""Logits that differ by a smaller share of the largest one are the same."""


def like_example(inputs: ExampleInputs, ids: Int[Tensor, "batch tokens"]) -> ExampleInputs:
    """The example's structure with other tokens, and masks and positions of their shape.

    Raises:
        InputError: an input as long as the tokens whose meaning is not known.
    """
    example = token_ids(inputs)
    assert example is not None
    shape = example.shape

    def made(name: str, value: Any) -> Any:
        if value is example:
            return ids
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return value
        if name in _MADE:
            return _MADE[name](ids).to(value.dtype)
        if bool((value == value.flatten()[0]).all()):
            return value.flatten()[:1].expand(ids.shape).clone()
        raise InputError(f"Generated: {name} has a value for each token, and it is not known what it should be")

    args = tuple(made(f"input {index}", value) for index, value in enumerate(inputs.args))
    return ExampleInputs(args, {name: made(name, value) for name, value in inputs.kwargs.items()})


_MADE = {
    "attention_mask": torch.ones_like,
    "token_type_ids": torch.zeros_like,
    "position_ids": lambda ids: torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).clone(),
    "labels": torch.clone,
}


def _logits(output: Any, ids: Tensor) -> Tensor | None:
    """The first output with a vector for each token."""
    found = (t for t in output_tensors(output) if t.is_floating_point() and t.dim() == 3)
    return next((t for t in found if t.shape[:2] == ids.shape and t.shape[2] > int(ids.max())), None)


def _longest(model: nn.Module, ids: Tensor) -> int:
    """The usual length, or less where the model has fewer positions; the example's where these are not known."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len"):
        most = getattr(config, name, None)
        if isinstance(most, int) and most > 0:
            return min(_LENGTH, most)
    return max(2, ids.shape[1])


def _special_tokens(config: Any) -> list[int]:
    """Tokens that start, end or pad a text."""
    found: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        value = getattr(config, name, None)
        found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int) and v >= 0]
    return found


@torch.no_grad()
def text_losses(model: nn.Module, texts: ExampleInputs) -> Float[Tensor, " texts"]:
    """The mean loss of each text, in nats a token, each token foretold from those before it.

    Raises:
        InputError: the model does not give logits of the next token.
    """
    ids = token_ids(texts)
    logits = None if ids is None else _logits(texts.call(model), ids)
    if ids is None or logits is None:
        raise InputError("the model gives no logits of the next token")
    found = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:].long(), reduction="none")
    return found.mean(1)
