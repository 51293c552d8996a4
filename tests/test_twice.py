"""A network that was compressed twice is saved with a plan that starts from the unpruned one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets import Depthwise, images, mlp, residual, settle
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lbyl


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()


def grouped() -> nn.Module:
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1, groups=4), nn.GroupNorm(4, 16), nn.Conv2d(16, 4, 1)
        )
    )


def becoming_depthwise() -> nn.Module:
    """Grouped convolutions of which the first compression leaves one channel for each group."""
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 2, groups=4),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1, groups=4),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )
    )


def normed() -> nn.Module:
    return settle(nn.Sequential(weight_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 4, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: settle(mlp()), (2, 6)),
    "residual": (lambda: settle(residual()), (2, 3, 8, 8)),
    "depthwise": (lambda: settle(Depthwise()), (2, 3, 8, 8)),
    "attention": (attention, (2, 5, 16)),
    "grouped": (grouped, (2, 3, 8, 8)),
    "becoming depthwise": (becoming_depthwise, (2, 3, 8, 8)),
    "weight norm": (normed, (2, 3, 8, 8)),
}


def same(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_a_second_compression_loads_into_a_fresh_network(name: str, scope: str, tmp_path: Path) -> None:
    build, shape = NETS[name]
    x = images(*shape)
    first = lbyl.compress(build(), x, ratio=0.5, restore="prune", scope=scope, forecast=False)
    second = lbyl.compress(first.model, x, ratio=0.5, restore="prune", scope=scope, forecast=False)
    second.save(tmp_path / "twice")
    assert same(lbyl.load(tmp_path / "twice", build()), second.model, x)
    assert any("compressed before" in note for note in second.report.notes)
    assert lbyl.Plan.from_json(second.plan.to_json()) == second.plan


@pytest.mark.parametrize("by_way_of", ["a copy", "a folder"])
def test_where_the_first_network_comes_from_does_not_matter(by_way_of: str, tmp_path: Path) -> None:
    x = images(2, 6)
    first = lbyl.compress(settle(mlp()), x, ratio=0.3, restore="lbyl", forecast=False)
    net = copy.deepcopy(first.model)
    if by_way_of == "a folder":
        first.save(tmp_path / "once")
        net = lbyl.load(tmp_path / "once", settle(mlp()))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    second = lbyl.compress(net, x, ratio=0.3, restore="lbyl", forecast=False)
    second.save(tmp_path / "twice")
    assert same(lbyl.load(tmp_path / "twice", settle(mlp())), second.model, x)
    third = lbyl.compress(second.model, x, ratio=0.3, restore="lbyl", forecast=False)
    third.save(tmp_path / "thrice")
    assert same(lbyl.load(tmp_path / "thrice", settle(mlp())), third.model, x)


def test_a_network_that_has_changed_since_starts_anew(tmp_path: Path) -> None:
    x = images(2, 6)
    net = lbyl.compress(settle(mlp()), x, ratio=0.3, restore="prune", forecast=False).model
    assert isinstance(net, nn.Sequential)
    net[-1] = nn.Linear(net[-1].in_features, 5)
    second = lbyl.compress(net, x, ratio=0.3, restore="prune", forecast=False)
    second.save(tmp_path / "saved")
    assert same(lbyl.load(tmp_path / "saved", net), second.model, x)


def test_the_source_is_that_of_the_first(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    x = images(1, 3, 32, 32)
    first = lbyl.compress(
        squeezenet1_1(num_classes=1000).eval(),
        x,
        ratio=0.3,
        restore="prune",
        source="torchvision:squeezenet1_1",
        forecast=False,
    )
    second = lbyl.compress(first.model, x, ratio=0.3, restore="prune", forecast=False)
    second.save(tmp_path / "twice")
    assert same(lbyl.load(tmp_path / "twice"), second.model, x)
