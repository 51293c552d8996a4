"""Networks on other devices, and networks whose layers accelerate's hooks move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import images, mlp, residual
from torch import Tensor, nn

import lbyl
from lbyl.pipeline import prepare
from lbyl.runtime.copying import tensors_of
from lbyl.selection.filters import describe


def test_a_device_without_float64_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_WITHOUT_FLOAT64", ("cpu",))
    with pytest.raises(lbyl.InputError, match=r"on cpu, which has no float64; .*result\.model\.to\('cpu'\)"):
        lbyl.compress(mlp(), images(2, 6), ratio=0.5)


def dispatched(model: nn.Module, offload: bool) -> nn.Module:
    """The model with accelerate's hooks: all on the CPU, or with weights that are only there while a layer runs."""
    accelerate = pytest.importorskip("accelerate")
    if offload:
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    children = {name: "cpu" for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, children, force_hooks=True)


@pytest.mark.parametrize("restore", ["lbyl", lbyl.LeastSquares(moments=lbyl.Noise(images=16))])
def test_models_with_hooks_of_accelerate_are_cut_like_others(restore: lbyl.LeastSquares | str) -> None:
    model, x = residual(), images(2, 3, 6, 6)
    plain = lbyl.compress(model, x, ratio=0.5, restore=restore, forecast=False)
    hooked = dispatched(copy.deepcopy(model), offload=False)
    result = lbyl.compress(hooked, x, ratio=0.5, restore=restore, forecast=False)
    assert torch.equal(result.model(x), plain.model(x))
    assert torch.equal(hooked(x), model(x))


def test_offloaded_weights_are_named_with_the_way_out() -> None:
    hooked = dispatched(residual(), offload=True)
    with pytest.raises(lbyl.InputError, match=r"meta device.*accelerate has offloaded it"):
        lbyl.compress(hooked, images(2, 3, 6, 6), ratio=0.5)


class Elsewhere(Tensor):
    """A tensor as on another device: what is computed with it is there, too, unless it is brought to the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(Tensor) if func is Tensor.cpu else out


def test_what_criteria_and_closed_forms_know_of_filters_is_on_the_cpu() -> None:
    """Their own tensors are there, and a mixture of both would be an error."""
    net = residual()
    state = {name: tensor.detach().as_subclass(Elsewhere) for name, tensor in tensors_of(net).items()}
    seen = 0
    for group in lbyl.inspect(net, images(2, 3, 6, 6)).graph.groups:
        filters = describe(group, state)
        for name in ("raw", "weight", "energy", "offset", "center", "spread", "peak"):
            value = getattr(filters, name)
            assert value is None or type(value) is Tensor, (group.name, name)
            seen += value is not None
        assert type(filters.norms(2)) is Tensor
    assert seen > 15
