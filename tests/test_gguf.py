"""GGUF files: transformers reads the same network from them, and they hold all that a runtime has to know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.export.gguf import _rope_factors
from lbyl.moments.sentences import sentences

HF: Any = transformers
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SPECIAL = ["<s>", "</s>", "<unk>"]


def tokenizer(split: Any) -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet)  # pyright: ignore[reportCallIssue]
    made.train_from_iterator(sentences()[:500], trainer)
    return HF.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bytelevel() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytelevel()])  # pyright: ignore[reportArgumentType]


def write(place: Path, kind: str = "Llama", split: Any = None, **sizes: Any) -> Any:
    torch.manual_seed(0)
    net = getattr(HF, f"{kind}ForCausalLM")(getattr(HF, f"{kind}Config")(**{**SIZES, **sizes})).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    net.save_pretrained(place)
    made = tokenizer(split or bytelevel())
    made.chat_template = "{{ messages }}"
    made.save_pretrained(place)
    return net


def tokens() -> Tensor:
    return torch.arange(3, 23).reshape(2, 10)


def again(file: Path) -> Any:
    return HF.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 128}),  # transformers reads no other size of heads from such files
    ],
)
def test_transformers_reads_the_same_network(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    net = write(tmp_path / "net", kind, **more)
    exported = lbyl.export(tmp_path / "net", format="gguf")
    assert exported.file == tmp_path / "net" / "model.gguf"
    with torch.no_grad():
        torch.testing.assert_close(again(exported.file)(tokens()).logits, net(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_a_compressed_folder(tmp_path: Path) -> None:
    net = write(tmp_path / "net")
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    result = lbyl.compress(net, inputs, ratio=0.5, restore="prune", forecast=False)
    result.save(tmp_path / "smaller")
    HF.AutoTokenizer.from_pretrained(tmp_path / "net").save_pretrained(tmp_path / "smaller")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "smaller"), "--format", "gguf"])
    assert done.exit_code == 0, done.output
    assert "all tensors are those of the folder" in " ".join(done.stdout.split())
    file = tmp_path / "smaller" / "model.gguf"
    with torch.no_grad():
        expected = result.model(tokens()).logits
        torch.testing.assert_close(again(file)(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    assert fields(file)["llama.feed_forward_length"] == 24
    assert fields(file)["llama.attention.head_count"] == 2
    batches = [{"input_ids": tokens()}] * 2
    lbyl.compress_folder(tmp_path / "net", tmp_path / "other", ratio=0.5, data=batches)
    lbyl.export(tmp_path / "other", format="gguf", to=tmp_path / "other.gguf")
    assert fields(tmp_path / "other.gguf")["llama.feed_forward_length"] == 24


def test_layers_that_differ_in_width(tmp_path: Path) -> None:
    net = write(tmp_path / "net")
    batches = [{"input_ids": tokens()}] * 2
    ratio = {"model.layers.0.mlp.*": 0.5, "model.layers.1.self_attn.*": 0.5}
    lbyl.compress_folder(tmp_path / "net", tmp_path / "smaller", ratio=ratio, data=batches)
    found = fields(lbyl.export(tmp_path / "smaller", format="gguf").file)
    assert found["general.architecture"] == "deci"
    assert found["deci.feed_forward_length"] == [24, 48]
    assert found["deci.attention.head_count"] == [4, 2]
    assert found["deci.attention.head_count_kv"] == [2, 1]
    assert net.config.intermediate_size == 48
    write(tmp_path / "qwen", "Qwen2")
    lbyl.compress_folder(tmp_path / "qwen", tmp_path / "uneven", ratio={"model.layers.0.mlp.*": 0.5}, data=batches)
    with pytest.raises(lbyl.ExportError, match="one width for all layers"):
        lbyl.export(tmp_path / "uneven", format="gguf")
    assert not list(tmp_path.rglob("*.gguf.*"))
    assert not (tmp_path / "uneven" / "model.gguf").exists()


@pytest.mark.parametrize(("split", "name"), [(bytelevel, "gpt-2"), (smollm, "smollm")])
def test_the_vocabulary(split: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path, split=split())
    found = fields(lbyl.export(tmp_path, format="gguf").file)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.eos_token_id"] == 1
    assert len(found["tokenizer.ggml.tokens"]) == 400
    content = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["merges"]]
    texts = found["tokenizer.ggml.tokens"]
    assert all(texts[number] == text for text, number in content["vocab"].items())
    kinds = found["tokenizer.ggml.token_type"]
    assert kinds[:3] == [3, 3, 3]
    assert kinds[10] == 1
    assert kinds[-1] == 5


def test_pieces_with_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7, "▁ab": 8}
    merges = [("a", "b"), ("▁", "ab")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    found = fields(lbyl.export(tmp_path, format="gguf").file)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.token_type"][:6] == [2, 3, 3, 6, 1, 1]
    scores = found["tokenizer.ggml.scores"]
    assert scores[7] > scores[8] > scores[5]


def test_frequencies_of_llama_3() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = HF.LlamaConfig(**{**SIZES, "max_position_embeddings": 512, "hidden_size": 256}, rope_parameters=rope)
    rotary = HF.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = _rope_factors(rope, 64)
    assert factors is not None
    assert float(factors.max()) == pytest.approx(8)
    torch.testing.assert_close(plain / factors, rotary.inv_freq)


def test_frequencies_of_smaller_heads(tmp_path: Path) -> None:
    write(tmp_path)
    net = HF.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = {"input_ids": torch.arange(8)[None]}
    smaller = lbyl.compress(
        net, tokens, budget=lbyl.Budget(params=0.95, head_dim=True), restore="prune", forecast=False
    )
    net.save_pretrained(tmp_path)  # keeps the tokenizer beside it
    smaller.save(tmp_path / "out")
    found = fields(lbyl.export(tmp_path / "out", format="gguf").file)
    size = smaller.model.config.head_dim
    assert found["llama.rope.dimension_count"] == found["llama.attention.key_length"] == size < net.config.head_dim
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    factors = _rope_factors(config["rope_parameters"], size)
    assert factors is not None
    plain = config["rope_parameters"]["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    torch.testing.assert_close(plain / factors, smaller.model.model.rotary_emb.inv_freq)


def test_what_llama_cpp_has_no_place_for(tmp_path: Path) -> None:
    gpt = HF.GPT2LMHeadModel(HF.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    gpt.save_pretrained(tmp_path / "gpt")
    with pytest.raises(lbyl.ExportError, match="'gpt2' are not supported"):
        lbyl.export(tmp_path / "gpt", format="gguf")
    write(tmp_path / "split", split=pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(lbyl.ExportError, match="splits text"):
        lbyl.export(tmp_path / "split", format="gguf")
    write(tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(lbyl.ExportError, match="'gelu'"):
        lbyl.export(tmp_path / "gelu", format="gguf")
    write(tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(lbyl.InputError, match=r"no tokenizer\.json"):
        lbyl.export(tmp_path / "mute", format="gguf")
    with pytest.raises(lbyl.InputError, match="from a folder"):
        lbyl.export(gpt, format="gguf", to=tmp_path / "x.gguf")
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    write(place)
    return place


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda data: {**data, **values})


def vocabulary(model: dict[str, Any] | None = None, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(
        folder / "tokenizer.json", lambda data: {**data, "model": {**data["model"], **(model or {})}, **values}
    )


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def tensor(name: str, value: Tensor | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        found = {key: value for key, value in {**found, name: value}.items() if value is not None}
        save_file(found, folder / "model.safetensors")

    return damage


LAYER = "model.layers.1"
FACTORS = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}
FACTORS |= {"attention_factor": 1.0}
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text for a size": (config(hidden_size="x"), r"config\.json is damaged: .*hidden_size"),
    "a size below zero": (config(max_position_embeddings=-1), r"config\.json is damaged: .*max_position_embeddings"),
    "no norm's number": (config(rms_norm_eps=None), r"config\.json is damaged: .*rms_norm_eps"),
    "a list for a kind": (config(model_type=[1]), r"config\.json is damaged: .*model_type"),
    "half a channel": (config(head_dim=1.5), r"config\.json is damaged: .*head_dim"),
    "an odd head": (config(head_dim=1), "heads of 1 channels can't be rotated"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is damaged"),
    "a text for positions": (config(rope_parameters={"rope_theta": "x"}), "rotary positions is damaged"),
    "no factor": (config(rope_parameters={"rope_type": "linear"}), "rotary positions is damaged: .*factor"),
    "two kinds of factors": (
        config(rope_parameters=FACTORS | {"long_factor": [2.0]}),
        "'longrope' need equal short_factor and long_factor",
    ),
    "too few factors": (config(rope_parameters=FACTORS), "short_factor needs 4 numbers for heads of 8 channels"),
    "half of Llama 3": (config(rope_parameters={"rope_type": "llama3"}), "rotary positions is damaged"),
    "no vocabulary": (vocabulary(model={"vocab": None}), r"tokenizer\.json is damaged: .*vocab"),
    "a text for a number": (vocabulary(model={"vocab": {"a": "b"}}), r"tokenizer\.json is damaged: .*vocab"),
    "a number below zero": (vocabulary(model={"vocab": {"a": -1}}), r"tokenizer\.json is damaged: .*vocab"),
    "a number too large": (vocabulary(model={"vocab": {"a": 400}}), "number 400, but the model knows 400 tokens"),
    "numbers for merges": (vocabulary(model={"merges": [1]}), r"tokenizer\.json is damaged: .*merges"),
    "numbers for tokens": (vocabulary(added_tokens=[1]), r"tokenizer\.json is damaged: .*added_tokens"),
    "a list of splits": (vocabulary(pre_tokenizer=[1]), r"tokenizer\.json is damaged: .*pre_tokenizer"),
    "other settings": (lambda folder: (folder / "tokenizer_config.json").write_text("["), "save it again"),
    "no embedding": (tensor("model.embed_tokens.weight", None), r"has no model\.embed_tokens\.weight"),
    "no values": (tensor(f"{LAYER}.self_attn.v_proj.weight", None), "has no .*v_proj"),
    "other values": (
        tensor(f"{LAYER}.self_attn.v_proj.weight", torch.ones(8, 32)),
        "v_proj.weight is 8x32, but .* 16x32",
    ),
    "part of a head": (tensor(f"{LAYER}.self_attn.q_proj.weight", torch.ones(33, 32)), "q_proj.weight is 33x32"),
    "a vector": (tensor(f"{LAYER}.self_attn.q_proj.weight", torch.ones(32)), "has no .*q_proj"),
    "another width": (tensor(f"{LAYER}.mlp.down_proj.weight", torch.ones(32, 40)), "down_proj.weight is 32x40"),
    "eight bits": (tensor("model.norm.weight", torch.ones(32).to(torch.float8_e4m3fn)), "F8_E4M3"),
    "whole numbers": (tensor("model.norm.weight", torch.ones(32).to(torch.int8)), "is of type I8"),
    "a layer without a number": (tensor("model.layers.x.foo", torch.ones(3)), "no place for"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_damaged_folders(name: str, llama: Path, tmp_path: Path) -> None:
    damage, words = FAULTS[name]
    shutil.copytree(llama, tmp_path / "net")
    damage(tmp_path / "net")
    before = sorted(path.name for path in (tmp_path / "net").iterdir())
    with pytest.raises((lbyl.ArtifactError, lbyl.ExportError), match=words):
        lbyl.export(tmp_path / "net", format="gguf")
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == before


def test_a_tokenizer_as_large_as_that_of_llama_3(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "net")
    with (tmp_path / "net" / "tokenizer.json").open("a") as file:
        file.write(" " * (12 * 2**20))
    assert lbyl.export(tmp_path / "net", format="gguf").file.is_file()


def test_what_is_no_number_is_written_as_it_is(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "net")
    tensor("model.norm.weight", torch.full((32,), float("nan")))(tmp_path / "net")
    reader = gguf.GGUFReader(lbyl.export(tmp_path / "net", format="gguf").file)
    (norm,) = (each.data for each in reader.tensors if each.name == "output_norm.weight")
    assert bool((norm != norm).all())
