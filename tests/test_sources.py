"""Where models and weights come from: what is accepted, and that nothing is unpickled."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lbyl.cli.sources import example_inputs
from lbyl.errors import InputError
from lbyl.io.sources import load_source, load_weights
from lbyl.surgery.plan import is_rebuildable


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return network().state_dict()


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_safetensors(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    assert same(load_weights(network(), tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("key", [None, "state_dict", "model", "net"])
def test_pth_bare_or_inside_a_checkpoint(tmp_path: Path, state: dict[str, torch.Tensor], key: str | None) -> None:
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pth")
    assert same(load_weights(network(), tmp_path / "w.pth"), state)


def test_the_prefix_of_data_parallel_is_removed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    assert same(load_weights(network(), tmp_path / "w.pth"), state)


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".pth.tar"])
@pytest.mark.parametrize("plain_pickle", [True, False])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, suffix: str, plain_pickle: bool) -> None:
    file, witness = tmp_path / f"evil{suffix}", tmp_path / "executed"
    if plain_pickle:
        file.write_bytes(pickle.dumps(Hostile(witness), protocol=2))
    else:
        torch.save({"state_dict": Hostile(witness)}, file)
    with pytest.raises(InputError, match=r"weights_only=True.*save the state dict as \.safetensors"):
        load_weights(network(), file)
    assert not witness.exists()


def test_the_hostile_pickle_would_have_worked(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(witness))).close()
    assert witness.exists()


def test_wrong_shapes_and_names(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "w.safetensors"
    save_file({**state, "0.weight": torch.zeros(5, 3)}, file)
    with pytest.raises(InputError, match=r"does not fit Sequential: .*0\.weight"):
        load_weights(network(), file)
    save_file({f"encoder.{name}": tensor for name, tensor in state.items()}, file)
    with pytest.raises(InputError, match="does not fit Sequential"):
        load_weights(network(), file)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_damaged_or_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no weights at"):
        load_weights(network(), tmp_path / name)
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(InputError, match=name):
        load_weights(network(), tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.zeros(2)])
def test_a_file_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        load_weights(network(), tmp_path / "w.pth")


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lbyl_test_factory.py").write_text(
        "import torch\nnet = lambda: torch.nn.Linear(2, 2)\nfails = lambda: 1 / 0\nconstant = 3\n"
    )
    file = tmp_path / "lbyl_test_factory.py"
    assert not load_source(f"{file}:net").training
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(load_source("lbyl_test_factory:net"), nn.Linear)
    with pytest.raises(InputError, match=r"fails\(\) failed: ZeroDivisionError"):
        load_source(f"{file}:fails")
    with pytest.raises(InputError, match="has no factory 'constant'"):
        load_source(f"{file}:constant")
    with pytest.raises(InputError, match="has no factory 'absent'"):
        load_source(f"{file}:absent")


def test_a_file_that_can_not_be_run(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import lbyl_no_such_module\n")
    with pytest.raises(InputError, match="can't be run: ModuleNotFoundError"):
        load_source(f"{tmp_path / 'broken.py'}:net")


@pytest.mark.parametrize("source", ["resnet18", ":resnet18", "timm:", ""])
def test_a_source_of_no_known_form(source: str) -> None:
    with pytest.raises(InputError, match="names no model; write timm:NAME"):
        load_source(source)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_libraries(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"{library} has no model 'no_such_model'"):
        load_source(f"{library}:no_such_model")
    monkeypatch.setitem(sys.modules, "timm" if library == "timm" else "torchvision.models", None)
    with pytest.raises(InputError, match=r"install lbyl\[vision\]"):
        load_source(f"{library}:resnet18")


def test_only_library_models_are_rebuilt_from_a_plan() -> None:
    assert is_rebuildable("timm:resnet18")
    assert is_rebuildable("torchvision:resnet18")
    assert not is_rebuildable("file.py:factory")
    assert not is_rebuildable("package.module:factory")


RETURNED = {
    "program": ("torch.export.export(net(), (torch.zeros(1, 3),))", "an exported program; return the nn.Module"),
    "its module": ("torch.export.export(net(), (torch.zeros(1, 3),)).module()", "an exported program"),
    "script": ("torch.jit.trace(net(), torch.zeros(1, 3))", "a TorchScript module, which can't be cut; return"),
    "class": ("torch.nn.Linear", "the class Linear, not a torch.nn.Module"),
    "weights": ("net().state_dict()", "an OrderedDict, not a torch.nn.Module"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_factory_should_return_is_told(name: str, tmp_path: Path) -> None:
    code, told = RETURNED[name]
    file = tmp_path / "made.py"
    file.write_text(f"import torch\nnet = lambda: torch.nn.Linear(3, 4)\ndef made():\n    return {code}\n")
    with pytest.raises(InputError, match=f"returned {told}"):
        load_source(f"{file}:made")


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_random_weights_are_not_downloaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    model = load_source(f"torchvision:{name}", pretrained=False)
    images = example_inputs(f"torchvision:{name}", model, ["3x8x8", "3x8x6"], 0)
    assert ([tuple(image.shape) for image in images[0]] == [(3, 8, 8), (3, 8, 6)]) == ("ssd" in name)


@pytest.mark.parametrize(
    ("pretrained", "told"), [(True, "or --no-pretrained for random ones"), (False, "can't be built")]
)
def test_what_failed_to_load_does_not_recommend_what_was_given(
    pretrained: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models.get_model", fails)
    with pytest.raises(InputError, match=told) as raised:
        load_source("torchvision:resnet18", pretrained)
    assert ("--no-pretrained" in str(raised.value)) == pretrained
