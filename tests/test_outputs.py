"""Whatever a model returns its tensors in, they are outputs: what nobody looked at never counts as verified."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import images
from torch import Tensor, nn

import lbyl
from lbyl.runtime.inputs import output_tensors


@dataclass
class Held:
    features: Tensor
    name: str = "held"


class Plain:
    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.itself = self


class Slotted:
    __slots__ = ("features",)

    def __init__(self, features: Tensor) -> None:
        self.features = features


Named = namedtuple("Named", ["features", "number"])

HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda t: t,
    "tuple": lambda t: (t, None, 3),
    "dict": lambda t: {"a": [t]},
    "ordered": lambda t: OrderedDict(a=t),
    "dataclass": Held,
    "namespace": lambda t: SimpleNamespace(a=SimpleNamespace(b=t)),
    "object": Plain,
    "slots": Slotted,
    "named tuple": lambda t: Named(t, 1),
    "deque": lambda t: deque([t]),
    "distribution": lambda t: torch.distributions.Normal(t, t.exp()),
    "sparse": lambda t: [t.to_sparse(), t.to_sparse_csr()],
    "list of dataclasses": lambda t: [Held(t), Held(t + 1)],
    "lists of numbers": lambda t: [SimpleNamespace(a=row.tolist(), label=int(row.argmax())) for row in t],
    "a number": lambda t: {"n": 3, "energy": float(t.detach().sum())},
}


class Returning(nn.Module):
    def __init__(self, hold: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.hold = nn.Linear(6, 16), nn.Linear(16, 8), hold

    def forward(self, x: Tensor) -> Any:
        return self.hold(self.b(self.a(x).relu()))


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("restore", ["prune", "auto"])
def test_tensors_are_outputs_whatever_holds_them(name: str, restore: str) -> None:
    net, x = Returning(HOLDERS[name]).eval(), images(4, 6)
    result = lbyl.compress(net, x, ratio=0.5, scope="all", restore=restore)
    assert [row.group for row in result.report.rows] == ["a"]
    assert result.report.verified is not None
    assert [t.shape for t in output_tensors(result.model(x))] == [t.shape for t in output_tensors(net(x))]


class Features(nn.Sequential):
    """Returns hidden features as an array, beside its output."""

    def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden = self[0](x)
        return self[1](hidden.relu()), hidden.detach().numpy()


def test_an_array_is_an_output() -> None:
    net = Features(nn.Linear(6, 16), nn.Linear(16, 8)).eval()
    with pytest.raises(lbyl.VerificationError, match="no group can be cut: 0"):
        lbyl.compress(net, images(4, 6), ratio=0.5, restore="prune")


class Listed(nn.Sequential):
    """Returns hidden features as lists of numbers, beside its output."""

    def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden = self[0](x)
        return {"features": [hidden.tolist(), None], "scores": self[2](self[1](hidden).relu())}


def test_lists_of_numbers_are_outputs() -> None:
    net = Listed(nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 8)).eval()
    result = lbyl.compress(net, images(4, 6), ratio=0.5, restore="prune", forecast=False)
    assert [row.group for row in result.report.rows] == ["1"]
    assert dict(result.report.left)["0"] == "found by verification: an output of shape [4, 8] instead of [4, 16]"
    with pytest.raises(lbyl.VerificationError, match=r"an output of .* shape \[4, 8\] in place of \[4, 16\]"):
        lbyl.compress(net, images(4, 6), ratio=0.5, restore="prune", verify=False, forecast=False)


def test_numbers_beside_tensors_may_be_times() -> None:
    lists, single = [[1, 2], [3, 4]], [[1.5, float("nan")]]
    assert [t.shape for t in output_tensors({"seconds": 0.3, "a": torch.ones(2), "b": lists})] == [(2,), (2, 2)]
    assert output_tensors((0.3, single))[0].tolist() == [[1.5, 0.0]]
    assert [t.item() for t in output_tensors({"a": 0.3, "n": 3})] == [0.3]


@pytest.mark.parametrize("hold", [lambda t: None, lambda t: "done", lambda t: t.shape, lambda t: {"n": 3}])
@pytest.mark.parametrize("verb", [lbyl.compress, lbyl.inspect])
def test_no_tensor_in_the_output_is_an_error(hold: Callable[[Tensor], Any], verb: Callable[..., Any]) -> None:
    with pytest.raises(lbyl.InputError, match="the model returns no tensor"):
        verb(Returning(hold).eval(), images(2, 6))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "index of the largest": lambda t: t.argmax(1),
    "complex": lambda t: torch.complex(t, t),
    "half": lambda t: t.half(),
}


@pytest.mark.parametrize("name", KINDS)
def test_outputs_of_every_dtype_are_compared(name: str) -> None:
    result = lbyl.compress(Returning(KINDS[name]).eval(), images(4, 6), ratio=0.5, restore="prune")
    assert result.report.verified is not None


def test_empty_outputs_are_not_verified() -> None:
    result = lbyl.compress(Returning(lambda t: t[:, :0]).eval(), images(4, 6), ratio=0.5, restore="prune")
    assert result.report.verified is None
    assert any("nothing was compared" in note for note in result.report.notes)
