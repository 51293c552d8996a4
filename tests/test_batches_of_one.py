"""A batch of one says as much as its rows do: errors are taken against the mean of everything that is held out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from nets import flat_convnet, images, settle
from torch import Tensor, nn

import lbyl
from lbyl.runtime.output_error import outputs_error

SHAPES = {"sequence": (1, 9, 12), "image": (1, 5, 6, 6), "row": (1, 12), "rows": (7, 4), "numbers": (6,)}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_one_has_an_error(shape: str) -> None:
    expected = images(*SHAPES[shape])
    assert outputs_error(expected, 0.7 * expected + 0.3 * expected.mean()) < 0.5
    assert outputs_error(expected, expected) < 1e-6
    assert outputs_error([expected], [images(*SHAPES[shape], seed=7)]) > 0.5


def test_what_is_masked_out_does_not_count() -> None:
    expected = images(2, 5, 4)
    expected[:, :, 0] = -torch.inf
    assert outputs_error(expected, expected) < 1e-6
    with pytest.raises(lbyl.InputError, match="not finite"):
        outputs_error(torch.full((2, 3), torch.nan), torch.zeros(2, 3))
    assert outputs_error(expected, torch.full_like(expected, torch.nan)) == 1


class Dense(nn.Module):
    """Gives a value a pixel, as segmentation does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = settle(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


NETS: dict[str, Callable[[], nn.Module]] = {"classes": lambda: settle(flat_convnet()), "pixels": Dense}


def restored(net: nn.Module, source: Iterable[Any], **settings: Any) -> lbyl.Report:
    moments = lbyl.Data(source, **settings)
    size = 4 if not isinstance(net, Dense) else 8
    return lbyl.compress(net, images(1, 3, size, size), ratio=0.5, restore=lbyl.LeastSquares(moments=moments)).report


@pytest.mark.parametrize("name", NETS)
def test_many_batches_of_one_do_as_well_as_large_ones(name: str) -> None:
    net = NETS[name]().eval()
    size = 8 if name == "pixels" else 4
    x = images(64, 3, size, size)
    single, large = restored(net, list(x.split(1))), restored(net, list(x.split(16)))
    assert single.assessment == large.assessment
    assert single.assessment is not None
    assert single.assessment.restored < 0.9


@pytest.mark.parametrize(
    ("source", "settings", "told"),
    [
        (
            lambda: list(images(16, 3, 4, 4).split(1)),
            {},
            r"16 batches \(16 inputs\) were read, all that the source has.*joined",
        ),
        (lambda: [images(64, 3, 4, 4)] * 5, {}, r"4 batches \(256 inputs\) were read, 1 were not"),
        (lambda: (images(64, 3, 4, 4) for _ in range(5)), {}, "the source had more"),
        (lambda: [images(8, 3, 4, 4)] * 5, {"batches": 2}, r"2 batches \(16 inputs\) were read, 3 were not"),
        (lambda: [images(64, 3, 4, 4)], {}, "a single batch, of which 16 inputs were held out"),
        (lambda: [images(7, 3, 4, 4)], {}, "too few to hold any out"),
    ],
)
def test_how_much_was_read_is_told(source: Callable[[], Iterable[Any]], settings: dict[str, int], told: str) -> None:
    notes = restored(settle(flat_convnet()), source(), **settings).notes
    assert re.search(told, "\n".join(note for note in notes if note.startswith("Data: ")))


class Literal(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(1, 3, 8, 8))


def test_a_network_that_takes_one_at_a_time_gets_one_at_a_time() -> None:
    report = restored(Literal().eval(), list(images(8, 3, 8, 8).split(1)))
    assert any("runs on no other batch size" in note for note in report.notes)
    assert report.assessment is not None
    assert report.assessment.restored < 0.9


def test_sequences_of_many_lengths_are_measured_on_the_last() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    moments = lbyl.Data([images(1, length, 6) for length in (20, 30, 40)])
    report = lbyl.compress(net, images(1, 5, 6), ratio=0.5, restore=lbyl.LeastSquares(moments=moments)).report
    assert any("differ in shape" in note for note in report.notes)
    assert report.assessment is not None
    assert report.assessment.restored < report.assessment.pruned


@pytest.mark.parametrize(
    ("rows", "told"), [(64, "on held-out inputs of yours"), (7, "on the inputs that were solved on.*too few")]
)
def test_what_was_solved_on_is_not_called_held_out(rows: int, told: str) -> None:
    report = restored(settle(flat_convnet()), [images(rows, 3, 4, 4)])
    assert report.assessment is not None
    assert report.assessment.held_out == bool(report.held_out_errors) == (rows == 64)
    assert any(re.search(f"output error {told}", line) for line in report.summary())
    assert not any("held-out probes" in line for line in report.summary() if rows == 7)
