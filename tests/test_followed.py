"""Networks that look at what they compute are compressed along the way that they take on the example inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import images
from torch import Tensor, nn

import lbyl


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.early = nn.Linear(16, 4)

    def rest(self, x: Tensor) -> Tensor:
        return self.c(self.b(x).relu())


class Branches(Base):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.rest(hidden) if x.mean() > -100 else self.early(hidden)


class Asserts(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert bool(torch.isfinite(x).all())
        hidden = self.a(x).relu()
        return self.rest(hidden) + self.early(hidden)


class ExitsEarly(Base):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        early = self.early(hidden)
        return early if float(early.softmax(-1).max()) > 0.999 else self.rest(hidden)


class Lengths(Base):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden = self.a(x[:, : int(lengths.max())]).relu()
        return self.rest(hidden) + self.early(hidden)


class Scaled(Base):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.rest(hidden * x.abs().max().item()) + self.early(hidden)


def made(kind: type[Base]) -> tuple[Tensor, ...]:
    return (images(3, 5, 6), torch.tensor([2, 4, 3])) if kind is Lengths else (images(3, 6),)


KINDS = [Branches, Asserts, ExitsEarly, Lengths, Scaled]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("restore", ["prune", "lbyl"])
def test_the_way_that_the_example_takes_is_cut_and_verified(kind: type[Base], restore: str) -> None:
    net, x = kind().eval(), made(kind)
    result = lbyl.compress(net, x, ratio=0.5, restore=restore)
    assert [(row.group, row.after) for row in result.report.rows] == [("a", 8), ("b", 6)]
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
    assert result.model(*x).shape == net(*x).shape


@pytest.mark.parametrize("verb", ["compress", "inspect"])
def test_a_note_says_so(verb: str) -> None:
    net, x = Branches().eval(), images(3, 6)
    if verb == "inspect":
        note = lbyl.inspect(net, x).note
    else:
        note = "\n".join(lbyl.compress(net, x, ratio=0.5, restore="prune").report.notes)
    assert "branches on values that it computes" in note
    assert "early did not run" in note


class Helped(Base):
    """An auxiliary head that only runs in training, as in GoogLeNet, and an argument that the example leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.helper, self.kinds = nn.Linear(16, 4), nn.Embedding(3, 16)
        self.register_buffer("unused", torch.ones(3))

    def forward(self, x: Tensor, kind: Tensor | None = None) -> Any:
        hidden = self.a(x).relu() if kind is None else self.a(x).relu() + self.kinds(kind)
        found = self.c(self.b(hidden))
        return (found, self.helper(hidden)) if self.training else found


def test_layers_that_only_run_otherwise_are_named() -> None:
    notes = lbyl.compress(Helped().eval(), images(3, 6), ratio=0.5, restore="prune", forecast=False).report.notes
    assert any(note.startswith("early, helper, kinds did not run and may no longer fit") for note in notes)
    assert any("left whole" in note and "no operation used it on the example inputs" in note for note in notes)


class Masking(Base):
    """A parameter that stands in for inputs in training, as in wav2vec 2.0."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.a(self.hidden.expand_as(x) if self.training else x).relu())


def test_a_parameter_is_named_where_its_module_ran() -> None:
    net = nn.Sequential(Masking()).eval()
    result = lbyl.compress(net, images(3, 6), ratio=0.5, restore="prune", forecast=False)
    (told,) = [note for note in result.report.notes if "may no longer fit" in note]
    assert "0.hidden" in told
    assert "were not used" in told


class Normed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm1d(12), nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.b(self.a(x).relu()))
        return self.c(self.other(hidden) if hidden.mean() > 1e9 else hidden)


def test_layers_that_ran_are_not_among_those_that_did_not() -> None:
    notes = "\n".join(lbyl.compress(Normed().eval(), images(3, 6), ratio=0.5, restore="prune").report.notes)
    assert "other" in notes.partition("take; ")[2]
    assert "norm did not" not in notes
    assert "norm," not in notes


class Noisy(Base):
    """Draws in evaluation mode, as some samplers and stochastic layers do."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.draw(self.b(self.a(x).relu()).relu()))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number a row": lambda t: t * torch.rand(len(t), 1),
    "a number an element": lambda t: t + torch.randn_like(t),
    "dropout": lambda t: nn.functional.dropout(t, 0.5, training=True),
    "after all": lambda t: t + torch.randn(len(t), 1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_noise_is_the_same_on_both_sides(name: str) -> None:
    result = lbyl.compress(Noisy(DRAWS[name]).eval(), images(3, 6), ratio=0.5, restore="prune")
    assert "a" in [row.group for row in result.report.rows]
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
