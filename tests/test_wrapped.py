"""Networks and weights that something wraps for training; and modules that can't be cut, each with a way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images, mlp, settle
from torch import Tensor, nn

import lbyl
from lbyl.io.sources import load_weights

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "OptimizedModule": torch.compile,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_networks_are_unwrapped(name: str, tmp_path: Path) -> None:
    net, x = settle(mlp()), images(2, 6)
    plain = lbyl.compress(net, x, ratio=0.5, restore="lbyl")
    wrapped = lbyl.compress(WRAPPERS[name](net).eval(), x, ratio=0.5, restore="lbyl")
    assert type(wrapped.model) is nn.Sequential
    expected = plain.model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in wrapped.model.state_dict().items())
    assert any(name in note for note in wrapped.report.notes)
    assert lbyl.inspect(WRAPPERS[name](net).eval(), x).graph.groups[0].name == "0"
    loaded = lbyl.load(wrapped.save(tmp_path / "small"), WRAPPERS[name](mlp()))
    assert type(loaded) is nn.Sequential
    assert torch.equal(loaded(x), wrapped.model(x))


def prepared() -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    net = mlp().train()
    net.qconfig = get_default_qat_qconfig("fbgemm")  # pyright: ignore[reportArgumentType]
    return prepare_qat(net)


UNCUTTABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted": (lambda: torch.jit.script(mlp()), "TorchScript.*pass the nn.Module"),
    "traced": (lambda: torch.jit.trace(mlp(), torch.zeros(1, 6)), "TorchScript.*pass the nn.Module"),
    "a part": (lambda: nn.Sequential(torch.jit.script(mlp()), nn.Linear(3, 2)), "'0' is a TorchScript"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)), "'0' is lazy.*run the model once"),
    "of inference mode": (
        lambda: torch.inference_mode()(mlp)(),
        "'0' is made inside torch.inference_mode.*outside of that",
    ),
    "for quantization": (prepared, "quantiz.*compress the float model first"),
}


@pytest.mark.parametrize("name", UNCUTTABLE)
@pytest.mark.parametrize("verb", [lbyl.compress, lbyl.inspect])
def test_what_to_pass_instead_is_told(name: str, verb: Callable[..., Any]) -> None:
    build, told = UNCUTTABLE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = build()
    with pytest.raises(lbyl.InputError, match=told):
        verb(net.eval(), images(2, 6))


def under(prefix: str, **others: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {**{prefix + name: tensor for name, tensor in state.items()}, **others}


CHECKPOINTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "DataParallel": under("module."),
    "compiled": under("_orig_mod."),
    "compiled inside": under("model._orig_mod."),
    "Lightning": lambda state: {"epoch": 3, "state_dict": under("model.")(state)},
    "Lightning with a loss": lambda state: {"state_dict": under("model.", **{"loss.weight": torch.ones(3)})(state)},
    "averaged": under("module.", n_averaged=torch.tensor(3)),
    "nested": lambda state: {"model": {"state_dict": under("module.")(state)}, "optimizer": {}},
    "of an average": lambda state: {"ema": under("module.")(state)},
    "both": lambda state: {"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}},
    "one in the other": under("module.model."),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_found_whatever_wraps_them(name: str, tmp_path: Path) -> None:
    state = settle(mlp(), seed=3).state_dict()
    torch.save(CHECKPOINTS[name](state), tmp_path / "weights.pth")
    loaded = load_weights(mlp(), tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(under("module.")(mlp(6, 9).state_dict()), tmp_path / "weights.pth")
    with pytest.raises(lbyl.InputError, match="does not fit Sequential"):
        load_weights(mlp(), tmp_path / "weights.pth")


def test_the_module_of_an_exported_program_is_refused() -> None:
    program = torch.export.export(mlp(), (torch.zeros(1, 6),)).module()
    with pytest.raises(lbyl.InputError, match=r"exported program.*load_source"):
        lbyl.compress(program, torch.zeros(1, 6), ratio=0.5)


def test_weights_that_torchao_has_quantized_are_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    net = mlp()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    with pytest.raises(lbyl.InputError, match=r"0.weight is quantized \(a \w+\); compress the float model first"):
        lbyl.compress(net, torch.zeros(1, 6), ratio=0.5)


def test_an_empty_parameter_that_is_no_weight_is_left_alone() -> None:
    net = mlp()
    net.register_parameter("middle", torch.nn.Parameter(torch.zeros(0, 1, 6)))
    result = lbyl.compress(net, torch.zeros(1, 6), ratio=0.5, restore="prune", forecast=False)
    assert result.model.middle.shape == (0, 1, 6)
    assert result.report.parameters[1] < result.report.parameters[0]
