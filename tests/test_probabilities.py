"""Networks that end in a softmax are judged by the scores behind their probabilities."""

from __future__ import annotations

import pytest
import torch
from nets import images, settle
from torch import nn

import lbyl
from lbyl.moments.class_dream import class_scores
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.output_error import error_of_parts, outputs_error
from lbyl.runtime.probabilities import class_axis, to_scores

SCORES = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [1, 3])
def test_scores_come_back_from_probabilities(dtype: torch.dtype, axis: int) -> None:
    p = SCORES.softmax(axis).to(dtype)
    assert class_axis(p) == axis
    expected = SCORES - SCORES.mean(axis, keepdim=True)
    torch.testing.assert_close(to_scores(p, axis).float(), expected, atol=40 * torch.finfo(dtype).eps + 1e-5, rtol=0.02)


@pytest.mark.parametrize(
    "other",
    [
        SCORES,
        SCORES.sigmoid(),
        SCORES.softmax(1)[:, :4],
        torch.ones(3, 1),
        torch.ones(4),
        torch.ones(2, 3, dtype=torch.int64),
        torch.zeros(0, 3),
        torch.full((2, 2), torch.nan),
    ],
    ids=["scores", "sigmoids", "a part", "one class", "a vector", "integers", "nothing", "not numbers"],
)
def test_other_outputs_are_no_probabilities(other: torch.Tensor) -> None:
    assert class_axis(other) is None


def test_certain_answers_stay_finite() -> None:
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.isfinite(to_scores(p, 1)).all()
    assert outputs_error(p, p) == 0


def test_errors_are_those_of_the_scores() -> None:
    """Of sure answers the probabilities hardly change, however much the scores do."""
    a = SCORES.flatten(1) * 6
    a = a - a.mean(1, keepdim=True)
    b = a + torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    b = b - b.mean(1, keepdim=True)
    assert outputs_error(a.softmax(1), b.softmax(1)) == pytest.approx(outputs_error(a, b), rel=1e-3)
    # Probabilities in one part, and something else in another, are compared as they are.
    parts = [[a.softmax(1)], [a]], [[b.softmax(1)], [b]]
    assert error_of_parts(parts[0], parts[1]) == pytest.approx(outputs_error(a, b), rel=0.1)


def test_class_scores_of_probabilities_give_the_same_gradients() -> None:
    scores = SCORES[:, :, 0, 0].clone().requires_grad_()
    found = class_scores(scores.softmax(1), ExampleInputs.of(torch.zeros(6, 2)))
    assert found is not None
    target = torch.arange(6) % 5
    own, through = (
        torch.autograd.grad(nn.functional.cross_entropy(each, target), scores, retain_graph=True)[0]
        for each in (scores, found)
    )
    torch.testing.assert_close(through, own)


@pytest.mark.parametrize("settings", [{"restore": "prune"}, {"restore": lbyl.LeastSquares(lbyl.Noise(16))}, {}])
def test_a_softmax_at_the_end_changes_no_choice(settings: dict[str, object]) -> None:
    body = settle(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)))
    with torch.no_grad():
        # A softmax does not see what all scores have in common.
        for part in body[4].parameters():
            part.mul_(4).sub_(part.mean(0))
    x, budget = images(4, 6), lbyl.Budget(macs=0.5)
    plain, ended = (
        lbyl.compress(net, x, budget=budget, seed=1, **settings)  # pyright: ignore[reportCallIssue, reportArgumentType]
        for net in (body, nn.Sequential(*body, nn.Softmax(-1)))
    )
    assert [(row.group, row.after) for row in ended.report.rows] == [(r.group, r.after) for r in plain.report.rows]
    if settings.get("restore") == "prune":  # other restorers measure statistics of the scores in front of a softmax
        a, b = plain.report.forecast, ended.report.forecast
        assert a is not None
        assert b is not None
        assert (b.agreement, b.low, b.high) == pytest.approx((a.agreement, a.low, a.high), abs=1e-3)
        torch.testing.assert_close(ended.model(x), plain.model(x).softmax(-1), atol=1e-5, rtol=1e-4)
