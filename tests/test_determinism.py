"""Equal seeds give bit-equal results; different seeds change what is drawn, and only that."""

from __future__ import annotations

import pytest
import torch
from nets import compress, images, mlp, residual
from torch import nn

import lbyl

X = images(2, 3, 8, 8)


def weights(result: lbyl.Result) -> list[torch.Tensor]:
    return list(result.model.state_dict().values())


def equal(a: lbyl.Result, b: lbyl.Result) -> bool:
    return a.plan == b.plan and all(map(torch.equal, weights(a), weights(b)))


@pytest.mark.parametrize(
    ("criterion", "restore"),
    [("l1", "lbyl"), ("l2", "lbyl"), ("gm", "merge"), ("random", "prune"), ("l2", "coreset")],
)
def test_the_same_seed_twice_is_bit_equal(criterion: str, restore: str) -> None:
    def run() -> lbyl.Result:
        torch.rand(3)  # the state of the global generator must not matter
        return compress(residual(), X, criterion=criterion, restore=restore, seed=7, scope="all")

    assert equal(run(), run())


@pytest.mark.parametrize("options", [{"criterion": "random"}, {"restore": "coreset"}], ids=str)
def test_another_seed_draws_otherwise(options: dict[str, str]) -> None:
    kept = {
        compress(mlp(6, 32), images(2, 6), seed=seed, **options).plan.groups[0].keep  # pyright: ignore
        for seed in range(4)
    }
    assert len(kept) == 4


def test_the_seed_changes_nothing_where_nothing_is_drawn() -> None:
    a, b = (compress(residual(), X, seed=seed) for seed in (0, 1))
    assert a.plan.groups == b.plan.groups
    assert all(map(torch.equal, weights(a), weights(b)))


def test_the_global_generator_is_left_alone() -> None:
    model = residual()
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    compress(model, X, criterion="random", restore="coreset", seed=3)
    assert torch.equal(torch.rand(4), expected)


def test_the_mode_of_the_model_does_not_matter() -> None:
    """Dropout and batch norms behave as in evaluation while lbyl looks at the network."""

    def build() -> nn.Sequential:
        return nn.Sequential(*mlp(6, 16)[:2], nn.Dropout(0.5), *mlp(16, 8))

    a = compress(build().train(), images(2, 6))
    b = compress(build().eval(), images(2, 6))
    assert equal(a, b)
    assert a.model.training
    assert not b.model.training


def test_single_and_double_precision_agree() -> None:
    single = compress(residual(), X)
    double = compress(residual().double(), X.double())
    assert single.plan.groups == double.plan.groups
    for a, b in zip(weights(single), weights(double), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5)


@pytest.mark.parametrize("restore", ["prune", "lbyl", "auto"])
def test_a_model_in_double_precision_is_left_as_it_was(restore: str) -> None:
    model = residual().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress(model, X.double(), restore=restore)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
