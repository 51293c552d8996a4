"""The closed form is the minimizer, and the other restorers do what their papers say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Depthwise, compress, flat_convnet, images, mlp, residual, settle
from sklearn.linear_model import Ridge
from torch import Tensor, nn

import lbyl
from lbyl.restore.coreset import sample, sensitivity
from lbyl.restore.lbyl import closed_form
from lbyl.restore.ridge import solve_ridge
from lbyl.runtime.copying import tensors_of
from lbyl.selection.filters import Filters, describe, paper_form_applies
from lbyl.selection.select import kept_count

KEEP, DROP = torch.arange(5), torch.arange(5, 8)
ANYTHING = torch.Generator()


def problem(seed: int, fan_in: int = 9, kept: int = 5, dropped: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(fan_in, kept), normal(fan_in, dropped), normal(kept), normal(dropped)


def loss(s: Tensor, v_keep: Tensor, v_drop: Tensor, c_keep: Tensor, c_drop: Tensor, bn: float, ridge: float) -> Tensor:
    """The paper's loss written out: RE + lambda_1 BE + lambda_2 |s|^2, summed over the dropped channels."""
    total = torch.zeros((), dtype=torch.float64)
    for d in range(v_drop.shape[1]):
        re = (v_drop[:, d] - v_keep @ s[:, d]).square().sum()
        be = (c_drop[d] - torch.dot(c_keep, s[:, d])).square()
        total = total + re + bn * be + ridge * s[:, d].square().sum()
    return total


def filters_of(weight: Tensor, offset: Tensor | None = None, peak: Tensor | None = None) -> Any:
    none = torch.zeros(len(weight)).double()
    return SimpleNamespace(
        raw=weight,
        weight=weight,
        offset=none if offset is None else offset,
        normalized=offset is not None,
        center=none,
        spread=None,
        peak=torch.ones(len(weight)).double() if peak is None else peak,
    )


def effective(model: nn.Module, inputs: Tensor, name: str) -> Filters:
    return describe(lbyl.inspect(model, inputs).graph.group(name), tensors_of(model))


# -- LBYL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bn", "ridge"), [(0.0, 1e-2), (1e-4, 1e-2), (0.7, 0.3), (3.0, 1e-6)])
def test_the_gradient_of_the_written_out_loss_vanishes(bn: float, ridge: float) -> None:
    parts = problem(1)
    s, singular = closed_form(*parts, bn, ridge)
    s = s.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(s, *parts, bn, ridge), s)
    assert not singular
    assert gradient.abs().max() < 1e-10


@given(
    st.integers(0, 10_000),
    st.floats(0, 10),
    st.floats(1e-6, 10),
    st.floats(1e-4, 10),
    st.integers(2, 12),
    st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_no_perturbation_is_better(seed: int, bn: float, ridge: float, size: float, fan_in: int, kept: int) -> None:
    parts = problem(seed, fan_in, kept)
    s, _ = closed_form(*parts, bn, ridge)
    step = size * torch.randn(s.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    assert loss(s + step, *parts, bn, ridge) > loss(s, *parts, bn, ridge)


def test_the_offset_enters_by_its_outer_product() -> None:
    """Against a dense solve for each filter with an extra row sqrt(bn) c: another route to the same loss."""
    v_keep, v_drop, c_keep, c_drop = problem(2)
    bn, ridge = 0.5, 0.1
    s, _ = closed_form(v_keep, v_drop, c_keep, c_drop, bn, ridge)
    rows = np.concatenate([v_keep, math.sqrt(bn) * c_keep[None], math.sqrt(ridge) * np.eye(5)])
    for d in range(3):
        target = np.concatenate([v_drop[:, d], [math.sqrt(bn) * c_drop[d]], np.zeros(5)])
        np.testing.assert_allclose(s[:, d], np.linalg.lstsq(rows, target)[0], atol=1e-10)


def test_center_equals_ridge_with_an_intercept_filter_by_filter() -> None:
    model = mlp(6, 8)
    filters = effective(model, images(2, 6), "0")
    s = lbyl.LBYL(ridge=0.3, center=True).deliver(filters, KEEP, DROP, ANYTHING).matrix
    w = filters.weight.numpy()  # [w | b], a row a neuron
    for column, d in enumerate(DROP.tolist()):
        expected = Ridge(alpha=0.3, fit_intercept=True).fit(w[:5].T, w[d]).coef_
        np.testing.assert_allclose(s[:, column], expected, atol=1e-10)
    without = lbyl.LBYL(ridge=0.3).deliver(filters, KEEP, DROP, ANYTHING).matrix
    assert (without - s).abs().max() > 1e-3


def test_effective_filters_use_the_deviation_and_the_epsilon() -> None:
    """v and c from their definition: the batch norm's answer to an impulse, and to nothing."""
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.5)
    model = settle(nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(4, 2, 1)))
    filters = effective(model, images(1, 3, 5, 5), "0")
    with torch.no_grad():
        basis = torch.eye(27).reshape(27, 3, 3, 3)
        answers = norm(conv(basis)).double().reshape(27, 4)
        nothing = norm(conv(torch.zeros(1, 3, 3, 3))).double().reshape(4)
    torch.testing.assert_close(filters.offset, nothing, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(filters.weight, (answers - nothing).T, atol=1e-6, rtol=1e-5)


def test_a_depthwise_layer_composes_with_a_pointwise_one() -> None:
    point, depth, norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)
    model = settle(nn.Sequential(point, depth, norm, nn.ReLU(), nn.Conv2d(4, 2, 1)))
    filters = effective(model, images(1, 3, 5, 5), "0")
    with torch.no_grad():
        answers = norm(depth(point(torch.eye(27).reshape(27, 3, 3, 3)))).double().reshape(27, 4)
        nothing = norm(depth(point(torch.zeros(1, 3, 3, 3)))).double().reshape(4)
    torch.testing.assert_close(filters.offset, nothing, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(filters.weight, (answers - nothing).T, atol=1e-6, rtol=1e-5)


def test_where_the_paper_s_form_does_not_apply_the_report_says_so() -> None:
    model, x = settle(Depthwise()), images(2, 3, 6, 6)
    group = lbyl.inspect(model, x).graph.group("expand")  # an activation parts it from the depthwise layer
    assert "depthwise" in str(paper_form_applies(group, tensors_of(model)))
    note = {row.group: row.note for row in compress(model, x).report.rows}
    assert "does not apply" in note["expand"]
    assert note["project"] == ""


def test_a_singular_system_is_solved_by_pseudo_inverse_and_reported() -> None:
    v_keep, v_drop, c_keep, c_drop = problem(3, fan_in=3)  # 5 filters in 3 dimensions
    s, singular = closed_form(v_keep, v_drop, c_keep, c_drop, 0.0, 0.0)
    assert singular
    np.testing.assert_allclose(s, np.linalg.pinv(v_keep.numpy()) @ v_drop.numpy(), atol=1e-8)

    result = compress(mlp(3, 16), images(2, 3), restore=lbyl.LBYL(ridge=0.0))
    assert "pseudo-inverse" in result.report.rows[0].note
    result = compress(mlp(3, 16), images(2, 3))
    assert result.report.rows[0].note == ""


def test_zero_filters_are_singular_not_a_crash() -> None:
    s, singular = solve_ridge(torch.zeros(3, 3).double(), torch.zeros(3, 2).double(), 0.0)
    assert singular
    assert not s.any()


class First:
    """Keeps the first channels, whatever their weights."""

    def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
        return -torch.arange(len(filters))


def copy_model(layer: nn.Linear, scales: list[float]) -> None:
    """Neurons 4.. become copies of neurons 0.., scaled."""
    with torch.no_grad():
        for copy, scale in enumerate(scales):
            layer.weight[4 + copy] = scale * layer.weight[copy]
            layer.bias[4 + copy] = scale * layer.bias[copy]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (mlp(6, 8), (2, 6)),
        (flat_convnet(), (2, 3, 4, 4)),
        (residual(), (2, 3, 8, 8)),
        (settle(Depthwise()), (2, 3, 6, 6)),
        (settle(nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))), (1, 3, 6, 6)),
    ],
    ids=["bias", "batch norm", "several producers", "outer products of taps", "transposed"],
)
def test_the_energy_of_a_channel_is_that_of_its_effective_filter(model: nn.Module, shape: tuple[int, ...]) -> None:
    for group in lbyl.inspect(model, images(*shape)).graph.groups:
        filters = describe(group, tensors_of(model))
        assert torch.allclose(filters.energy, filters.weight.square().sum(1), rtol=1e-12)


@pytest.mark.parametrize("scales", [[1.0] * 4, [0.5, 0.25, 3.0, 0.01]], ids=["copies", "scaled"])
@pytest.mark.parametrize("restore", [lbyl.LBYL(ridge=1e-9), lbyl.Merge()], ids=["lbyl", "merge"])
def test_duplicates_are_restored_exactly(scales: list[float], restore: lbyl.Restorer) -> None:
    model, x = mlp(6, 8), images(32, 6)
    copy_model(model[0], scales)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        expected = model(x)
        restored = compress(model, x, criterion=First(), restore=restore).model
        pruned = compress(model, x, criterion=First(), restore="prune").model
        assert torch.allclose(restored(x), expected, atol=1e-5)
        assert not torch.allclose(pruned(x), expected, atol=1e-3)


def test_duplicates_under_batch_norm_and_a_flatten_are_restored_exactly() -> None:
    """What must agree is gamma w / sigma and the offset, not the raw weights."""
    model, x = flat_convnet(), images(8, 3, 4, 4)
    conv, norm = model[0], model[1]
    with torch.no_grad():
        conv.weight[4:] = 0.5 * conv.weight[:4]
        norm.running_mean[4:] = 0.5 * norm.running_mean[:4]
        # 0.3 times the kept channel: twice the gain for half the weight, at another deviation.
        gain = 0.3 * norm.weight[:4] / (norm.running_var[:4] + norm.eps).sqrt() / 0.5
        norm.weight[4:] = gain * (norm.running_var[4:] + norm.eps).sqrt()
        norm.bias[4:] = 0.3 * norm.bias[:4]
        expected = model(x)
        # bn=0: what these batch norms state is not what the channels are like.
        for restore in (lbyl.LBYL(bn=0.0, ridge=1e-9), lbyl.Merge()):
            result = compress(model, x, criterion=First(), restore=restore)
            assert torch.allclose(result.model(x), expected, atol=1e-4)


def padded(size: int, bias: bool) -> nn.Sequential:
    """Two convolutions whose first batch norm states what its output is like on normal inputs; maps of ``size``."""
    conv, norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=None)
    second = nn.Conv2d(8, 4, 3, padding=1, bias=bias)
    after = nn.Identity() if bias else nn.BatchNorm2d(4, momentum=None)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
        made = nn.Sequential(
            conv, norm, nn.ReLU(), second, after, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )
        made.train()(normal_images(size))
    return made.eval()


def normal_images(size: int) -> Tensor:
    return torch.randn(256, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [2, 8], ids=["mostly padding", "a larger map"])
@pytest.mark.parametrize("bias", [False, True], ids=["into the running mean", "into the bias"])
def test_constants_bring_back_as_much_of_the_lost_mean_as_stays_of_the_channels(size: int, bias: bool) -> None:
    """With an infinite ridge nothing is delivered, so that constants are all there is: half, for half of them stay."""
    torch.manual_seed(0)
    model, x = padded(size, bias), normal_images(size)
    means = []
    for restore in (None, "prune", lbyl.LBYL(ridge=1e12)):
        made = (
            model
            if restore is None
            else compress(model, x[:2], criterion=First(), ratio={"0": 0.5}, restore=restore).model
        )
        with torch.no_grad():
            means.append(made[:5](x).mean((0, 2, 3)))  # pyright: ignore[reportIndexIssue]
    whole, pruned, restored = means
    lost = whole - pruned
    assert lost.norm() > 0.1
    assert (restored - pruned - 0.5 * lost).norm() < 0.1 * lost.norm()


def test_the_ridge_is_in_proportion_to_the_filters() -> None:
    """With None, scaling all filters of a layer changes nothing of what is delivered."""
    model = mlp(6, 8)
    matrices = []
    for factor in (1.0, 100.0):
        with torch.no_grad():
            model[0].weight.mul_(factor)  # pyright: ignore
            model[0].bias.mul_(factor)  # pyright: ignore
        filters = effective(model, images(2, 6), "0")
        matrices.append(lbyl.LBYL().deliver(filters, KEEP, DROP, ANYTHING).matrix)
    torch.testing.assert_close(matrices[0], matrices[1], rtol=1e-4, atol=1e-6)


def test_the_report_s_terms_are_the_losses_parts() -> None:
    model, x = flat_convnet(), images(2, 3, 4, 4)
    result = compress(model, x, restore=lbyl.LBYL(bn=0.5, ridge=0.1))
    (row,), (group,) = result.report.rows, result.plan.groups
    filters = effective(model, x, "0")
    keep = list(group.keep)
    drop = [channel for channel in range(8) if channel not in keep]
    v, c = filters.weight.T, filters.offset
    s, _ = closed_form(v[:, keep], v[:, drop], c[keep], c[drop], 0.5, 0.1)
    assert row.re == pytest.approx(float((v[:, drop] - v[:, keep] @ s).square().sum(0).mean()))
    assert row.be == pytest.approx(float((c[drop] - c[keep] @ s).square().mean()))
    assert row.ae is not None
    assert row.ae > 0


def test_plain_pruning_has_the_largest_residual_and_no_activation_error() -> None:
    rows = {
        name: compress(residual(), images(2, 3, 8, 8), restore=name).report.rows[0]
        for name in ("prune", "merge", "lbyl")
    }
    assert rows["prune"].ae == 0
    assert rows["lbyl"].re is not None
    assert rows["merge"].re is not None
    assert rows["prune"].re is not None
    assert rows["lbyl"].re < rows["merge"].re
    assert rows["lbyl"].re < rows["prune"].re


@pytest.mark.parametrize("arguments", [{"ridge": -1}, {"bn": -1e-3}])
def test_negative_weights_are_an_error(arguments: dict[str, float]) -> None:
    with pytest.raises(lbyl.InputError, match="at least 0"):
        lbyl.LBYL(**arguments)  # pyright: ignore[reportArgumentType]


# -- Prune -----------------------------------------------------------------------------------------------


def test_prune_only_slices() -> None:
    model = mlp(6, 10)
    result = compress(model, images(2, 6), restore="prune")
    keep = list(result.plan.groups[0].keep)
    assert torch.equal(result.model[2].weight, model[2].weight[:, keep])
    assert torch.equal(result.model[2].bias, model[2].bias)
    assert torch.equal(result.model[0].weight, model[0].weight[keep])


# -- Neuron Merging --------------------------------------------------------------------------------------


def test_merge_has_one_non_negative_entry_a_column() -> None:
    weight = torch.randn(8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    matrix = lbyl.Merge(threshold=None).deliver(filters_of(weight), KEEP, DROP, ANYTHING).matrix
    assert torch.equal((matrix != 0).sum(0), torch.ones(3, dtype=torch.int64))
    w = weight.numpy()
    cosine = (w[:5] @ w[5:].T) / np.outer(np.linalg.norm(w[:5], axis=1), np.linalg.norm(w[5:], axis=1))
    best = cosine.argmax(0)
    for column, d in enumerate(DROP.tolist()):
        expected = np.linalg.norm(w[d]) / np.linalg.norm(w[best[column]])
        assert matrix[best[column], column] == pytest.approx(expected)


def test_merge_leaves_out_what_is_not_similar_enough() -> None:
    weight = torch.eye(8, dtype=torch.float64)
    weight[5, 0], weight[6, 0] = 10.0, 0.5  # cosines with filter 0: 0.995, 0.447, 0
    filters = filters_of(weight)

    def merged(threshold: float | None) -> list[bool]:
        return lbyl.Merge(threshold=threshold).deliver(filters, KEEP, DROP, ANYTHING).matrix.any(0).tolist()

    assert merged(None) == [True, True, True]
    assert merged(0.4) == [True, True, False]
    assert merged(0.45) == [True, False, False]
    assert merged(0.999) == [False, False, False]


def test_merge_blends_the_offsets_in() -> None:
    weight = torch.tensor([[1.0, 0.1], [1.0, -0.11], [1.0, 0.0]], dtype=torch.float64)
    filters = filters_of(weight, torch.tensor([5.0, 1.0, 1.0], dtype=torch.float64))
    keep, drop = torch.tensor([0, 1]), torch.tensor([2])

    def chosen(blend: float) -> int:
        return int(lbyl.Merge(blend=blend).deliver(filters, keep, drop, ANYTHING).matrix[:, 0].argmax())

    assert chosen(1.0) == 0  # the closer direction
    assert chosen(0.5) == 1  # the same offset
    with pytest.raises(lbyl.InputError, match="between 0 and 1"):
        lbyl.Merge(blend=1.5)


# -- Coreset ---------------------------------------------------------------------------------------------


def test_coreset_s_importance_is_the_largest_outgoing_weight_times_the_norm() -> None:
    model = mlp(6, 10)
    filters = effective(model, images(2, 6), "0")
    w = np.concatenate([model[0].weight.detach().numpy(), model[0].bias.detach().numpy()[:, None]], 1)
    expected = np.abs(model[2].weight.detach().numpy()).max(0) * np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(sensitivity(filters), expected, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_coreset_keeps_exactly_as_many_as_asked(ratio: float) -> None:
    for seed in range(5):
        result = compress(mlp(6, 20), images(2, 6), ratio=ratio, restore="coreset", seed=seed)
        assert len(result.plan.groups[0].keep) == kept_count(20, ratio)


def test_the_weights_that_were_folded_in_are_those_of_the_draw() -> None:
    """Selection and restoration draw apart from each other; they must see the same draw."""
    model = mlp(6, 20)
    filters = effective(model, images(2, 6), "0")
    result = compress(model, images(2, 6), restore="coreset", seed=4)
    keep = list(result.plan.groups[0].keep)
    ratios = result.model[2].weight / model[2].weight[:, keep]
    assert torch.allclose(ratios, ratios[:1].expand_as(ratios), rtol=1e-4)
    u = ratios[0].double().detach()
    probability = sensitivity(filters) / sensitivity(filters).sum()
    draws = u * probability[keep]  # proportional to whole numbers: how often each was drawn
    draws = draws / draws.min()
    assert (draws > 0.9).all()
    steps = [(draws * m - (draws * m).round()).abs().max() for m in range(1, 7)]
    assert min(steps) < 1e-3


def test_coreset_is_seeded() -> None:
    importance = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def drawn(seed: int) -> Tensor:
        return sample(importance, 8, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_the_weighted_sum_over_a_coreset_is_unbiased() -> None:
    """Stopping at a count of distinct channels biases a little; 3 % is far below what a wrong weight does."""
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(12, generator=generator, dtype=torch.float64) + 0.5
    values = torch.rand(12, generator=generator, dtype=torch.float64)
    estimates = torch.stack(
        [sample(importance, 8, torch.Generator().manual_seed(seed)) @ values for seed in range(1500)]
    )
    assert float(estimates.mean()) == pytest.approx(float(values.sum()), rel=0.03)


# -- names -----------------------------------------------------------------------------------------------


def test_unknown_restorers_are_one_clear_error() -> None:
    for wrong in ("ridge", lbyl.LBYL, object()):
        with pytest.raises(lbyl.InputError, match=r"auto, lbyl, merge|deliver|pass an object"):
            compress(mlp(), images(2, 6), restore=wrong)  # pyright: ignore[reportArgumentType]


def test_merging_as_released_is_the_released_code_s_arithmetic() -> None:
    """Pair by pair, with the running variance where the deviation is meant."""
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    model = settle(nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(8, 2, 1)))
    with torch.no_grad():
        norm.weight.abs_().add_(0.2)
    w = conv.weight.detach().double().flatten(1)
    gamma, beta, mu, var = (t.detach().double() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))  # pyright: ignore
    found = lbyl.Merge(threshold=None, released=True).deliver(
        effective(model, images(1, 3, 5, 5), "0"), KEEP, DROP, ANYTHING
    )
    expected = torch.zeros(5, 3).double()
    for column, d in enumerate(DROP.tolist()):
        cosines, scales, gaps = [], [], []
        for k in KEEP.tolist():
            s = w[d].norm() / w[k].norm()
            scales.append(s * (gamma[k] / gamma[d]) * (var[d] / var[k]))
            cosines.append(1 - torch.dot(w[d], w[k]) / w[d].norm() / w[k].norm())
            gap = (gamma[k] / var[k]) * (s * (-(var[d] * beta[d] / gamma[d]) + mu[d]) - mu[k]) + beta[k]
            gaps.append(gap.abs() / scales[-1])
        gaps = (torch.stack(gaps) - min(gaps)) / (max(gaps) - min(gaps))
        best = int((0.85 * torch.stack(cosines) + 0.15 * gaps).argmin())
        expected[best, column] = scales[best]
    torch.testing.assert_close(found.matrix, expected)


@pytest.mark.parametrize("zeros", [[0], [3], [0, 3, 5], [*range(7)], [*range(8)]], ids=str)
def test_merging_as_released_without_factors_to_compare(zeros: list[int]) -> None:
    """Channels whose batch norm multiplies by zero are not merged, and none is merged into them."""
    norm = nn.BatchNorm2d(8)
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)))
    with torch.no_grad():
        norm.weight.abs_().add_(0.2)[zeros] = 0
    found = lbyl.Merge(released=True).deliver(effective(model, images(1, 3, 5, 5), "0"), KEEP, DROP, ANYTHING)
    assert bool(found.matrix.isfinite().all())
    assert not bool(found.matrix[torch.isin(KEEP, torch.tensor(zeros))].any())
    assert not bool(found.matrix[:, torch.isin(DROP, torch.tensor(zeros))].any())
