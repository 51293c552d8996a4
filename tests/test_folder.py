"""From folder to folder, layer by layer: the same as in memory, also after being killed, and nothing half-written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_language_folders import tokenizer
from torch import Tensor
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.pipeline.layerwise.layers import LayerNetwork

HF: Any = transformers
SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


PLAIN = lbyl.LeastSquares()


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 200, (16, 32), generator=generator) for _ in range(4)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


def write(place: Path, kind: str = "Llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(HF, f"{kind}Config")(**{**SIZES, **sizes})
    net = getattr(HF, f"{kind}ForCausalLM")(config).to(dtype).eval()
    net.save_pretrained(place, max_shard_size="100KB")
    tokenizer().save_pretrained(place)
    return net


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    write(place)
    return place


def in_memory(folder: Path, restorer: lbyl.LeastSquares = PLAIN, **settings: Any) -> lbyl.Result:
    net = HF.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    given = batches()
    example = {name: tensor[:1] for name, tensor in given[0].items()}
    restorer = replace(restorer, moments=lbyl.Data(given, batches=len(given)))
    return lbyl.compress(net, example, restore=restorer, forecast=False, **settings)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> bool:
    sizes = {name: tensor.abs().max().clamp_min(1e-9) for name, tensor in expected.items()}
    far = [float((found[name] - expected[name]).abs().max() / sizes[name]) for name in expected]
    return found.keys() == expected.keys() and max(far) <= within


@pytest.mark.parametrize(
    ("kind", "dtype", "more", "within"),
    [
        ("Llama", torch.float32, {}, 0.0),
        ("Llama", torch.bfloat16, {"tie_word_embeddings": True}, 0.0),
        ("Mistral", torch.float32, {"sliding_window": 8}, 0.0),
        ("Qwen2", torch.float32, {}, 1e-5),
        ("Qwen3", torch.float32, {"head_dim": 16}, 1e-5),
    ],
)
def test_the_same_as_in_memory(
    kind: str, dtype: torch.dtype, more: dict[str, Any], within: float, tmp_path: Path
) -> None:
    write(tmp_path / "whole", kind, dtype, num_hidden_layers=2, **more)
    # Whether layers with a bias are recalibrated is judged layer by layer, and may be judged otherwise as a whole.
    restorer = lbyl.LeastSquares(renorm=False, sequential=False)
    expected = in_memory(tmp_path / "whole", restorer, ratio=0.25)
    found = lbyl.compress_folder(tmp_path / "whole", tmp_path / "smaller", ratio=0.25, data=batches(), restore=restorer)
    loaded = HF.AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype="auto")
    assert loaded.dtype == dtype
    assert loaded.config.intermediate_size == 120
    assert close(loaded.state_dict(), expected.model.state_dict(), within)
    assert found.plan.groups == expected.plan.groups
    assert found.report.parameters == expected.report.parameters
    ids = batches()[0]["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, expected.model(ids).logits, rtol=1e-4, atol=1e-4)
    again = {name: tensor.to(dtype) for name, tensor in lbyl.load(tmp_path / "smaller").state_dict().items()}
    assert same(again, loaded.state_dict())


def test_only_some_layers_lose_neurons(llama: Path, tmp_path: Path) -> None:
    ratio = {"*.mlp.*": 0.25, "model.layers.1.*": 0.0}
    expected = in_memory(llama, ratio=ratio)
    found = lbyl.compress_folder(llama, tmp_path / "smaller", ratio=ratio, data=batches())
    assert same(lbyl.load(tmp_path / "smaller").state_dict(), expected.model.state_dict())
    assert any("from_pretrained can't load" in note for note in found.report.notes)
    assert not (tmp_path / "smaller" / "config.json").exists()


def test_finished_layers_leave_memory(llama: Path, tmp_path: Path) -> None:
    held: list[int] = []

    def told(stage: str, done: int, total: int) -> None:
        if stage.startswith("layer "):
            held.append(sum(isinstance(each, LayerNetwork) for each in gc.get_objects()))

    gc.disable()  # which may be long in coming in a process that makes few objects
    try:
        lbyl.compress_folder(llama, tmp_path / "smaller", ratio=0.25, data=batches(), progress=told)
    finally:
        gc.enable()
    assert len(held) == 3
    assert held == held[:1] * 3


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import lbyl
from test_folder import batches

def die(stage, done, total):
    if done == 2 and stage.startswith("layer"):
        os._exit(9)

lbyl.compress_folder(Path(sys.argv[1]), Path(sys.argv[2]), ratio=0.25, data=batches(), progress=die)
"""


def test_a_killed_run_goes_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, work = tmp_path / "smaller", tmp_path / ".smaller.layers"
    command = [sys.executable, "-c", KILLED, str(llama), str(target), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == 9
    assert not target.exists()
    assert sorted(file.name for file in work.glob("layer-*")) == ["layer-00000.json", "layer-00001.json"]
    with pytest.raises(lbyl.InputError, match="another ratio"):
        lbyl.compress_folder(llama, target, ratio=0.5, data=batches())
    with pytest.raises(lbyl.InputError, match="another data"):
        lbyl.compress_folder(llama, target, ratio=0.25, data=batches(1))
    from lbyl.pipeline.layerwise import run

    solved, inner = [], run.compress
    monkeypatch.setattr(run, "compress", lambda *args, **kwargs: solved.append(1) or inner(*args, **kwargs))
    lbyl.compress_folder(llama, target, ratio=0.25, data=batches())
    assert len(solved) == 1
    assert not work.exists()
    loaded = HF.AutoModelForCausalLM.from_pretrained(target)
    assert same(loaded.state_dict(), in_memory(llama, ratio=0.25).model.state_dict())


def test_a_budget_is_kept_by_the_feed_forward_layers(llama: Path, tmp_path: Path) -> None:
    found = lbyl.compress_folder(llama, tmp_path / "smaller", budget=lbyl.Budget(params=0.8), data=batches())
    before, after = found.report.parameters
    assert 0.78 < after / before <= 0.8
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert config["num_attention_heads"] == 4
    assert config["intermediate_size"] < 160
    with pytest.raises(lbyl.BudgetError, match="parameters are left"):
        lbyl.compress_folder(llama, tmp_path / "tiny", budget=lbyl.Budget(params=0.1), data=batches())
    assert not (tmp_path / ".tiny.layers").exists()


def test_from_the_command_line(llama: Path, tmp_path: Path) -> None:
    call = ["compress", f"hf:{llama}", "-o", str(tmp_path / "smaller"), "--low-memory", "--ratio", "0.25", "--json"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    assert any("English sentences that come with lbyl" in note for note in report["notes"])
    assert (tmp_path / "smaller" / "tokenizer.json").is_file()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("the cat of a dog in the house " * 400)
    call = ["compress", f"hf:{llama}", "-o", str(tmp_path / "other"), "--low-memory", "--budget", "params=0.9"]
    done = CliRunner().invoke(app, [*call, "--data", str(tmp_path / "texts")])
    assert done.exit_code == 0, done.output
    assert "sequences of the texts in texts" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "needs --ratio"),
        (["--budget", "macs=0.5"], "needs --ratio"),
        (["--ratio", "0.2", "--scope", "all"], "--scope"),
        (["--ratio", "0.2", "--eval", "a:b"], "--eval"),
        (["--ratio", "0.2", "--restore", "prune"], "--restore"),
    ],
)
def test_options_that_need_the_whole_model(options: list[str], words: str, llama: Path, tmp_path: Path) -> None:
    call = ["compress", f"hf:{llama}", "-o", str(tmp_path / "smaller"), "--low-memory", *options]
    done = CliRunner().invoke(app, call, env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert words in done.output


def test_what_is_refused(llama: Path, tmp_path: Path) -> None:
    gpt = HF.GPT2LMHeadModel(HF.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    gpt.save_pretrained(tmp_path / "gpt")
    with pytest.raises(lbyl.InputError, match="can't be compressed layer by layer"):
        lbyl.compress_folder(tmp_path / "gpt", tmp_path / "smaller", ratio=0.25, data=batches())
    write(tmp_path / "gemma", "Gemma", head_dim=16)
    with pytest.raises(lbyl.InputError, match="can't be compressed layer by layer"):
        lbyl.compress_folder(tmp_path / "gemma", tmp_path / "smaller", ratio=0.25, data=batches())
    for settings, words in (
        ({}, "either a ratio or a budget"),
        ({"ratio": 0.0}, "nothing is dropped"),
        ({"ratio": {"encoder.*": 0.5}}, "matches no layer"),
        ({"budget": lbyl.Budget(macs=0.5)}, "params"),
        ({"budget": 0.5}, "budget is a float"),
        ({"budget": lbyl.Budget(params=1.0)}, "keeps this already"),
        ({"budget": lbyl.Budget(size_mb=1e3)}, "keeps this already"),
        ({"ratio": {"lm_head": 0.5}}, "drop nothing in the decoder layers"),
        ({"ratio": {"*": 0.5, "model.layers.*": 0.0}}, "drop nothing in the decoder layers"),
        ({"ratio": 0.25, "progress": 3}, "progress is an int"),
        ({"ratio": 0.25, "data": 3}, "data is an int"),
        ({"ratio": 0.25, "data": iter(batches())}, "data is a list_iterator"),
        ({"ratio": 0.25, "data": b"texts"}, "data is a bytes"),
        ({"ratio": 0.25, "data": [1, 2]}, "batch 0 is an int"),
        ({"ratio": 0.25, "data": [torch.zeros(0, 8, dtype=torch.long)] * 2}, "batch 0: an input of 0x8 is empty"),
        ({"ratio": 0.25, "data": [{**batches()[0], "attention_mask": torch.ones(16, 31)}] * 2}, "attention_mask"),
        ({"ratio": 0.25, "data": [{**batches()[0], "attention_mask": torch.zeros(16, 32)}] * 2}, "attention_mask"),
        ({"ratio": 0.25, "data": batches()[:1]}, "at least two"),
        ({"ratio": 0.25, "data": [{"input_ids": torch.full((8, 8), 999)}] * 2}, "999"),
    ):
        with pytest.raises(lbyl.InputError, match=words):
            lbyl.compress_folder(llama, tmp_path / "smaller", **{"data": batches(), **settings})
    (tmp_path / "smaller").mkdir()
    with pytest.raises(lbyl.InputError, match="exists already"):
        lbyl.compress_folder(llama, tmp_path / "smaller", ratio=0.25, data=batches())
    for place in ("source", "target"):
        with pytest.raises(lbyl.InputError, match="File name too long"):
            lbyl.compress_folder(**{"source": llama, "target": tmp_path / "new", "ratio": 0.25, place: "x" * 300})
    assert [path.name for path in tmp_path.glob(".*")] == []


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """A folder with another tensor."""

    def damage(folder: Path) -> None:
        file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
        tensors = load_file(file)
        save_file({**tensors, name: change(tensors[name])}, file, metadata={"format": "pt"})

    return damage


def edited(file: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        place = folder / file
        place.write_text(json.dumps({**json.loads(place.read_text()), **values}))

    return damage


LAST = "model.layers.2.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shape": (changed(LAST, lambda t: t[:, :-1].clone()), f"{LAST} is 160x63 in the file, but 160x64"),
    "whole numbers": (changed(LAST, lambda t: t.to(torch.int8)), f"{LAST} is of type I8 .* quantized"),
    "eight bits": (changed(LAST, lambda t: t.to(torch.float8_e4m3fn)), f"{LAST} is of type F8_E4M3 .* quantized"),
    "no number": (changed(LAST, lambda t: t.fill_(float("nan"))), f"{LAST} holds NaN"),
    "no number in the last norm": (changed("model.norm.weight", lambda t: t / 0), "model.norm.weight holds NaN"),
    "more layers": (edited("config.json", num_hidden_layers=4), "the weights hold no model.layers.3"),
    "no layers": (edited("config.json", num_hidden_layers=0), "has no layers"),
    "quantized": (edited("config.json", quantization_config={"quant_method": "x"}), "holds quantized weights"),
    "a half file": (lambda d: os.truncate(sorted(d.glob("model-*"))[-1], 50), "can't be read as safetensors"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_source_are_told_before_a_layer_takes_time(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = FAULTS[name]
    shutil.copytree(llama, tmp_path / "source")
    damage(tmp_path / "source")
    monkeypatch.setattr("lbyl.pipeline.layerwise.run.compress", lambda *args, **kwargs: pytest.fail("a layer is cut"))
    with pytest.raises(lbyl.InputError, match=words):
        lbyl.compress_folder(tmp_path / "source", tmp_path / "smaller", ratio=0.25, data=batches())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_of_several_types_get_that_of_the_configuration(tmp_path: Path) -> None:
    write(tmp_path / "whole", dtype=torch.bfloat16, num_hidden_layers=2)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        changed(name, lambda t: t.float())(tmp_path / "whole")
    lbyl.compress_folder(tmp_path / "whole", tmp_path / "smaller", ratio=0.25, data=batches())
    assert {tensor.dtype for tensor in weights(tmp_path / "smaller").values()} == {torch.bfloat16}
    expected = in_memory(tmp_path / "whole", ratio=0.25).model.state_dict()
    assert same(HF.AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").state_dict(), expected)


@pytest.fixture(scope="module")
def half(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder in which a killed run has left the work on "smaller", and the weights that it leads to."""

    class Killed(BaseException):
        pass

    def die(stage: str, done: int, total: int) -> None:
        if stage.startswith("layer") and done == 2:
            raise Killed

    place = tmp_path_factory.mktemp("half")
    whole = lbyl.compress_folder(llama, place / "whole", ratio=0.25, data=batches())
    with pytest.raises(Killed):
        lbyl.compress_folder(llama, place / "smaller", ratio=0.25, data=batches(), progress=die)
    return place / ".smaller.layers", weights(whole.path)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 64
    file.write_bytes(content)


SHARD, RECORD = "content/model-00003-of-00005.safetensors", "layer-00001.json"
LEFT_BEHIND: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda work: flip(work / SHARD),
    "a half file of weights": lambda work: os.truncate(work / SHARD, 1000),
    "the weights of another layer": lambda work: shutil.copy(work / SHARD.replace("3-of", "2-of"), work / SHARD),
    "the record of another layer": lambda work: shutil.copy(work / RECORD.replace("1.", "0."), work / RECORD),
    "a half record": lambda work: os.truncate(work / RECORD, 1000),
    "a list for a record": lambda work: (work / RECORD).write_text("[]"),
    "a record without a plan": lambda work: (work / RECORD).write_text("{}"),
    "a half tokenizer": lambda work: (work / "content" / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_is_damaged_of_a_killed_run_is_made_again(
    name: str, llama: Path, half: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(half[0], tmp_path / ".smaller.layers")
    LEFT_BEHIND[name](tmp_path / ".smaller.layers")
    lbyl.compress_folder(llama, tmp_path / "smaller", ratio=0.25, data=batches())
    assert same(weights(tmp_path / "smaller"), half[1])
    assert (tmp_path / "smaller" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def linked(work: Path) -> None:
    (work / "content").rename(work.parent / "elsewhere")
    (work / "content").symlink_to(work.parent / "elsewhere")


IN_THE_WAY: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file of the user": (lambda work: (work.mkdir(), (work / "mine.txt").write_text("mine")), "mine.txt is where"),
    "a file in place of the folder": (lambda work: work.write_text("mine"), "is in the way"),
    "a link": (lambda work: work.symlink_to("elsewhere"), "is a link"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_is_in_the_way_stays(name: str, llama: Path, tmp_path: Path) -> None:
    put, words = IN_THE_WAY[name]
    put(tmp_path / ".smaller.layers")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(lbyl.InputError, match=words):
        lbyl.compress_folder(llama, tmp_path / "smaller", ratio=0.25, data=batches())
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_another_configuration_and_a_link_inside(
    llama: Path, half: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(half[0], tmp_path / ".smaller.layers")
    shutil.copytree(llama, tmp_path / "source", copy_function=shutil.copy2)
    edited("config.json", rms_norm_eps=0.1)(tmp_path / "source")
    with pytest.raises(lbyl.InputError, match="with another configuration: repeat"):
        lbyl.compress_folder(tmp_path / "source", tmp_path / "smaller", ratio=0.25, data=batches())
    linked(tmp_path / ".smaller.layers")
    with pytest.raises(lbyl.InputError, match="content is a link"):
        lbyl.compress_folder(llama, tmp_path / "smaller", ratio=0.25, data=batches())


def test_a_source_that_changes_meanwhile(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "source")

    def change(stage: str, done: int, total: int) -> None:
        if stage.startswith("layer") and done == 1:
            changed(LAST, torch.zeros_like)(tmp_path / "source")

    with pytest.raises(lbyl.InputError, match="has changed meanwhile; remove"):
        lbyl.compress_folder(tmp_path / "source", tmp_path / "smaller", ratio=0.25, data=batches(), progress=change)
    assert not (tmp_path / "smaller").exists()


MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    "DeepseekV3": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        **{"num_key_value_heads": 4, "first_k_dense_replace": 1},
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts(kind: str, tmp_path: Path) -> None:
    """Files hold each expert for itself; models hold them stacked."""
    write(tmp_path / "whole", kind, **MIXTURES[kind], num_hidden_layers=2)
    restorer = lbyl.LeastSquares(renorm=False, sequential=False)
    ratio = {"*.mlp.*": 0.25}
    expected = in_memory(tmp_path / "whole", restorer, ratio=ratio)
    found = lbyl.compress_folder(tmp_path / "whole", tmp_path / "out", ratio=ratio, data=batches(), restore=restorer)
    loaded = HF.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert close(loaded.state_dict(), expected.model.state_dict(), 1e-4)
    assert found.plan.groups == expected.plan.groups
    assert same(lbyl.load(tmp_path / "out").state_dict(), loaded.state_dict())


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "GptOss"])
def test_a_budget_of_mixtures(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "whole", kind, **MIXTURES[kind], num_hidden_layers=1)
    found = lbyl.compress_folder(tmp_path / "whole", tmp_path / "b", budget=lbyl.Budget(params=0.9), data=batches()[:2])
    before, after = found.report.parameters
    assert 0.84 < after / before <= 0.9


def test_an_expert_that_is_missing_is_told(tmp_path: Path) -> None:
    write(tmp_path / "whole", "Mixtral", **MIXTURES["Mixtral"])
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    for file in (tmp_path / "whole").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = tensors[name][:, :-1].clone()
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(lbyl.InputError, match=r"layers.1.mlp.experts.gate_up_proj is .* in the file, but 4x320x64"):
        lbyl.compress_folder(tmp_path / "whole", tmp_path / "out", ratio=0.25, data=batches())
    index = tmp_path / "whole" / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    del written["weight_map"][name]
    index.write_text(json.dumps(written))
    with pytest.raises(lbyl.InputError, match=r"the weights hold no model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        lbyl.compress_folder(tmp_path / "whole", tmp_path / "out", ratio=0.25, data=batches())


def test_the_caller_s_modes_have_no_effect(llama: Path, tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        lbyl.compress_folder(llama, tmp_path / "half", ratio=0.25, data=batches())
    with torch.inference_mode():
        lbyl.compress_folder(llama, tmp_path / "inference", ratio=0.25, data=batches())
    lbyl.compress_folder(llama, tmp_path / "plain", ratio=0.25, data=batches())
    plain = lbyl.load(tmp_path / "plain").state_dict()
    for name in ("half", "inference"):
        assert same(lbyl.load(tmp_path / name).state_dict(), plain)
