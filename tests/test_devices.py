"""Networks on other devices, and networks whose layers accelerate's hooks move."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import images, mlp, residual
from torch import nn

import lbyl
from lbyl.pipeline import prepare


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
