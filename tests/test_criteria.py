"""Criteria against plain numpy, and what is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import compress, flat_convnet, images, mlp, residual
from torch import Tensor, nn

import lbyl
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.registry import find
from lbyl.selection.criteria.l1 import L1
from lbyl.selection.criteria.l2 import L2
from lbyl.selection.filters import describe

FILTERS = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def scores(name: str, seed: int = 0) -> np.ndarray:
    return find("criterion", name)().score(FILTERS, torch.Generator().manual_seed(seed)).numpy()


def test_l1() -> None:
    np.testing.assert_allclose(scores("l1"), np.abs(FILTERS.numpy()).sum(1))


def test_l2() -> None:
    np.testing.assert_allclose(scores("l2"), np.sqrt((FILTERS.numpy() ** 2).sum(1)))


def test_geometric_median() -> None:
    f = FILTERS.numpy()
    expected = [sum(np.sqrt(((a - b) ** 2).sum()) for b in f) for a in f]
    np.testing.assert_allclose(scores("gm"), expected)


def test_random_is_seeded() -> None:
    assert np.array_equal(scores("random", 1), scores("random", 1))
    assert not np.array_equal(scores("random", 1), scores("random", 2))


def test_the_bias_is_one_more_weight_without_a_batch_norm() -> None:
    model = mlp(6, 10)
    raw = describe(lbyl.inspect(model, images(2, 6)).graph.group("0"), tensors_of(model)).raw
    expected = np.concatenate([model[0].weight.detach().numpy(), model[0].bias.detach().numpy()[:, None]], 1)
    np.testing.assert_array_equal(raw.numpy(), expected.astype(np.float64))


def test_the_weight_alone_is_scored_before_a_batch_norm() -> None:
    model = flat_convnet()
    raw = describe(lbyl.inspect(model, images(2, 3, 4, 4)).graph.group("0"), tensors_of(model)).raw
    np.testing.assert_array_equal(raw.numpy(), model[0].weight.detach().double().reshape(8, -1).numpy())


@pytest.mark.parametrize("criterion", [L1(), L2()], ids=["l1", "l2"])
@pytest.mark.parametrize(
    ("model", "x"),
    [(mlp(6, 10), images(2, 6)), (flat_convnet(), images(2, 3, 4, 4)), (residual(), images(2, 3, 6, 6))],
    ids=["biased", "normed", "summed"],
)
def test_norms_are_summed_in_pieces(model: nn.Module, x: Tensor, criterion: L1 | L2) -> None:
    for group in lbyl.inspect(model, x).graph.groups:
        filters = describe(group, tensors_of(model))
        expected = criterion.score(filters.raw, torch.Generator())
        torch.testing.assert_close(filters.norms(criterion.norm_order), expected, rtol=1e-12, atol=0)


def test_a_derived_criterion_scores_for_itself() -> None:
    class Smallest(L2):
        def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
            return -super().score(filters, generator)

    model, x = flat_convnet(), images(2, 3, 4, 4)
    largest, smallest = (compress(model, x, criterion=c, ratio=0.5).plan.groups[0].keep for c in (L2(), Smallest()))
    assert sorted(largest + smallest) == list(range(8))


def test_compress_keeps_the_highest_scores() -> None:
    model = flat_convnet()
    norms = np.linalg.norm(model[0].weight.detach().double().numpy().reshape(8, -1), axis=1)
    (group,) = compress(model, images(2, 3, 4, 4), ratio=0.5).plan.groups
    assert group.keep == tuple(sorted(np.argsort(-norms)[:4].tolist()))


def test_a_criterion_of_ones_own() -> None:
    class Last:
        def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
            return torch.arange(len(filters))

    (group,) = compress(mlp(6, 10), images(2, 6), criterion=Last(), ratio=0.7).plan.groups
    assert group.keep == (7, 8, 9)


def test_misuse_is_one_clear_error() -> None:
    class Wrong:
        def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
            return filters

    with pytest.raises(lbyl.InputError, match="a score per row"):
        compress(mlp(), images(2, 6), criterion=Wrong())
    with pytest.raises(lbyl.InputError, match="auto, l2, l1, gm, energy, obs, random"):
        compress(mlp(), images(2, 6), criterion="l3")
    with pytest.raises(lbyl.InputError, match="no score"):
        compress(mlp(), images(2, 6), criterion=object())  # pyright: ignore[reportArgumentType]


class Listed:
    """A criterion whose scores are no tensor."""

    def score(self, filters: Tensor, generator: torch.Generator) -> list[float]:
        return filters.norm(dim=1).tolist()


def test_scores_that_are_no_tensor_are_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(lbyl.InputError, match=r"Listed.score returned a list; return a tensor with a score per row"):
        lbyl.compress(net, torch.randn(1, 6), ratio=0.5, criterion=Listed(), restore="prune", forecast=False)
