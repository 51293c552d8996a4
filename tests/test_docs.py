"""What the documentation tells people to type does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from onnx_nets import model, node, real, save

import lbyl
from lbyl.cli.app import app
from lbyl.runtime import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
OWN_PYTHON = (
    "index.md",
    "moments.md",
    "budgets.md",
    "reports.md",
    "architectures.md",
    "export.md",
    "files.md",
    "quantization.md",
)
"""Pages whose Python blocks run one after the other on a small network; extending.md has a test of its own, and so have
the tutorials."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


class Small(torch.nn.Module):
    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 3), norm, torch.nn.ReLU(), torch.nn.Conv2d(64, 16, 3)
        )
        self.fc = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.backbone(x).mean((2, 3)))


def small(*_: object, dreams: bool = False, **__: object) -> torch.nn.Module:
    """With a batch norm where a page dreams: what restores it by default would dream too, which takes long."""
    torch.manual_seed(0)
    return Small(torch.nn.BatchNorm2d(64) if dreams else torch.nn.Identity()).eval()


def test_the_rule_in_extending_works_and_is_needed() -> None:
    *_, operation, rule, check = blocks("extending.md", "python")
    names: dict[str, Any] = {}
    exec(operation, names)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), names["Patches"](), torch.nn.Conv1d(32, 5, 1)).eval()
    before = lbyl.inspect(net, torch.randn(1, 3, 6, 6)).graph.group("0")
    assert before.reason == "patches in '1' has no rule"
    # In a process of its own, for rules are there to stay.
    code = "\n".join([operation, rule, check, "print('the check has run')", rule])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the check has run" in done.stdout, done.stderr
    assert "ValueError: two rules for patches" in done.stderr


def test_members_of_one_s_own_work_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {family: {} for family in registry.FAMILIES})
    *own, _, _, _ = blocks("extending.md", "python")
    names: dict[str, Any] = {"net": small(), "image": torch.randn(4, 3, 12, 12)}
    for block in own:
        exec(block, names)
    errors = {(row.restore, row.criterion, row.ratio): row.output_error for row in names["found"].rows}
    assert len(errors) == 12
    assert all(error is not None for error in errors.values())
    assert errors["NearestChannel()", "l2", 0.5] != errors["prune", "l2", 0.5]
    assert (tmp_path / "comparison.svg").is_file()
    assert {"linf", "nearest"} <= {*registry.names("criterion"), *registry.names("restorer")}


@pytest.mark.parametrize("page", OWN_PYTHON)
def test_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision
    import transformers

    if page == "quantization.md":
        pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    for builder in ("resnet50", "get_model"):  # what would be downloaded
        monkeypatch.setattr(torchvision.models, builder, small)
    net, image = small(dreams=page == "moments.md"), torch.randn(1, 3, 12, 12)
    result = lbyl.compress(net, image, ratio=0.25, source="torchvision:resnet50", restore="lbyl")
    names = {"torch": torch, "lbyl": lbyl, "net": net, "image": image, "result": result}
    if page == "export.md":
        result.save("smaller")
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        transformers.LlamaForCausalLM(config).save_pretrained("llama")
    if page == "files.md":
        stored = {"a.weight": real(0, 64, 3, 3, 3), "b.weight": real(1, 4, 64, 3, 3)}
        nodes = [node("Conv", "x a.weight", "a"), node("Relu", "a", "r"), node("Conv", "r b.weight", "y")]
        sizes = "batch", 3, "height", "width"
        save(model(nodes, stored, {"x": sizes}, {"y": ("batch", 4, "h", "w")}), tmp_path / "model.onnx")
    code = blocks(page, "python")
    assert code
    for block in code:
        exec(block.replace("224, 224", "12, 12").replace("48, 320", "16, 20"), names)


def test_every_page_with_python_is_run() -> None:
    shown = {page for page in PAGES if blocks(page, "python") and not page.startswith("tutorials/")}
    assert shown == {*OWN_PYTHON, "extending.md"}


def test_every_command_and_option_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        for name, command in commands.items()
    }
    found = 0
    for path in (ROOT / "README.md", *(DOCS / page for page in PAGES)):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        shown = re.sub(r"```(?!bash).*?```", "", text, flags=re.DOTALL)
        # Whole calls: the options must be the command's own.
        for name, rest in re.findall(r"\blbyl ([a-z]+)\b([^\n`#]*)", "\n".join(re.findall(r"`+[^`]+`+", shown))):
            assert name in options, f"{path.name}: lbyl {name}"
            for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest):
                assert option in options[name], f"{path.name}: lbyl {name} {option}"
                found += 1
        # Options by themselves: some command must have them.
        for option in re.findall(r"`(--[a-z-]+)[^`]*`", shown):
            assert option in set().union(*options.values()) | {"--version"}, f"{path.name}: {option}"
            found += 1
    assert found > 40


def test_every_page_is_in_the_navigation() -> None:
    def pages(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        inner = node.values() if isinstance(node, dict) else node
        return [page for part in inner for page in pages(part)]  # type: ignore[union-attr]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages(config["nav"])) == PAGES


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: lbyl\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(lbyl.__all__)
