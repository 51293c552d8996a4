"""Least squares on probed moments: the solve, what it restores exactly, and what it must leave alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nets import settle
from torch import Tensor, nn
from torch.nn import functional

import lbyl
from lbyl.moments import dream as dreams
from lbyl.moments import synthesis
from lbyl.moments.accumulate import Columns, Moments, PatchSums, WholeSums
from lbyl.moments.synthesis import dead_leaves, pink, varied_pink
from lbyl.restore.least_squares import solve as solving
from lbyl.restore.least_squares.fit import measure
from lbyl.restore.least_squares.recalibrate import Look, expected_shift, recenter
from lbyl.restore.ridge import Prior, solve
from lbyl.runtime.batches import affordable, macs_per_input
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and batch-norm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return net.eval()


def conv_net(consumer: nn.Module | None = None) -> nn.Sequential:
    consumer = consumer or nn.Conv2d(12, 6, 3, padding=1, bias=False)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        consumer,
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def images(count: int = 16, side: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_the_solution_is_the_ridge_minimizer() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(200, 5, generator=generator, dtype=torch.float64) + 1
    r = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    moments = Moments.zeros(5, 3, p.device)
    moments.add(p[:120], r[:120])
    moments.add(p[120:], r[120:])
    found = solve(moments, 0.1, centered=True)
    x, y = p - p.mean(0), r - r.mean(0)
    strength = 0.1 * float((x.square().mean(0)).mean())
    expected = torch.linalg.solve(x.T @ x / 200 + strength * torch.eye(5).double(), x.T @ y / 200)
    torch.testing.assert_close(found.coefficients, expected)
    torch.testing.assert_close(found.shift, r.mean(0) - expected.T @ p.mean(0))
    torch.testing.assert_close(found.after, (y - x @ expected).square().mean(0))
    torch.testing.assert_close(found.before, y.square().mean(0))


def test_a_fully_trusted_prior_decides_alone() -> None:
    moments = Moments(1, torch.zeros(2), torch.zeros(1), torch.eye(2), torch.ones(2, 1), torch.ones(1))
    moments = Moments(1, *(t.double() for t in (moments.p, moments.r, moments.pp, moments.pr, moments.rr)))
    prior = Prior(torch.tensor([[4.0, 0], [0, 4]]).double(), torch.tensor([[8.0], [0]]).double(), 1.0)
    found = solve(moments, 0.0, centered=True, prior=prior)
    torch.testing.assert_close(found.coefficients, torch.tensor([[2.0], [0.0]]).double())


@pytest.mark.parametrize("how", ["patch", "mix"])
def test_copies_of_kept_channels_are_restored_exactly(how: str) -> None:
    net = randomize(conv_net())
    with torch.no_grad():
        for tensor in (net[0].weight, net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var):
            tensor[6:] = tensor[:6]
        net[0].weight[6:] *= 0.5  # smaller, so that the copies are what L2 drops
        net[1].running_mean[6:] *= 0.5
        net[1].running_var[6:] = (net[1].running_var[:6] + net[1].eps) * 0.25 - net[1].eps
    x = images()
    restore = lbyl.LeastSquares(lbyl.Data([x]), solve=how, ridge=1e-9, renorm=False)
    result = lbyl.compress(net, x[:1], ratio={"0": 0.5}, criterion="l2", restore=restore, forecast=False)
    fresh = images(seed=5)
    torch.testing.assert_close(result.model(fresh), net(fresh), rtol=1e-3, atol=1e-4)
    pruned = lbyl.compress(net, x[:1], ratio={"0": 0.5}, restore="prune", forecast=False)
    assert (pruned.model(fresh) - net(fresh)).abs().max() > 1e-2


READERS = {
    "strided": nn.Conv2d(12, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(12, 6, 3, dilation=2, bias=False),
    "same": nn.Conv2d(12, 6, (2, 3), padding="same"),
    "grouped": nn.Conv2d(12, 6, 3, padding=1, groups=3, bias=False),
    "pointwise strided": nn.Conv2d(12, 6, 1, stride=2, bias=False),
}


@pytest.mark.parametrize("name", READERS)
def test_the_reported_error_is_the_measured_one(name: str) -> None:
    """What the moments say is left of the error is what the consumer's output shows on the same inputs."""
    net = randomize(conv_net(READERS[name]))
    x = images()
    restore = lbyl.LeastSquares(lbyl.Data([x, x[:8]]), ridge=1e-2, renorm=False, positions=10**9)
    result = lbyl.compress(net, x[:1], ratio={"0": 0.5}, restore=restore, forecast=False)
    row = result.report.rows[0]
    assert row.errors is not None
    with torch.no_grad():
        hidden, smaller = net[:3](x), result.model[:3](x)
        expected, found = net[3](hidden), result.model[3](smaller)
        # Without a bias the shift is in the mean of the next batch norm.
        found = found - (result.model[4].running_mean - net[4].running_mean).reshape(1, -1, 1, 1)
    gap = (found - expected).square().sum() / (expected - expected.mean((0, 2, 3), keepdim=True)).square().sum()
    assert math.sqrt(float(gap)) == pytest.approx(row.errors[1], rel=1e-3)
    assert row.errors[1] < row.errors[0]


def test_flattened_readers_are_solved_column_by_column() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)))
    x = images(64, 6)
    for how in ("patch", "mix"):
        restore = lbyl.LeastSquares(lbyl.Data([x, x[:8]]), solve=how, prior=0.0)
        result = lbyl.compress(net, x[:1], ratio=0.5, restore=restore, forecast=False)
        pruned = lbyl.compress(net, x[:1], ratio=0.5, restore="prune", forecast=False)
        gap, lost = ((m(x) - net(x)).square().mean() for m in (result.model, pruned.model))
        assert gap < 0.5 * lost
        # The mean is kept exactly.
        torch.testing.assert_close(result.model(x).mean(0), net(x).mean(0), rtol=1e-3, atol=1e-3)


def test_a_reader_over_budget_is_mixed_and_the_report_says_so() -> None:
    restore = lbyl.LeastSquares(lbyl.Data([images()]), budget=1000)
    result = lbyl.compress(randomize(conv_net()), images(1), ratio={"0": 0.5}, restore=restore, forecast=False)
    assert "solved by mix" in result.report.rows[0].note


def test_batch_statistics_have_the_right_gradient() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    found: list[torch.Tensor] = []

    def gradient(x: torch.Tensor, out: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        loss = (
            (out * torch.linspace(0, 1, out.numel()).reshape(out.shape)).sum() + mean.exp().sum() + var.square().sum()
        )
        return torch.autograd.grad(loss, x)[0]

    x = images(4).requires_grad_(True)
    out = run_intercepted(
        net,
        ExampleInputs.of(x),
        on_norm=lambda _, __, m, v: found.extend((m, v)),
        batch_statistics=True,
    )
    seen = gradient(x, out, *found)
    hidden = net[0](x)
    var, mean = torch.var_mean(hidden, (0, 2, 3), unbiased=False)
    plain = functional.batch_norm(hidden, None, None, net[1].weight, net[1].bias, True, 0.0, net[1].eps)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(seen, gradient(x, plain, mean, var), rtol=1e-3, atol=1e-4)


def test_readers_see_their_padded_input() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(4 * 144, 2)))
    calls: list[ConsumerCall] = []
    run_intercepted(net, ExampleInputs.of(images(2)), on_consumer=calls.append, stop_after="0.weight")
    (call,) = calls
    assert call.x.shape == (2, 3, 14, 14)
    assert call.padding == (0, 0)


@pytest.mark.parametrize("source", [lbyl.Noise(images=8), lbyl.Dream(images=8, steps=2)])
def test_probing_leaves_the_model_alone(source: object) -> None:
    net = randomize(conv_net())
    net[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    asking = [p.requires_grad for p in net.parameters()]
    results = [
        lbyl.compress(net, images(1), ratio={"0": 0.5}, restore=lbyl.LeastSquares(source), seed=3, forecast=False)
        for _ in range(2)
    ]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [p.requires_grad for p in net.parameters()] == asking
    first, second = (result.model.state_dict() for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dreams_come_nearer_to_the_stored_statistics() -> None:
    net = randomize(conv_net())
    x = images(64) * 2 + 1
    net.train()
    for _ in range(60):
        net(x)
    net.eval()
    inputs = ExampleInputs.of(x[:1])

    def distance(steps: int) -> float:
        probes = lbyl.Dream(images=16, steps=steps).probes(net, inputs, torch.Generator().manual_seed(0), None)
        gaps: list[float] = []
        state = dict(net.named_buffers())

        def on_norm(mean_name: str, var_name: str, mean: torch.Tensor, var: torch.Tensor) -> None:
            gaps.append(float(((mean - state[mean_name]).square() / state[var_name]).mean()))

        with torch.no_grad():
            run_intercepted(net, probes.batches[0], on_norm=on_norm, batch_statistics=True)
        return sum(gaps)

    assert distance(60) < 0.5 * distance(0)


def test_as_many_probes_as_a_network_of_its_size_affords() -> None:
    limits = {"macs": 1.6e10, "least": 24, "most": 96, "ceiling": 1e11}
    small, middle, large, vast = (affordable(each, **limits) for each in (1e6, 4e8, 4e9, 1e11))
    assert (small, middle, large, vast) == (96, 40, 24, 4)


@pytest.mark.parametrize(("images", "steps"), [(16, 10), (127, 10), (128, 5), (191, 5)])
def test_many_dreams_take_half_of_the_steps(images: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, match = [], lbyl.Dream.match

    def watched(dream: lbyl.Dream, model: nn.Module, start: ExampleInputs, steps: int, *others: Any) -> ExampleInputs:
        made.append(steps)
        return match(dream, model, start, steps, *others)

    monkeypatch.setattr(lbyl.Dream, "match", watched)
    example = ExampleInputs.of(torch.zeros(1, 3, 6, 6))
    lbyl.Dream(images=images).probes(two_convolutions(4), example, torch.Generator().manual_seed(0), None)
    assert set(made) == {steps}


def two_convolutions(width: int) -> nn.Module:
    convs = [nn.Conv2d(inputs, width, 3, bias=False) for inputs in (3, width)]
    return randomize(nn.Sequential(convs[0], nn.BatchNorm2d(width), convs[1], nn.BatchNorm2d(width)))


def test_a_network_too_large_for_dreams_gets_fewer_steps_or_none_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the multiply-accumulates, and so little memory that dreams are small, make the test quick."""
    assert dreams._MOST == 1e13
    monkeypatch.setattr(dreams, "_MOST", 1e11)

    def notes(net: nn.Module, side: int, allowed: float, steps: int | None = None) -> str:
        """What is said of so many dreams that this many steps are allowed."""
        inputs = ExampleInputs.of(torch.zeros(1, 3, side, side))
        count = int(1e11 / (3 * macs_per_input(net, inputs) * allowed))
        dream = lbyl.Dream(images=count, steps=steps, memory=62_500)
        return dream.probes(net, inputs, torch.Generator().manual_seed(0), None).note

    net, fewer = two_convolutions(32), "probes of 64x64 pixels in place of 128x128: "
    assert notes(net, 128, 20).startswith(fewer)
    assert notes(net, 128, 7.5).startswith("only 7 steps of dreaming: ")
    assert notes(net, 128, 4.5, steps=2).startswith(fewer)
    assert notes(two_convolutions(64), 64, 4.5).startswith("pink noise in place of dreams: ")


def test_auto_follows_the_batch_norms_and_says_why() -> None:
    with_norm = lbyl.compress(randomize(conv_net()), images(1), ratio={"0": 0.5}, forecast=False)
    assert with_norm.plan.settings["restore"]["moments"]["name"] == "Dream"
    assert "batch norm" in with_norm.report.notes[0]
    mlp = randomize(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)))
    without = lbyl.compress(mlp, torch.randn(1, 6), ratio=0.5, forecast=False)
    assert without.plan.settings["restore"]["moments"]["name"] == "ClassDream"
    assert without.report.assessment is not None
    assert without.report.assessment.restored < without.report.assessment.pruned


def test_token_inputs_are_drawn_from_the_vocabulary() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(self.embed(tokens)))).mean(1)

    result = lbyl.compress(randomize(Bag()), torch.zeros(1, 5, dtype=torch.int64), ratio={"up": 0.5}, forecast=False)
    assert result.report.rows[0].after == 8
    assert result.report.assessment is not None
    assert 0 < result.report.assessment.restored < 1


def test_dead_channels_do_not_poison_renorm() -> None:
    net = randomize(conv_net())
    with torch.no_grad():
        net[3].weight[0] = 0  # a channel without variance
        net[4].running_var[0] = 1e-12
    result = lbyl.compress(
        net, images(1), ratio={"0": 0.5}, restore=lbyl.LeastSquares(lbyl.Noise(images=8)), forecast=False
    )
    assert all(bool(torch.isfinite(t).all()) for t in result.model.state_dict().values())


def test_the_expected_shift_of_a_linear_change_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    # Correlated outputs: a correction channel by channel would miss the terms across them.
    y = torch.randn(4000, 3, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.8, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    change = torch.tensor([[0.2, -0.4, 0.0], [0.0, 0.1, 0.3], [-0.5, 0.0, 0.2]]).double()
    gap = torch.tensor([1.0, -2.0, 0.5]).double()
    found = expected_shift(y, y + y @ change.T + 7.0, gap)
    torch.testing.assert_close(found, change @ gap, rtol=0.1, atol=0.05)
    assert (found - change.diagonal() * gap).abs().max() > 0.3
    # A change that does not go with the output says nothing, and no gap means no shift.
    noise = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    assert expected_shift(y, y + noise, gap).abs().max() < 0.2
    torch.testing.assert_close(expected_shift(y, y @ change.T, 0 * gap), torch.zeros(3).double())


def test_dead_outputs_shift_nothing() -> None:
    y = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    y[:, 1] = 0
    found = expected_shift(y, 0.5 * y, torch.ones(3))
    assert torch.isfinite(found).all()
    assert found[1] == 0
    assert torch.equal(expected_shift(0 * y, 0 * y, torch.ones(3)), torch.zeros(3).double())


def test_running_means_know_more_of_real_inputs_than_probes_do() -> None:
    """Probes whose outputs lie off the running mean: the shift of the mean is right all the same."""
    generator = torch.Generator().manual_seed(1)
    real, probe = (torch.randn(5000, 2, generator=generator) + offset for offset in (3.0, 1.0))
    shrink = torch.tensor([0.5, 0.9])  # what pruning did to each output
    state = {"mean": real.mean(0), "var": real.var(0)}

    def seen(outputs: torch.Tensor) -> Look:
        return Look({("mean", "var"): (outputs.double().mean(0), outputs.double().var(0))}, {"w": outputs})

    original, pruned = [seen(probe)] * 2, [seen(probe * shrink)] * 2
    relative = {"mean": state["mean"] + (probe * shrink - probe).mean(0)}
    corrected = recenter(relative, state, original, pruned, {"w": "mean"})["mean"]
    truth = (real * shrink).mean(0)
    assert (corrected - truth).abs().max() < 0.05
    assert (relative["mean"] - truth).abs().max() > 0.5


def test_gaussian_moments_match_the_closed_form_of_a_rectified_gaussian() -> None:
    net = randomize(conv_net(), seed=4)
    with torch.no_grad():
        net[1].weight.fill_(2.0)
        net[1].bias.fill_(0.5)
    from lbyl.graph import trace
    from lbyl.runtime.copying import tensors_of
    from lbyl.selection.filters import describe

    graph = trace(net, ExampleInputs.of(images(1)))
    moments = lbyl.Gaussian(samples=200_000).moments(describe(graph.group("0"), tensors_of(net)), (3, 3), "relu")
    z = 0.5 / 2.0
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    share = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert moments.mean.numpy() == pytest.approx(0.5 * share + 2 * density, abs=0.03)


# Some of the varied images are white on purpose.
@pytest.mark.parametrize(("make", "least"), [(pink, 0.5), (varied_pink, 0.2), (dead_leaves, 0.5)])
def test_synthetic_images_are_seeded_and_like_natural_ones(make, least: float) -> None:
    shape = (16, 3, 32, 32)
    a, b = (make(shape, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == shape
    assert 0.5 < float(a.std()) < 1.5
    neighbors = torch.corrcoef(torch.stack([a[..., 1:].flatten(), a[..., :-1].flatten()]))[0, 1]
    assert neighbors > least


@pytest.mark.parametrize("shape", [(3, 3, 8, 11), (40, 1, 12, 12)], ids=["boxes of one size", "of several"])
def test_leaves_painted_together_are_those_painted_one_by_one(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = dead_leaves(shape, torch.Generator().manual_seed(0))
    monkeypatch.setattr(synthesis, "_SMALL", 0)
    assert torch.equal(together, dead_leaves(shape, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lbyl.LeastSquares(solve="both"),
        lambda: lbyl.LeastSquares(ridge=-1.0),
        lambda: lbyl.LeastSquares(prior=2.0),
        lambda: lbyl.LeastSquares(moments="dream"),  # pyright: ignore
        lambda: lbyl.LeastSquares(lbyl.Gaussian(), sequential=True),
        lambda: lbyl.Noise(images=1),
        lambda: lbyl.Dream(steps=-1),
        lambda: lbyl.compress(
            conv_net(), images(1), restore=lbyl.LeastSquares(lbyl.Data([])), ratio=0.5, forecast=False
        ),
    ],
)
def test_bad_settings_are_refused(wrong) -> None:
    with pytest.raises(lbyl.InputError):
        wrong()


def test_long_kernels_with_many_channels_are_solved_by_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their patches have thousands of entries, and so have the systems to solve; here an eighth of that."""
    assert solving._MANY == 2048
    monkeypatch.setattr(solving, "_MANY", 256)
    torch.manual_seed(0)
    x = torch.randn(8, 1, 128)
    for taps, solved_by_mix in ((64, True), (25, False)):
        net = settle(nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, taps)))
        result = lbyl.compress(net, x, ratio=0.25, restore=lbyl.LeastSquares(moments=lbyl.Noise()), forecast=False)
        assert any(f"kernels are long ({taps} taps)" in row.note for row in result.report.rows) == solved_by_mix
        assert result.report.assessment
        assert result.report.assessment.restored < result.report.assessment.pruned


@pytest.mark.parametrize("seed", [2, 3, 5])
def test_a_restoration_that_raises_the_held_out_error_is_taken_back(seed: int) -> None:
    """Three probes can't tell 48 x 64 numbers: what fits them does harm elsewhere."""
    net = settle(nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    few = lbyl.LeastSquares(moments=lbyl.Noise(images=3), ridge=1e-9, prior=0)
    result = lbyl.compress(net, x, ratio=0.25, restore=few, forecast=False, seed=seed)
    assert result.report.assessment is not None
    assert result.report.assessment.restored <= result.report.assessment.pruned
    assert any("restoration left out" in note for note in result.report.notes)
    plain = lbyl.compress(net, x, ratio=0.25, restore="prune", forecast=False)
    assert torch.equal(result.model(x), plain.model(x))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(8, 6, 3, stride=2, padding=1), torch.randn(5, 8, 9, 7)),
        (nn.Conv2d(8, 6, 1, bias=False), torch.randn(5, 8, 4, 4)),
        (nn.Conv2d(8, 6, 3, groups=2, dilation=2), torch.randn(5, 8, 9, 9)),
        (nn.Conv1d(8, 6, 5), torch.randn(5, 8, 11)),
        (nn.Linear(8, 6), torch.randn(5, 7, 8)),
    ],
)
def test_a_part_of_a_reading_is_what_the_patches_alone_give(layer: nn.Module, x: torch.Tensor) -> None:
    calls: list[ConsumerCall] = []
    with torch.no_grad():
        run_intercepted(layer, ExampleInputs.of(x), on_consumer=calls.append)
    weight = layer.get_parameter("weight").detach()
    blocks = getattr(layer, "groups", 1)
    keep, drop = torch.tensor([0, 2, 3]), torch.tensor([1])
    if blocks == 1:
        drop = torch.tensor([1, 4, 5, 6, 7])
    # Fewer positions than there are: both must draw the same ones.
    alone = PatchSums(Columns((keep,) * blocks, (drop,) * blocks), 30, torch.Generator().manual_seed(3))
    whole = WholeSums(blocks, 30, torch.Generator().manual_seed(3))
    alone.add(calls[0], weight)
    whole.add(calls[0], weight)
    reading = whole.reading()
    assert reading is not None
    for number, (kernel, expected) in enumerate(zip(weight.chunk(blocks), alone.blocks, strict=True)):
        found = reading.part(number, kernel, keep, drop)
        assert found.count == expected.count > 0
        for name in ("p", "r", "pp", "pr", "rr"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(reading.output, alone.output, strict=True):
        assert torch.equal(ours, theirs)


def test_readers_without_room_for_their_reading_are_left_out() -> None:
    net = randomize(conv_net())
    graph = lbyl.inspect(net, images(1)).graph
    probes = lbyl.Noise(images=8).probes(net, ExampleInputs.of(images(1)), torch.Generator(), None)
    settings = lbyl.LeastSquares()
    one = (12 * 9) ** 2 * 8
    assert set(measure(net, graph, {0}, probes, settings, 0, one)) == {"3.weight"}
    assert measure(net, graph, {0}, probes, settings, 0, one - 1) == {}
    assert measure(net, graph, {0}, probes, lbyl.LeastSquares(solve="mix"), 0, one) == {}


def test_errors_of_outputs_with_a_large_mean_are_those_without_it() -> None:
    """Their variance is a difference of large sums."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
    restore = lbyl.LeastSquares(moments=lbyl.Data([x[:32], x[32:]], 2))
    found = []
    for bias in (0.0, 3000.0):
        nn.init.constant_(net[2].bias, bias)  # pyright: ignore[reportArgumentType]
        (row,) = lbyl.compress(net, x[:1], ratio=0.5, restore=restore, verify=False, forecast=False).report.rows
        assert row.errors
        found.append(row.errors)
    assert found[1] == pytest.approx(found[0], rel=1e-2)


class OnGraph(nn.Module):
    """A network on the nodes of a graph, of which no part stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        hidden = self.a(x).relu()
        return self.b(torch.zeros_like(hidden).index_add(0, target, hidden[source]))


def test_the_nodes_of_a_graph_are_not_split() -> None:
    generator = torch.Generator().manual_seed(0)
    graphs = [
        (torch.randn(20, 6, generator=generator), torch.randint(20, (2, 60), generator=generator)) for _ in range(6)
    ]
    torch.manual_seed(0)
    net = OnGraph().eval()
    result = lbyl.compress(net, graphs[0], ratio=0.5, restore=lbyl.LeastSquares(lbyl.Data(graphs)), forecast=False)
    assert result.report.assessment is not None
    assert result.report.assessment.restored < result.report.assessment.pruned
    budgeted = lbyl.compress(net, graphs[0], budget=lbyl.Budget(params=0.6), forecast=False)
    assert not any("can't restore" in note for note in budgeted.report.notes)
