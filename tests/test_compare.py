"""Restorers and criteria side by side: the same networks as one by one, and a table of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from nets import flat_convnet, images, mlp, settle
from torch import Tensor, nn

import lbyl

X = images(16, 3, 4, 4)


def judge(model: nn.Module) -> float:
    return -float(model(X).detach().square().mean())


def test_each_cell_is_what_compress_gives() -> None:
    net = settle(flat_convnet())
    restores = {"plain": "prune", "noise": lbyl.LeastSquares(lbyl.Noise(images=16)), "paper": lbyl.LBYL(bn=0.1)}
    found = lbyl.compare(net, X, restores=restores, criteria=["l2", "energy"], ratios=[0.25, 0.5], evaluate=judge)
    assert [(row.restore, row.criterion, row.ratio) for row in found.rows] == [
        (name, criterion, ratio) for name in restores for criterion in ("l2", "energy") for ratio in (0.25, 0.5)
    ]
    for row in found.rows:
        alone = lbyl.compress(
            net, X, ratio=row.ratio, restore=restores[row.restore], criterion=row.criterion, forecast=False
        )
        assert row.score == judge(alone.model)
        assert row.parameters == alone.report.parameters[1] / alone.report.parameters[0]
        assert row.output_error is not None
    assert found.score == judge(net)
    assert found.measure == "test_compare:judge"


def test_the_table_is_printed_drawn_and_written(tmp_path: Path) -> None:
    found = lbyl.compare(mlp(), images(16, 6), restores=["prune", lbyl.LBYL()], ratios=[0.25, 0.5])
    text = io.StringIO()
    rich.print(found, file=text)
    assert "LBYL(bn=None" in text.getvalue()
    rows = list(csv.DictReader(io.StringIO(found.to_csv(tmp_path / "table.csv"))))
    assert (tmp_path / "table.csv").read_text() == found.to_csv()
    assert [float(row["ratio"]) for row in rows] == [0.25, 0.5, 0.25, 0.5]
    assert found.to_dict()["rows"][1]["restore"] == "prune"
    figure = found.plot()
    legend = figure.axes[0].get_legend()
    assert legend
    assert next(text.get_text() for text in legend.get_texts()) == "prune"
    with pytest.raises(lbyl.InputError, match="exists already"):
        found.to_csv(tmp_path / "table.csv")


def test_what_cannot_be_made_has_a_row_that_says_why() -> None:
    class Failing:
        def deliver(self, filters: Any, keep: Any, drop: Any, generator: Any) -> Any:
            return torch.zeros(2, 3)

    found = lbyl.compare(mlp(), images(4, 6), restores={"mine": Failing(), "plain": "prune"}, ratios=[0.5])
    assert [bool(row.why) for row in found.rows] == [True, False]
    assert "Failing.deliver returned a Tensor for '0'; return an lbyl.Delivery" in found.rows[0].why


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"restores": "prune"}, "restores is a str; pass a list"),
        ({"restores": []}, "an empty list"),
        ({"criteria": ["l2", "l2"]}, "l2 is given twice"),
        ({"ratios": 0.5}, "pass a list"),
        ({"ratios": [1.5]}, "below 1"),
        ({"restores": ["magic"]}, "unknown restorer"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(lbyl.InputError, match=told):
        lbyl.compare(mlp(), images(4, 6), **arguments)


SHAPES = {
    "matrix": (lambda k, d: lbyl.Delivery(torch.zeros(d, k + 1), torch.ones(k)), "a matrix of 5x6 .* 5x5"),
    "scale": (lambda k, d: lbyl.Delivery(torch.zeros(k, d), torch.ones(1)), "a scale of 1 .* 5"),
    "nan": (lambda k, d: lbyl.Delivery(torch.full((k, d), float("nan")), torch.ones(k)), "matrix with NaN"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_delivery_that_does_not_fit_is_told_with_its_sizes(name: str) -> None:
    make, told = SHAPES[name]

    class Mine:
        def deliver(self, filters: lbyl.Filters, keep: Any, drop: Any, generator: Any) -> lbyl.Delivery:
            return make(len(keep), len(drop))

    with pytest.raises(lbyl.RestorationError, match=f"Mine.deliver returned .*{told}"):
        lbyl.compress(mlp(), images(2, 6), ratio=0.5, restore=Mine(), forecast=False)


def test_single_precision_is_good_enough_for_a_delivery() -> None:
    class Mine:
        def deliver(self, filters: lbyl.Filters, keep: Any, drop: Any, generator: Any) -> lbyl.Delivery:
            return lbyl.Delivery(torch.ones(len(keep), len(drop)), torch.ones(len(keep)))

    assert lbyl.compress(mlp(), images(2, 6), ratio=0.5, restore=Mine(), forecast=False).report.verified is not None


def test_a_network_of_one_batch_size_is_compared_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.view(2, -1))

    found = lbyl.compare(Two().eval(), images(2, 6), restores=["prune", "auto"], ratios=[0.25])
    assert [row.why for row in found.rows] == ["", ""]
