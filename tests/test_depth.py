"""Depth: residual blocks are found, dropped, made up for by the layer before them, saved and loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from nets import Block as ConvBlock
from nets import images, settle
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.errors import ArtifactError, InputError, VerificationError
from lbyl.graph.blocks import find_blocks
from lbyl.graph.writers import find_writer
from lbyl.io.artifact import MANIFEST
from lbyl.moments.accumulate import Moments
from lbyl.moments.stream import add_weighted
from lbyl.pipeline.together import Attempt, Way, best_of
from lbyl.restore.depth.effect import Effect, divergence
from lbyl.restore.depth.fit import RunProblem, restore_runs
from lbyl.restore.depth.solve import folded, solve_stream
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.latency import Runs, measure_modules
from lbyl.selection.blocks import Chosen, choose_blocks, choose_run, influence
from lbyl.surgery.blocks import (
    BlockCut,
    composed,
    original_name,
    plan_blocks,
    renamed,
    skipped,
    verify_blocks,
    without_blocks,
)
from lbyl.surgery.plan import Plan

LAYERS = 4
TOKENS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": LAYERS, "intermediate_size": 32, "num_attention_heads": 4}


class Convolutional(nn.Module):
    """A stem, residual blocks of one shape in a Sequential, and a classifier. Input 3 x 8 x 8."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer = nn.Sequential(*(ConvBlock(width, width) for _ in range(LAYERS)))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(self.stem(x)).mean((2, 3)))


def spread(model: nn.Module) -> nn.Module:
    """Weights that are large enough for the outputs to depend on every block."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def build(name: str) -> nn.Module:
    hf: Any = transformers
    makers: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **SIZES, **TOKENS)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=LAYERS, n_head=4, **TOKENS)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, **TOKENS)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIZES)),
        "timm": lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=LAYERS, embed_dim=16, num_heads=4, num_classes=5
        ),
    }
    return settle(Convolutional()) if name == "cnn" else spread(makers[name]())


LIST = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "bert": "bert.encoder.layer",
    "vit": "vit.layers",
    "timm": "blocks",
    "cnn": "layer",
}
WRITER = {
    "llama": ("mlp.down_proj", "", ""),
    "gpt2": ("mlp.c_proj", "", ""),
    "bert": ("output.dense", "", "layer_norm"),
    "vit": ("mlp.fc2", "", ""),
    "timm": ("mlp.fc2", "", ""),
    "cnn": ("conv2", "bn2", "relu"),
}


def inputs_of(name: str) -> ExampleInputs:
    if name in ("vit", "timm", "cnn"):
        side = 8 if name == "cnn" else 16
        x = images(2, 3, side, side)
        return ExampleInputs.of({"pixel_values": x} if name == "vit" else x)
    return ExampleInputs.of({"input_ids": torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))})


def batches(name: str, count: int = 4) -> list[Any]:
    """Inputs to solve on: uniform tokens, or noise."""
    generator = torch.Generator().manual_seed(1)
    if name in ("vit", "timm", "cnn"):
        side = 8 if name == "cnn" else 16
        made = [torch.randn(16, 3, side, side, generator=generator) for _ in range(count)]
        return [{"pixel_values": x} for x in made] if name == "vit" else made
    return [{"input_ids": torch.randint(3, 40, (16, 7), generator=generator)} for _ in range(count)]


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(inputs_of(name).cloned().call(model))


def dropped(name: str, share: float = 0.8, **settings: Any) -> lbyl.Result:
    restore = settings.pop("restore", lbyl.LeastSquares(moments=lbyl.Data(batches(name), 4)))
    budget = lbyl.Budget(params=share, depth=True, exclude=("*",))  # no channel may go: depth alone
    return lbyl.compress(build(name), inputs_of(name), budget=budget, restore=restore, forecast=False, **settings)


@cache
def without_some_blocks(name: str) -> lbyl.Result:
    """What several tests look at, and none changes."""
    return dropped(name)


@pytest.mark.parametrize("name", LIST)
def test_blocks_and_their_writers_are_found(name: str) -> None:
    model = build(name)
    blocks = find_blocks(model, inputs_of(name))
    assert [block.name for block in blocks.blocks] == [f"{LIST[name]}.{i}" for i in range(LAYERS)]
    writer = find_writer(model.get_submodule(f"{LIST[name]}.1"), blocks.calls[f"{LIST[name]}.1"])
    assert writer is not None
    assert (writer.layer, writer.norm, writer.tail) == WRITER[name]


def test_what_is_no_residual_block_is_left_alone() -> None:
    plain = nn.Sequential(
        nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), nn.BatchNorm1d(6)
    )
    assert not find_blocks(plain.eval(), ExampleInputs.of(torch.randn(4, 6))).blocks
    with pytest.raises(InputError, match="no residual blocks"):
        lbyl.compress(plain, torch.randn(4, 6), budget=lbyl.Budget(params=0.5, depth=True))


@pytest.mark.parametrize("name", LIST)
def test_the_cut_network_equals_the_original_with_blocks_skipped(name: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = [b for b in find_blocks(model, inputs_of(name)).blocks if b.index in (1, 2)]
    smaller = without_blocks(model, plan_blocks(model, blocks))
    with skipped(model, [block.name for block in blocks]):
        expected = outputs(model, name)
    for a, b in zip(expected, outputs(smaller, name), strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not all(map(torch.equal, outputs(model, name), expected))


@pytest.mark.parametrize("name", LIST)
def test_folding_an_exact_transformation_reproduces_it(name: str) -> None:
    """If what is missing is a linear function of the writer's output, the folded layer adds exactly that."""
    model = build(name)
    blocks = find_blocks(model, inputs_of(name))
    path = f"{LIST[name]}.1"
    host, call = model.get_submodule(path), blocks.calls[path]
    writer = find_writer(host, call)
    assert writer is not None
    seen: list[Tensor] = []
    written = host.get_submodule(writer.output)

    def look() -> Tensor:
        seen.clear()
        handle = written.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        with torch.no_grad():
            call.inputs.cloned().call(host)
        handle.remove()
        found = seen[0] if writer.norm == "" else seen[0].movedim(1, -1)
        return found.reshape(-1, found.shape[-1]).double()

    m = look()
    width = m.shape[1]
    wanted = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / width
    moments = Moments.zeros(width, width, m.device)
    rows = torch.cat([m, torch.randn(4 * width, width, generator=torch.Generator().manual_seed(1)).double()])
    moments.add(rows, rows @ wanted)
    solution = solve_stream(moments, 0.0, has_bias=False)
    with torch.no_grad():
        for key, value in folded(host, path, writer, solution, moments).items():
            tensor = model.state_dict()[key]
            assert tensor.dtype == value.dtype
            tensor.copy_(value)
    torch.testing.assert_close(look(), m + m @ wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", LIST)
def test_restoration_lowers_the_error_on_held_out_probes(name: str) -> None:
    model, inputs = build(name), inputs_of(name)
    blocks = find_blocks(model, inputs)
    cuts = plan_blocks(model, [block for block in blocks.blocks if block.index in (1, 3)])
    *solved, held_out = map(ExampleInputs.of, batches(name, 9))
    effect = Effect.of(model, inputs, (held_out,))
    found = restore_runs(RunProblem(model, cuts, blocks, solved, effect))
    assert [run.dropped for run in found.runs] == [(f"{LIST[name]}.1",), (f"{LIST[name]}.3",)]
    assert found.restored < 0.99 * found.plain
    smaller = without_blocks(sharing_copy(model, found.values), cuts)
    assert effect(smaller) == pytest.approx(found.restored)
    assert effect(without_blocks(model, cuts)) == pytest.approx(found.plain)
    assert effect(model) == pytest.approx(0, abs=1e-5)


def test_a_run_without_a_layer_before_it_is_dropped_plainly() -> None:
    model, inputs = build("llama"), inputs_of("llama")
    blocks = find_blocks(model, inputs)
    cuts = plan_blocks(model, [block for block in blocks.blocks if block.index in (0, 1)])
    solved = [ExampleInputs.of(batch) for batch in batches("llama")]
    found = restore_runs(RunProblem(model, cuts, blocks, solved, Effect.of(model, inputs, (solved[0],))))
    assert not found.values
    assert found.restored == found.plain
    assert "no block precedes" in found.runs[0].why


def test_an_infinite_ridge_drops_blocks_plainly() -> None:
    much = lbyl.LeastSquares(moments=lbyl.Data(batches("llama"), 4), ridge=1e12)
    stiff = dropped("llama", restore=much)
    plain = without_blocks(build("llama"), stiff.plan.blocks)
    for a, b in zip(outputs(stiff.model, "llama"), outputs(plain, "llama"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_saved_folders_load_with_from_pretrained_in_a_fresh_process(tmp_path: Path) -> None:
    """All in one process, because importing transformers takes longer than the rest."""
    code = "import torch, transformers\n"
    for name in ("llama", "gpt2", "bert", "vit"):
        result, out = without_some_blocks(name), tmp_path / name
        result.save(out)
        (note,) = [n for n in json.loads((out / MANIFEST).read_text())["report"]["notes"] if "transformers" in n]
        assert "loads this folder" in note
        torch.save((dict(inputs_of(name).kwargs), outputs(result.model, name)), tmp_path / f"{name}.pt")
        code += f"""
inputs, expected = torch.load({str(tmp_path / f"{name}.pt")!r})
model = transformers.{type(result.model).__name__}.from_pretrained({str(out)!r})
assert model.config.num_hidden_layers == {LAYERS - len(result.report.blocks)}, {name!r}
with torch.no_grad():
    torch.testing.assert_close(model(**inputs).logits, expected[0])
"""
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", LIST)
def test_load_drops_the_same_blocks(name: str, tmp_path: Path) -> None:
    result = without_some_blocks(name)
    result.save(tmp_path / "out")
    loaded = lbyl.load(tmp_path / "out", build(name))
    assert all(map(torch.equal, outputs(result.model, name), outputs(loaded, name)))


def test_a_plan_with_blocks_that_a_network_lacks_gives_one_line(tmp_path: Path) -> None:
    without_some_blocks("llama").save(tmp_path / "out")
    hf: Any = transformers
    shallow = hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **{**SIZES, "num_hidden_layers": 2}, **TOKENS))
    with pytest.raises(ArtifactError, match=r"another architecture.*model\.layers\.") as caught:
        lbyl.load(tmp_path / "out", shallow)
    assert "\n" not in str(caught.value)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    for stack, keep in (("model.nowhere", [0, 1]), ("model.layers", [0, 0]), ("model.layers", [])):
        manifest["plan"]["blocks"] = [{"stack": stack, "children": ["0", "1", "2", "3"], "keep": keep}]
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError) as caught:
            lbyl.load(tmp_path / "out", build("llama"))
        assert "\n" not in str(caught.value)


def test_generation_works_with_renumbered_caches() -> None:
    model: Any = without_some_blocks("llama").model
    ids = inputs_of("llama").kwargs["input_ids"]
    cached, plain = (
        model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=use, min_new_tokens=5) for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_depth_with_width_is_never_worse_than_the_better_of_both() -> None:
    """On held-out probes, by the figures that the report gives."""
    restore = lbyl.LeastSquares(moments=lbyl.Data(batches("llama"), 4))
    result = lbyl.compress(
        build("llama"),
        inputs_of("llama"),
        budget=lbyl.Budget(params=0.7, depth=True),
        restore=restore,
        forecast=False,
    )
    (note,) = [note for note in result.report.notes if note.startswith("depth against width")]
    figures = [float(part.split(" without ")[0].split()[-1]) for part in note.split(", ")]
    assert len(figures) > 1
    assert figures[0] == min(figures)
    before, after = result.report.parameters
    assert after <= 0.7 * before
    assert after == sum(p.numel() for p in result.model.parameters())
    assert before == sum(p.numel() for p in build("llama").parameters())


@pytest.mark.parametrize(
    ("effects", "own_text", "kept"),
    [
        ((0.38, 0.43, 0.41), True, 2),
        ((0.38, 0.43, 0.41), False, 0),
        ((0.30, 0.43, 0.41), True, 0),
        ((0.45, 0.43, 0.41), True, 2),
    ],
)
def test_own_text_has_to_praise_dropped_blocks_clearly(effects: tuple[float, ...], own_text: bool, kept: int) -> None:
    result: Any = None
    dropped = ("a", "b"), ("a",), ()
    attempts = [Attempt(Way(Chosen(names)), True, result, e) for names, e in zip(dropped, effects, strict=True)]
    best, why = best_of(attempts, own_text)
    assert best is attempts[kept]
    assert bool(why) == (best.effect > min(effects))


def test_a_network_that_lost_blocks_can_be_compressed_again(tmp_path: Path) -> None:
    first = without_some_blocks("llama")
    restore = lbyl.LeastSquares(moments=lbyl.Data(batches("llama"), 4))
    more = lbyl.compress(first.model, inputs_of("llama"), ratio=0.25, restore=restore, forecast=False)
    again = lbyl.compress(
        more.model,
        inputs_of("llama"),
        budget=lbyl.Budget(params=0.8, depth=True, exclude=("*",)),
        restore=restore,
        forecast=False,
    )
    for result in (more, again):
        result.save(tmp_path / str(id(result)))
        loaded = lbyl.load(tmp_path / str(id(result)), build("llama"))
        assert all(map(torch.equal, outputs(result.model, "llama"), outputs(loaded, "llama")))
    assert len(again.plan.blocks[0].keep) < len(more.plan.blocks[0].keep) < LAYERS
    assert Plan.from_json(again.plan.to_json()).blocks == again.plan.blocks


def test_weighted_moments_are_those_of_repeated_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, r = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    times = torch.tensor([1, 2, 3, 1, 1, 4])
    weighted, repeated = (Moments.zeros(3, 3, p.device) for _ in range(2))
    add_weighted(weighted, p, r, times.double())
    repeated.add(p.repeat_interleave(times, 0), r.repeat_interleave(times, 0))
    first, second = (solve_stream(moments, 0.1, has_bias=True) for moments in (weighted, repeated))
    torch.testing.assert_close(first.coefficients, second.coefficients)
    torch.testing.assert_close(first.shift, second.shift)


def test_names_before_and_after_are_inverse() -> None:
    first = (BlockCut("a", ("0", "1", "2"), (1, 2)), BlockCut("a.2.b", ("0", "1", "2"), (0, 2)))
    assert renamed("a.2.b.2.w", first) == "a.1.b.1.w"
    assert renamed("a.0.b.2.w", first) is None
    assert original_name("a.1.b.1.w", first) == "a.2.b.2.w"
    then = (BlockCut("a.1.b", ("0", "1"), (1,)),)
    both = composed(first, then)
    assert renamed("a.2.b.2.w", both) == "a.1.b.0.w"
    named = (BlockCut("", ("first", "second"), (1,)),)
    assert renamed("second.w", named) == "second.w"
    assert renamed("first.w", named) is None


def test_scores_of_blocks() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert influence(x, 3 * x) == pytest.approx(0, abs=1e-9)
    assert influence(x, -x) == pytest.approx(2)
    other = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.kl_div(other.log_softmax(1), x.log_softmax(1), log_target=True, reduction="none")
    torch.testing.assert_close(divergence(x, other), expected.sum(1))


@pytest.mark.parametrize("outputs", [math.nan, math.inf, 3.0])
def test_a_network_that_computes_something_else_is_not_verified(outputs: float) -> None:
    model, x = build("cnn"), ExampleInputs.of(images(2, 3, 8, 8))
    block = find_blocks(model, x).blocks[1]
    smaller = without_blocks(model, plan_blocks(model, [block]))
    assert verify_blocks(model, smaller, x, [block.name]) < 1e-6
    with (
        smaller.register_forward_hook(lambda module, args, output: torch.full_like(output, outputs)),
        pytest.raises(VerificationError, match="computes something else"),
    ):
        verify_blocks(model, smaller, x, [block.name])


def test_the_choice_counts_what_blocks_do_together() -> None:
    """Two blocks that are harmless alone, and harmful together, do not both go."""
    alone = {"a": 1.0, "b": 1.1, "c": 2.0}

    def effect(names: tuple[str, ...]) -> float:
        return sum(alone[name] for name in names) + 10 * ({"a", "b"} <= set(names))

    chosen = choose_blocks(list(alone), lambda names: True, lambda names: len(names) == 2, effect)
    assert set(chosen.blocks) == {"a", "c"}
    assert chosen.together == (1.0, 3.0)
    none = choose_blocks(list(alone), lambda names: False, lambda names: len(names) == 2, effect)
    assert none.blocks == ()


def test_a_run_is_of_neighbors_in_one_list() -> None:
    names = ["a.0", "a.1", "a.3", "a.4", "b.0", "b.1"]
    costs = dict(zip(names, (1.0, 9.0, 2.0, 3.0, 4.0, 0.5), strict=True))
    tried: list[tuple[str, ...]] = []

    def effect(blocks: tuple[str, ...]) -> float:
        tried.append(blocks)
        return sum(costs[name] for name in blocks)

    found = choose_run(Chosen(), names, lambda blocks: True, lambda blocks: len(blocks) == 2, effect)
    assert found.blocks == ("b.0", "b.1")
    assert found.together == (4.0, 4.5)
    assert [blocks for blocks in tried if len(blocks) == 2] == [("a.0", "a.1"), ("a.3", "a.4"), ("b.0", "b.1")]
    assert choose_run(Chosen(), names, lambda blocks: True, lambda blocks: len(blocks) == 3, effect).blocks == ()


@pytest.mark.parametrize("wrong", [{"accuracy_drop": 0.5}, {"agreement": 0.9}])
def test_depth_needs_a_budget_of_cost(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="macs, params, size_mb or latency"):
        lbyl.Budget(**wrong, depth=True)  # pyright: ignore[reportArgumentType]


def test_blocks_go_until_a_latency_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts parameters, so that what is met does not depend on the machine."""

    def size(module: nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) * 1e-6

    def whole(models: Any, inputs: Any, *, runs: int, **settings: Any) -> Any:
        return tuple(Runs((size(model),) * runs) for model in models)

    def modules(model: nn.Module, inputs: Any, names: Any, *, runs: int) -> Any:
        return {name: size(model.get_submodule(name)) / size(model) for name in names}

    monkeypatch.setattr("lbyl.budget.latency.measure_whole", whole)
    monkeypatch.setattr("lbyl.budget.latency.measure_modules", modules)
    budgets = [lbyl.Budget(depth=True, exclude=("*",), **limit) for limit in ({"latency": 0.75}, {"params": 0.75})]  # pyright: ignore
    restore = lbyl.LeastSquares(moments=lbyl.Data(batches("llama"), 4))
    timed, counted = (
        lbyl.compress(build("llama"), inputs_of("llama"), budget=budget, restore=restore, forecast=False)
        for budget in budgets
    )
    assert timed.plan.blocks == counted.plan.blocks != ()
    (told,) = [note for note in timed.report.notes if note.startswith("latency:")]
    assert told.endswith("asked for 0.75")


def test_excluded_blocks_stay() -> None:
    restore = lbyl.LeastSquares(moments=lbyl.Data(batches("llama"), 4))
    budget = lbyl.Budget(params=0.75, depth=True, exclude=("*", "model.layers.[12]"))
    result = lbyl.compress(build("llama"), inputs_of("llama"), budget=budget, restore=restore, forecast=False)
    dropped = {row.block for row in result.report.blocks}
    assert dropped
    assert not dropped & {"model.layers.1", "model.layers.2"}
    assert dict(result.report.left)["model.layers.1"] == "excluded"


def test_modules_are_timed_with_all_that_they_hold() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 8)))
    shares = measure_modules(net, ExampleInputs.of(torch.ones(64, 8)), ["0", "1", "1.0"], runs=3)
    assert 0 < shares["1.0"] < shares["1"] < 1
    assert not any(module._forward_hooks for module in net.modules())


def test_the_command_line_drops_blocks(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from test_depth import build\n\ndef make():\n    return build('cnn')\n")
    arguments = ["compress", f"{tmp_path / 'net.py'}:make", "--input", "2x3x8x8", "-o", str(tmp_path / "out")]
    arguments += ["--no-latency", "--no-forecast", "--moments", "noise", "--json", "--quiet"]
    ran = CliRunner().invoke(app, [*arguments, "--budget", "params=0.8", "--depth", "--exclude", "*"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["plan"]["blocks"][0]["stack"] == "layer"
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "out")])
    assert "Dropped blocks" in shown.output
    for wrong in (["--ratio", "0.5"], ["--budget", "agreement=0.9"], []):
        ran = CliRunner().invoke(app, [*arguments[:-2], "-o", str(tmp_path / "other"), *wrong, "--depth"])
        assert ran.exit_code == 2
        assert "--depth" in ran.output


def test_equal_seeds_give_equal_networks() -> None:
    first, second = without_some_blocks("cnn"), dropped("cnn")
    assert first.plan == replace(second.plan)
    assert all(map(torch.equal, outputs(first.model, "cnn"), outputs(second.model, "cnn")))


def test_the_stages_of_a_backbone_follow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    net = transformers.Dinov2Model(transformers.Dinov2Config(**shape)).eval()
    x = {"pixel_values": torch.randn(4, 3, 8, 8)}
    budget = lbyl.Budget(params=0.6, depth=True, max_ratio=0.05)
    result = lbyl.compress(net, x, budget=budget, restore="prune", forecast=False)
    layers = result.model.config.num_hidden_layers
    assert layers < 4
    assert result.model.config.stage_names == ["stem", *(f"stage{i + 1}" for i in range(layers))]
    assert net.config.stage_names[-1] == "stage4"
    result.model.save_pretrained(tmp_path / "out")
    again = type(net).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(**x)[0], result.model(**x)[0])
