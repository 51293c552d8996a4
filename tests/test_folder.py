"""From folder to folder, layer by layer: the same as in memory, also after being killed, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_language_folders import tokenizer
from torch import Tensor
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app

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
    write(tmp_path / "whole", kind, dtype, **more)
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


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import lbyl
from test_folder import batches

def die(stage, done, total):
    if done == 2:
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
    from lbyl.pipeline.folder import folder

    solved, inner = [], folder.compress
    monkeypatch.setattr(folder, "compress", lambda *args, **kwargs: solved.append(1) or inner(*args, **kwargs))
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
        ({"ratio": 0.25, "data": batches()[:1]}, "at least two"),
        ({"ratio": 0.25, "data": [{"input_ids": torch.full((8, 8), 999)}] * 2}, "999"),
    ):
        with pytest.raises(lbyl.InputError, match=words):
            lbyl.compress_folder(llama, tmp_path / "smaller", **{"data": batches(), **settings})
    (tmp_path / "smaller").mkdir()
    with pytest.raises(lbyl.InputError, match="exists already"):
        lbyl.compress_folder(llama, tmp_path / "smaller", ratio=0.25, data=batches())
    assert [path.name for path in tmp_path.glob(".*")] == []
