"""Consumers solved in turn: what each is asked for, that it keeps the residual sum, and who chooses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import nets
import pytest
import torch
from nets import room_for, settle
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl
from lbyl.moments import Probes
from lbyl.restore.least_squares.paired_forward import ConsumerDue, NotPairable, PairedPass, run_paired
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import held_bytes


class Block(nets.Block):
    """A basic block that adds in place, and whose shortcut runs after the convolutions, as in torchvision."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 12, 2), Block(12, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def residual(seed: int = 0) -> Residual:
    return settle(Residual(), seed)


def images(count: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


READERS = [f"blocks.{number}.conv2.weight" for number in range(4)]


def walk(
    net: nn.Module,
    batches: list[Tensor],
    values: dict[str, Tensor],
    solve: Callable[[ConsumerDue], None],
    consumers: list[str] | None = None,
    **settings: bool,
) -> PairedPass:
    settings = {"batch_statistics": False, "renorm": False, **settings}
    inputs = [ExampleInputs.of(batch) for batch in batches]
    with torch.no_grad():
        return run_paired(net, inputs, READERS if consumers is None else consumers, values, solve, **settings)


def conv1_scaled(net: nn.Module) -> dict[str, Tensor]:
    """The stem half as loud: every sum from the first one on loses something."""
    return {"stem.0.weight": net.get_parameter("stem.0.weight").detach() * 0.5}


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_a_reader_is_asked_for_what_keeps_the_sum(batch_statistics: bool) -> None:
    """If it gave exactly what it is asked for, the sum would be the original one."""
    net, batches = residual(), [images(10), images(7, seed=2)]
    values = conv1_scaled(net)
    turns: list[ConsumerDue] = []
    walked = walk(net, batches, values, turns.append, batch_statistics=batch_statistics)
    assert [turn.calls[0].weight for turn in turns] == READERS == list(walked.made_up)
    for batch, turn in zip(batches, zip(turns[0].calls, turns[0].wanted, strict=True), strict=True):
        call, wanted = turn

        def stem(x: Tensor, weight: Tensor, batch_statistics: bool = batch_statistics) -> tuple[Tensor, ...]:
            y, bn = F.conv2d(x, weight, padding=1), net.stem[1]
            var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
            return (mean, var) if batch_statistics else (bn.running_mean, bn.running_var), y, bn

        with torch.no_grad():
            statistics, y, bn = stem(batch, net.stem[0].weight)
            changed = stem(batch, values["stem.0.weight"])[1]
            before, after = (
                F.relu(F.batch_norm(t, *statistics, bn.weight, bn.bias, False, 0.0, bn.eps)) for t in (y, changed)
            )
            bn = net.blocks[0].bn2
            spread = call.out.var((0, 2, 3), unbiased=False) if batch_statistics else bn.running_var
            gain = (bn.weight / (spread + bn.eps).sqrt()).reshape(-1, 1, 1)
            torch.testing.assert_close(gain * (wanted - call.out), before - after, rtol=1e-4, atol=1e-5)


def test_the_cut_network_runs_as_it_would_alone() -> None:
    """What later consumers are fed is what the network gives with the values as they are by then."""
    net, batch = residual(), images(9)
    generator = torch.Generator().manual_seed(3)
    values: dict[str, Tensor] = {}
    fed: dict[str, Tensor] = {}

    def solve(turn: ConsumerDue) -> None:
        name = turn.calls[0].weight
        fed[name] = turn.calls[0].x.clone()
        weight = net.get_parameter(name).detach()
        values[name] = weight + 0.1 * torch.randn(weight.shape, generator=generator)

    walk(net, [batch], values, solve)

    def on_consumer(call: ConsumerCall) -> None:
        if call.weight in fed:
            torch.testing.assert_close(call.x, fed.pop(call.weight), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        run_intercepted(net, ExampleInputs.of(batch), values=values, on_consumer=on_consumer)
    assert not fed


def test_renorm_on_the_way_gives_each_norm_its_trained_spread_back() -> None:
    net, batch = residual(), images(16)
    walked = walk(net, [batch], conv1_scaled(net), lambda turn: None, batch_statistics=True, renorm=True)
    names = "stem.1.running_mean", "stem.1.running_var"
    torch.testing.assert_close(walked.cut[names][0], 0.5 * walked.original[names][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(walked.cut[names][1], 0.25 * walked.original[names][1], rtol=1e-3, atol=1e-4)


def test_outputs_do_not_wait_for_the_garbage_collector() -> None:
    """They are the largest tensors there are, for all probes are in one batch, twice."""
    outputs: list[weakref.ref[torch.UntypedStorage]] = []
    gc.disable()
    try:
        walk(
            residual(),
            [images(4)],
            {},
            lambda turn: outputs.append(weakref.ref(turn.calls[0].out.untyped_storage())),
            batch_statistics=True,
            renorm=True,
        )
        assert len(outputs) == len(READERS)
        assert all(each() is None for each in outputs)
    finally:
        gc.enable()


def restored(net: nn.Module, x: Tensor, sequential: bool | None, **settings: object) -> lbyl.Result:
    data = lbyl.Data([x, images(16, seed=9)], batches=2)
    settings = {"ridge": 1e-2, **settings}
    restore = lbyl.LeastSquares(data, sequential=sequential, **settings)  # pyright: ignore[reportArgumentType]
    return lbyl.compress(net, x[:1], ratio=0.5, criterion="l2", restore=restore, forecast=False)


@pytest.mark.parametrize(("renorm", "share"), [(False, 0.9), (True, 1.0)])
def test_the_sums_are_nearer_to_what_they_were(renorm: bool, share: float) -> None:
    net, x = residual(), images(96)
    gaps = []
    for sequential in (True, False):
        model = restored(net, x, sequential, renorm=renorm).model
        with torch.no_grad():
            expected, found = (m.blocks(m.stem(x)) for m in (net, model))  # pyright: ignore[reportCallIssue]
        gaps.append(float((found - expected).square().mean() / expected.var()))
    assert gaps[0] < share * gaps[1]


def test_the_average_is_kept_unless_another_is_clearly_better_and_the_report_says_so() -> None:
    net, seen = residual(), set()
    for count, ridge in ((12, 1e-2), (24, 0.3), (96, 3.0)):
        results = [restored(net, images(count), sequential, ridge=ridge) for sequential in (None, True, False)]
        free, turned, at_once = (result.model.state_dict() for result in results)
        halfway = {
            name: torch.lerp(at_once[name], turned[name], 0.5) for name in free if free[name].is_floating_point()
        }
        (note,) = (note for note in results[0].report.notes if "consumers solved" in note)
        errors = {way: error for way, error in results[0].report.held_out_errors.items() if way != "pruned"}
        assert set(errors) == {"all at once", "halfway between", "in turn"}
        for result, way in zip(results[1:], ("in turn", "all at once"), strict=True):
            assert set(result.report.held_out_errors) == {"pruned", way}
        for result in results:
            assert result.report.assessment
            assert result.report.held_out_errors["pruned"] == result.report.assessment.pruned
        told = [result.report.assessment.restored for result in results if result.report.assessment]
        assert told[1:] == pytest.approx([errors["in turn"], errors["all at once"]], rel=1e-2)
        best = min(errors, key=lambda way: errors[way])
        way = best if errors[best] < 0.97 * errors["halfway between"] else "halfway between"
        assert told[0] == pytest.approx(errors[way], rel=1e-2)
        for name, tensor in {"all at once": at_once, "in turn": turned, "halfway between": halfway}[way].items():
            torch.testing.assert_close(tensor, free[name], rtol=1e-5, atol=1e-6)
        assert f"consumers solved {way}: " in note
        assert results[0].plan.settings["restore"]["sequential"] is None
        assert not any("in turn" in note for note in results[2].report.notes)
        seen.add(way)
    assert len(seen) == 3


def test_where_nothing_is_measured_there_are_no_errors() -> None:
    assert lbyl.compress(residual(), images(1), ratio=0.5, restore="lbyl", forecast=False).report.held_out_errors == {}


def test_dreams_are_solved_on_in_turn_and_equal_seeds_give_equal_results() -> None:
    restore = lbyl.LeastSquares(lbyl.Dream(images=8, steps=2), sequential=True)
    first, second = (
        lbyl.compress(residual(), images(1), ratio=0.5, restore=restore, seed=4, forecast=False) for _ in range(2)
    )
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])
    assert any("in turn" in note for note in first.report.notes)


def test_where_there_is_no_sum_nothing_is_tried() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()))
    free, asked = (restored(net, images(), sequential) for sequential in (None, True))
    assert not any("turn" in note for note in free.report.notes)
    assert any("not solved in turn: no consumer of a pruned group is in" in note for note in asked.report.notes)
    for name, tensor in free.model.state_dict().items():
        assert torch.equal(tensor, asked.model.state_dict()[name])


def test_layers_in_between_learn_to_read_what_the_stream_has_become() -> None:
    """They lose no channels, and at once nobody touches them."""
    net, x = residual(), images(96)
    turned, at_once = (restored(net, x, sequential).model for sequential in (True, False))
    between = net.get_parameter("blocks.2.shortcut.0.weight")
    assert torch.equal(at_once.get_parameter("blocks.2.shortcut.0.weight"), between)
    with torch.no_grad():
        stream = net.blocks[:2](net.stem(x))
        cut = turned.blocks[:2](turned.stem(x))  # pyright: ignore

        def shortcut(weight: Tensor, stream: Tensor) -> Tensor:
            y = F.conv2d(stream, weight, stride=2)
            return y - y.mean((0, 2, 3), keepdim=True)

        expected = shortcut(between, stream)
        new = turned.get_parameter("blocks.2.shortcut.0.weight")
        gaps = [float((shortcut(weight, cut) - expected).square().mean()) for weight in (new, between)]
    assert gaps[0] < 0.97 * gaps[1]


def test_what_the_probes_leave_out_of_a_mean_is_told() -> None:
    """Half as loud a stem: where real inputs have a mean of 1, the change is one of -1/2; probes have a mean of 0."""
    net, x = residual(), images(64)
    with torch.no_grad():
        y = F.conv2d(x, net.stem[0].weight, padding=1)
        net.stem[1].running_mean.copy_(y.mean((0, 2, 3)) + 1)
    settings = {"batch_statistics": True, "renorm": True}
    walked = walk(net, [x], conv1_scaled(net), lambda turn: None, **settings)
    torch.testing.assert_close(walked.missing["stem.1.running_mean"].float(), torch.full((8,), -0.5), rtol=0.05, atol=0)
    assert not walk(net, [x], conv1_scaled(net), lambda turn: None, renorm=True).missing


class Spoiled(Residual):
    """Changes a consumer's input while its output waits for the sum."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        block = self.blocks[0]
        hidden = F.relu(block.bn1(block.conv1(x)))
        y = block.conv2(hidden)
        hidden.mul_(0.5)
        return self.fc((y + x).mean((2, 3))[:, [0] * 12])


class Sideways(Residual):
    """Its rows are no probes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x[:1]]))


class Flattened(Residual):
    """Each image gives several rows: its columns of pixels, as tokens or windows that are flattened into the batch."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.mixed = mixed
        self.inside = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.stem(x)).mean(2).transpose(1, 2)
        rows = tokens.transpose(0, 1) if self.mixed else tokens
        flat = rows.reshape(-1, 12)
        flat = flat + self.inside(flat)
        tokens = flat.reshape(rows.shape)
        return self.fc(tokens.mean(0 if self.mixed else 1))


def test_layers_that_see_several_rows_of_each_input_are_solved_as_well() -> None:
    net, names = settle(Flattened()), ["inside.0.weight", "inside.2.weight"]
    turns: list[ConsumerDue] = []
    walked = walk(net, [images(6), images(5, seed=2)], conv1_scaled(net), turns.append, names)
    assert [turn.calls[0].weight for turn in turns] == names
    assert walked.made_up == (names[1],)
    for turn in turns:
        rows = [len(call.x) for call in turn.calls]
        assert rows == [len(wanted) for wanted in turn.wanted]
        assert rows[0] / rows[1] == 6 / 5 < rows[0]
    # Each network's rows are its own: those of the original are what it gives by itself.
    alone: list[ConsumerCall] = []
    with torch.no_grad():
        run_intercepted(net, ExampleInputs.of(images(6)), on_consumer=alone.append)
    (expected,) = (call.out for call in alone if call.weight == names[0])
    torch.testing.assert_close(turns[0].calls[0].out, expected)


def test_rows_of_which_the_inputs_are_no_neighbors_are_told() -> None:
    with pytest.raises(NotPairable, match="rows of 12 probes"):
        walk(settle(Flattened(mixed=True)), [images(6)], {}, lambda turn: None, ["inside.0.weight"])


class Upsampled(Residual):
    """A transposed convolution reads the stream: it is solved, but not in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(12, 12, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.blocks(self.stem(x))).mean((2, 3)))


def test_what_has_changed_in_another_kind_of_layer_runs_once_for_each_network() -> None:
    net, batch = settle(Upsampled()), images(6)
    values = {"up.weight": 2 * net.up.weight.detach()}
    turns: list[ConsumerDue] = []
    walk(net, [batch], values, turns.append, ["fc.weight"])
    (call,) = turns[0].calls
    with torch.no_grad():
        stream = net.blocks(net.stem(batch))
        original, cut = (
            F.conv_transpose2d(stream, weight, net.up.bias, stride=2).mean((2, 3))
            for weight in (net.up.weight, values["up.weight"])
        )
        torch.testing.assert_close(call.x, cut)
        torch.testing.assert_close(call.out, net.fc(original))
    result = restored(net, images(24), None)
    assert any("consumers solved" in note for note in result.report.notes)


class Derived(Residual):
    """A weight that another one is computed from: there is no row of a probe in that call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc.weight.square().sum()


@pytest.mark.parametrize(
    ("kind", "says"),
    [(Derived, "fc.weight is also used by"), (Spoiled, "changed in place"), (Sideways, "rows of 8 probes")],
)
def test_a_network_that_can_not_be_run_twice_at_once_is_told(kind: type[Residual], says: str) -> None:
    net = settle(kind())
    with pytest.raises(NotPairable, match=says):
        walk(net, [images(4)], {"fc.weight": 2 * net.fc.weight.detach()}, lambda turn: None)


def test_probes_of_different_shapes_are_told() -> None:
    with pytest.raises(NotPairable, match="differ in shape"):
        walk(residual(), [images(4), images(4)[:, :, :6]], {}, lambda turn: None)


class Watched(Residual):
    """Notes what it is called with; copies of it note in the same place."""

    seen: ClassVar[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        Watched.seen.append(x)  # no copy, whose memory would count
        return super().forward(x)


@dataclass(frozen=True)
class Given:
    """A source of probes that are there already."""

    made: Probes

    def probes(self, model: object, inputs: object, generator: object, progress: object) -> Probes:
        return self.made


@pytest.mark.parametrize("rows", [24, 14])
def test_as_many_probes_are_taken_in_turn_as_memory_holds(rows: int) -> None:
    net = settle(Watched())
    room = room_for(rows, 2 * held_bytes(net, ExampleInputs.of(images(1))))
    Watched.seen.clear()
    restored(net, images(24), True, memory=room)
    # In turn, both networks run on all probes as one batch: nothing else runs on as many.
    assert max(len(x) for x in Watched.seen) == max(2 * rows, 24)
    assert sum(len(x) == 2 * rows for x in Watched.seen) == 1


def test_small_batches_of_a_kind_are_one_where_parts_of_them_would_be_too_small() -> None:
    net = settle(Watched())
    parts = [ExampleInputs.of(part) for part in images(32).split([5, 5, 6, 16])]
    probes = Probes(tuple(parts), parts[0], True, recalibration_batches=(3,), matches_training_statistics=True)
    room = room_for(16, 2 * held_bytes(net, ExampleInputs.of(images(1))))
    Watched.seen.clear()
    restore = lbyl.LeastSquares(Given(probes), memory=room, renorm=False)
    lbyl.compress(net, images(1), ratio=0.5, restore=restore, forecast=False)
    # Of 16 dreams and of as many of the others every second one, once for each network.
    (both,) = [x for x in Watched.seen if len(x) == 32]
    assert torch.equal(both, torch.cat([images(32)[::2]] * 2))


@pytest.mark.parametrize("sequential", [True, None])
def test_too_few_probes_for_solving_in_turn_are_solved_all_at_once(sequential: bool | None) -> None:
    result = restored(residual(), images(), sequential, memory=1000)
    assert any("not solved in turn: 0 MiB of memory hold 0" in note for note in result.report.notes)


@pytest.mark.parametrize(("ridge", "ways"), [(1e-2, {"in turn"}), (1e4, {"in turn", "halfway between", "all at once"})])
def test_what_is_clearly_better_in_turn_is_not_compared(ridge: float, ways: set[str]) -> None:
    """Nothing else is measured then; the solution is the one in turn."""
    net = settle(residual())
    parts = [ExampleInputs.of(part) for part in images(256).split(128)]
    probes = Probes(tuple(parts), ExampleInputs.of(images(16, seed=9)), True, matches_training_statistics=True)

    def result(sequential: bool | None) -> lbyl.Result:
        restore = lbyl.LeastSquares(Given(probes), ridge=ridge, sequential=sequential)
        return lbyl.compress(net, images(1), ratio=0.25, criterion="l2", restore=restore, forecast=False)

    free, asked = result(None), result(True)
    assert free.report.held_out_errors.keys() - {"pruned"} == ways
    assert asked.report.held_out_errors.keys() == {"pruned", "in turn"}
    assert free.report.held_out_errors["in turn"] == pytest.approx(asked.report.held_out_errors["in turn"])
    if ways == {"in turn"}:
        assert free.report.held_out_errors["in turn"] <= 0.75 * free.report.held_out_errors["pruned"]
        for name, tensor in free.model.state_dict().items():
            assert torch.equal(tensor, asked.model.state_dict()[name])


def test_nothing_is_solved_where_nothing_is_lost() -> None:
    """Of channels that were never active."""
    net = residual()
    for number in range(4):
        for name in ("conv1.weight", "bn1.weight", "bn1.bias"):
            net.get_parameter(f"blocks.{number}.{name}").data[:3] = 0
    parts = [ExampleInputs.of(part) for part in images(256).split(128)]
    probes = Probes(tuple(parts), ExampleInputs.of(images(16, seed=9)), True, matches_training_statistics=True)

    def result(count: int, restore: lbyl.Restorer | str) -> lbyl.Result:
        widths = enumerate((8, 8, 12, 12))
        ratio = {f"blocks.{number}.conv1": count / width for number, width in widths}
        return lbyl.compress(net, images(1), ratio=ratio, criterion="l1", restore=restore, forecast=False)

    restore = lbyl.LeastSquares(Given(probes))
    found, pruned, more = result(3, restore), result(3, "prune"), result(4, restore)
    assert any("nothing to restore" in note for note in found.report.notes)
    assert found.report.held_out_errors.keys() == {"pruned"}
    assert found.report.assessment is not None
    assert found.report.assessment.restored == found.report.assessment.pruned <= 1e-6
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, pruned.model.state_dict()[name])
    assert "in turn" in more.report.held_out_errors


class Decoded(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("wide", [16, 24])
def test_transposed_convolutions_keep_their_solution_in_the_pass(wide: int) -> None:
    """Their weights have the input dimension first; square ones were used transposed, and others ended the pass."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, wide, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(wide, 16, 4, 2, 1), Decoded(16)),
        nn.Conv2d(16, 2, 3, padding=1),
    ).eval()
    errors = lbyl.compress(net, torch.randn(1, 3, 16, 16), ratio=0.3, forecast=False).report.held_out_errors
    assert errors["in turn"] < errors["all at once"] < errors["pruned"]
