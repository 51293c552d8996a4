"""One ranking of channels: error curves are of the channels that are then kept."""

from __future__ import annotations

import pytest
import torch
from nets import images
from torch import nn

import lbyl
from lbyl.budget.curves import measure_curves
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.selection.criteria.base import resolve_criterion
from lbyl.selection.select import ByCriterion, KeptCounts, Ranking, ranked, select


def grouped_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()


@pytest.mark.parametrize("criterion", ["l2", "l1", "gm", "random"])
def test_curves_are_of_the_channels_that_are_kept(criterion: str) -> None:
    net, x = grouped_net(), images(1, 3, 8, 8)
    graph, state = lbyl.inspect(net, x).graph, tensors_of(net)
    by = ByCriterion(resolve_criterion(criterion))
    wanted = [index for index, group in enumerate(graph.groups) if group.prunable]
    curves = measure_curves(net, ExampleInputs.of(x), graph, wanted, state, by, None, 3)
    assert any(len(set(graph.groups[index].blocks)) > 1 for index in wanted)
    for curve in curves.curves:
        group = graph.groups[curve.group]
        blocks = len(set(group.blocks))
        for kept in range(blocks, group.width, blocks):
            selection = select(graph, state, KeptCounts({curve.group: kept}), "inner", by, 3)
            assert selection.choices[0].keep == tuple(sorted(curve.order[:kept]))


def test_curves_are_the_same_in_however_many_passes() -> None:
    net, x = grouped_net(), images(1, 3, 8, 8)
    inputs, graph, state = ExampleInputs.of(x), lbyl.inspect(net, x).graph, tensors_of(net)
    wanted = [index for index, group in enumerate(graph.groups) if group.prunable]
    probes = lbyl.LeastSquares(moments=lbyl.Noise(16)).make_probes(net, inputs, 0)
    passes: list[int] = []

    def curves(room: int) -> list[list[float]]:
        stages: list[str] = []
        by, told = ByCriterion(resolve_criterion("l2")), lambda stage, *_: stages.append(stage)
        found = measure_curves(net, inputs, graph, wanted, state, by, probes, 3, told, room)
        passes.append(stages.count("looking at widths") // len(probes.batches))
        return [curve.error.tolist() for curve in found.curves]

    assert curves(2**31) == curves(1)
    assert passes == [1, len(wanted)]


def test_blocks_take_turns() -> None:
    ranking = Ranking(torch.tensor([[0, 1], [3, 2]]), torch.tensor([2.0, 1.0, 3.0, 4.0]))
    assert ranking.order() == (3, 0, 2, 1)
    assert ranking.kept(1) == (0, 3)


def test_a_ranking_holds_every_channel_once() -> None:
    graph = lbyl.inspect(grouped_net(), images(1, 3, 8, 8)).graph
    for group in graph.groups:
        if group.prunable:
            order = ranked(group, tensors_of(grouped_net()), ByCriterion(lbyl.GeometricMedian()), 0).order()
            assert sorted(order) == list(range(group.width))
