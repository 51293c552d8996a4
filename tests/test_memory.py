"""What activations take, that no more of them are held than was asked for, and how their statistics are measured."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import room_for, settle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lbyl
from lbyl.moments import Probes
from lbyl.restore.least_squares.fit import make_probes
from lbyl.runtime import memory
from lbyl.runtime.batches import first_rows, in_parts, thinned
from lbyl.runtime.forward import run_intercepted
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import ROOM, InputsForgotten, available_bytes, give_back, held_bytes, saved_bytes
from lbyl.runtime.output_error import error_of_parts, outputs_error


def network() -> nn.Sequential:
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )


def images(count: int, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def batches(*sizes: int) -> list[ExampleInputs]:
    return [ExampleInputs.of(part) for part in images(sum(sizes)).split(sizes)]


def rows(parts: list[ExampleInputs] | tuple[ExampleInputs, ...]) -> list[int]:
    return [len(part.tensors()[0]) for part in parts]


def test_what_a_forward_pass_holds_at_once() -> None:
    # What the second convolution gives, and that normalized; what it read is gone by then.
    assert held_bytes(network(), ExampleInputs.of(images(1))) == 2 * 12 * 16 * 16 * 4
    assert held_bytes(network().double(), ExampleInputs.of(images(2).double())) == 2 * 12 * 16 * 16 * 8


class Skipping(nn.Module):
    """Its input waits for its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x.view_as(x) + self.last(torch.relu_(self.inner(x)))


def test_what_waits_for_a_layer_far_behind_is_held() -> None:
    # The stream, what goes into it, and the sum; views and what is done in place take nothing.
    assert held_bytes(Skipping(), ExampleInputs.of(images(1))) == (8 + 8 + 8) * 16 * 16 * 4


def test_what_is_saved_for_backward_passes_goes_with_the_pixels_and_not_with_the_weights() -> None:
    one, three, larger = (
        saved_bytes(network(), ExampleInputs.of(images(n, side))) for n, side in [(1, 16), (3, 16), (1, 32)]
    )
    # What both batch norms read and what both activations gave.
    assert one == pytest.approx((8 + 12) * 2 * 16 * 16 * 4, rel=0.02)
    assert three == pytest.approx(one, rel=0.02), "of each"
    assert larger == pytest.approx(4 * one, rel=0.02)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(768, 4096), nn.BatchNorm1d(4096)).eval()
    assert saved_bytes(wide, ExampleInputs.of(images(1))) < wide[1].weight.numel() * 4 / 10


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 8])
def test_gradients_to_the_inputs_need_no_inputs(layout: torch.memory_format, groups: int) -> None:
    layers = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups), nn.SiLU(), nn.Conv2d(8, 4, 1)
    net = nn.Sequential(*layers).requires_grad_(False)
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    found = []
    for mode in (nullcontext(), InputsForgotten()):
        pixels = x.clone().requires_grad_()
        with mode:
            loss = net(pixels).square().sum()
        found.append(torch.autograd.grad(loss, pixels)[0])
    assert torch.equal(*found)


def test_weights_that_ask_for_gradients_get_them() -> None:
    net, x = nn.Conv2d(3, 4, 3), images(2)
    found = []
    for mode in (nullcontext(), InputsForgotten()):
        with mode:
            loss = net(x).square().sum()
        found.append(torch.autograd.grad(loss, net.weight)[0])
    assert torch.equal(*found)


def test_counting_leaves_the_model_as_it_was() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    saved_bytes(net, ExampleInputs.of(images(2)))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_counting_keeps_nothing() -> None:
    """What sigmoids give is kept for the backward pass of the same sigmoids."""
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 1), nn.Sigmoid()))
    made: list[weakref.ref[Tensor]] = []
    for layer in net:
        layer.register_forward_hook(lambda module, args, out: made.append(weakref.ref(out)))
    saved_bytes(net, ExampleInputs.of(images(2)))
    gc.collect()
    assert len(made) == 5
    assert not any(ref() is not None for ref in made)


@pytest.mark.parametrize(
    ("size", "most", "parts"), [(10, 4, [4, 3, 3]), (8, 8, [8]), (9, 8, [5, 4]), (3, 0, [1, 1, 1])]
)
def test_a_batch_in_parts(size: int, most: int, parts: list[int]) -> None:
    made = in_parts(batches(size)[0], most)
    assert rows(made) == parts
    assert torch.equal(torch.cat([part.tensors()[0] for part in made]), images(size))


def test_parts_are_not_smaller_than_asked_for() -> None:
    assert rows(in_parts(batches(11)[0], 4, least=4)) == [6, 5]
    assert rows(in_parts(batches(3)[0], 2, least=4)) == [3]


def test_rows_are_thinned_evenly_in_every_batch() -> None:
    found = thinned(batches(40, 20), 30)
    assert rows(found) == [20, 10]
    assert torch.equal(found[0].tensors()[0], images(60)[:40:2])
    assert rows(thinned(batches(40, 20), 60)) == [40, 20]
    assert thinned(batches(40, 20), 11) == []


def test_what_is_no_batch_is_whole_in_every_part() -> None:
    table = torch.arange(5)
    both = ExampleInputs.of((images(32), table))
    for part in [*in_parts(both, 10), *thinned([both], 16), first_rows(both)]:
        assert torch.equal(part.args[1], table)
    assert len(first_rows(both).args[0]) == 2
    assert len(first_rows(ExampleInputs.of(images(1))).args[0]) == 1


def test_thinned_rows_keep_their_layout() -> None:
    first = ExampleInputs.of(images(32).contiguous(memory_format=torch.channels_last))
    assert thinned([first], 16)[0].tensors()[0].is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Given:
    """A source of probes that are there already."""

    made: Probes

    def probes(self, model: object, inputs: object, generator: object, progress: object) -> Probes:
        return self.made


def test_batches_are_cut_to_what_memory_holds() -> None:
    made = Probes(
        tuple(batches(40, 12, 30)), batches(4)[0], True, recalibration_batches=(1, 2), evaluation_batches=(2,)
    )
    room = room_for(15, held_bytes(network(), ExampleInputs.of(images(1))))

    def found(memory: int) -> Probes:
        settings = lbyl.LeastSquares(Given(made), memory=memory, attach_norms=False)
        return make_probes(network(), ExampleInputs.of(images(1)), settings, 0)

    cut = found(room)
    assert rows(cut.batches) == [14, 13, 13, 12, 15, 15]
    assert (cut.recalibration_batches, cut.evaluation_batches) == ((3, 4, 5), (4, 5))
    assert found(ROOM) is made
    assert min(rows(found(1).batches)) == 4, "the statistics of less would tell too little"


def test_dreams_are_made_as_many_at_a_time_as_memory_holds() -> None:
    net, x = network(), ExampleInputs.of(images(1))
    room = room_for(10, saved_bytes(net, x))

    def sizes(**settings: int) -> list[int]:
        dream = lbyl.Dream(images=32, photographs=False, **settings)
        return rows(dream.probes(net, x, torch.Generator().manual_seed(0), None).batches)[:-1]

    assert sizes(steps=1) == [32]
    assert sizes(steps=1, memory=room) == [8, 8, 8, 8]
    assert sizes(steps=1, memory=1) == [4] * 8, "fewer would be too few for statistics of their own"
    assert sizes(steps=0, memory=1) == [32], "without steps nothing is kept for backward passes"


def test_held_out_dreams_come_in_batches_of_their_own() -> None:
    net, x = network(), ExampleInputs.of(images(1))
    made: list[int] = []

    class Noted(lbyl.Dream):
        def match(self, model: nn.Module, start: ExampleInputs, *args: Any) -> ExampleInputs:
            made.append(len(start.tensors()[0]))
            return super().match(model, start, *args)

    room = room_for(10, saved_bytes(net, x))
    held = Noted(32, 1, photographs=False, memory=room).probes(net, x, torch.Generator().manual_seed(0), None).held_out
    assert made == [8, 8, 8, 8, 8]
    assert rows([held]) == [8]
    Noted(5, 1, photographs=False).probes(net, x, torch.Generator().manual_seed(0), None)
    assert made[5:] == [5, 4]


class Insisting(nn.Module):
    """Takes images of one size."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.body, self.last = network()[:-2], nn.Linear(4 * side**2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x).flatten(1))


def test_images_of_which_not_even_four_fit_are_made_smaller() -> None:
    x = ExampleInputs.of(images(1, 160))
    for net, side, told in (
        (network(), 96, "probes of 96x96 pixels in place of 160x160: 4 dreams"),
        (Insisting(160), 160, "4 dreams"),
    ):
        dream = lbyl.Dream(8, 1, memory=room_for(2, saved_bytes(net, x)))
        made = dream.probes(settle(net), x, torch.Generator().manual_seed(0), None)
        assert {tuple(batch.tensors()[0].shape[1:]) for batch in (*made.batches, made.held_out)} == {(3, side, side)}
        assert made.note.startswith(told)
        assert "more than Dream(memory=...) allows" in made.note
    assert not lbyl.Dream(8, 1).probes(network(), x, torch.Generator().manual_seed(0), None).note


def test_errors_are_the_same_whatever_memory_they_are_measured_in() -> None:
    net = network()
    source = lbyl.Data([images(40), images(24)[:, :, :, :16]], batches=2)
    restore = lbyl.LeastSquares(source, sequential=False, renorm=False)
    whole, parts = (
        lbyl.compress(net, images(1), ratio=0.5, restore=replace(restore, memory=memory), forecast=False)
        for memory in (ROOM, 1)
    )
    assert whole.report.assessment
    assert parts.report.assessment
    assert parts.report.assessment.restored == pytest.approx(whole.report.assessment.restored, rel=1e-4)
    with torch.no_grad():
        assert outputs_error(whole.model(images(8)), parts.model(images(8))) < 1e-4


class Widest(TorchDispatchMode):
    """Notes how large the largest tensor in float64 is."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
                self.most = max(self.most, leaf.numel())
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_logits_of_a_large_vocabulary_are_compared_without_copies_of_all(masked: bool) -> None:
    a, b = torch.randn(2, 48, 4, 30_000)
    if masked:
        a[0, 0] = -torch.inf
    with Widest() as seen:
        whole = outputs_error(a, b)
    assert whole == pytest.approx(1, abs=0.01)
    assert seen.most < a.numel()
    assert error_of_parts([[a[:20]], [a[20:]]], iter([[b[:20]], [b[20:]]])) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("make", [lambda: lbyl.LeastSquares(memory=0), lambda: lbyl.Dream(memory=-1)])
def test_no_memory_at_all_is_refused(make: type) -> None:
    with pytest.raises(lbyl.InputError, match=r"memory=.*at least 1 byte"):
        make()


def test_giving_memory_back_is_harmless() -> None:
    kept = images(4)
    give_back()
    assert torch.equal(kept, images(4))


def test_memory_is_given_back_after_every_batch_of_dreams(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=asked.append))
    net, x = network(), ExampleInputs.of(images(1))
    dream = lbyl.Dream(images=32, photographs=False, steps=1, memory=room_for(10, saved_bytes(net, x)))
    dream.probes(net, x, torch.Generator().manual_seed(0), None)
    assert asked == [0] * 5 * (sys.platform == "linux")


_CHURNED = """
import resource, torch
from torch import nn
from lbyl.runtime import memory

memory.available_bytes = lambda: 2**40
torch.set_num_threads(1)
net, x = nn.Linear(1, 1), torch.zeros(2**23)

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        x + 1
        memory.give_back()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

anew = pages()
with memory.reused_memory(net):
    pages()
    again = pages()
print(anew, again, pages())
"""


@pytest.mark.posix
def test_freed_memory_is_used_again_without_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", _CHURNED], check=True, capture_output=True, text=True)
    anew, again, afterwards = map(int, done.stdout.split())
    assert again < anew / 10 or sys.platform != "linux"
    assert afterwards > anew / 2, "everything is as before afterwards"


@pytest.mark.parametrize(
    ("available", "weights", "room", "kept"),
    [
        (2**40, 8, ROOM, True),
        (2**40, 8, ROOM - 1, False),
        (2**40, ROOM // 4, ROOM, False),
        (3 * ROOM, 8, ROOM, False),
    ],
    ids=["plenty", "less was asked for", "large weights", "little is available"],
)
def test_freed_memory_is_only_kept_where_there_is_plenty(
    monkeypatch: pytest.MonkeyPatch, available: int, weights: int, room: int, kept: bool
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=asked.append))
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    net = nn.Module()
    net.register_buffer("weights", torch.empty(weights, dtype=torch.uint8, device="meta"))
    with memory.reused_memory(net, room):
        give_back()
    assert len(asked) == (sys.platform == "linux"), "at the end, or at once"
    asked.clear()
    with memory.reused_memory(net, room):
        monkeypatch.setattr(memory, "available_bytes", lambda: ROOM)
        give_back()
    assert len(asked) == (1 + kept) * (sys.platform == "linux"), "others need it"


def test_what_is_available_is_what_the_system_and_the_container_allow(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     4096 kB\n")
    assert available_bytes(tmp_path) == 2**22
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert available_bytes(tmp_path) == 2**22
    (group / "memory.max").write_text("5000\n")
    assert available_bytes(tmp_path) == 4000
    (group / "memory").mkdir()
    (group / "memory/memory.limit_in_bytes").write_text("3000")
    (group / "memory/memory.usage_in_bytes").write_text("4000")
    assert available_bytes(tmp_path) == 0


_WEIGHED = """
import resource, sys, torch
from torch import nn
import lbyl

torch.set_num_threads(1)  # each would have buffers of its own

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def compressed(width, out):
    body = nn.Conv2d(3, width, 4), nn.BatchNorm2d(width), nn.ReLU()
    net = nn.Sequential(*body, nn.Flatten(), nn.Linear(25 * width, out))
    restore = lbyl.LeastSquares(lbyl.Noise(8), budget=2**20)
    lbyl.compress(net.eval(), torch.randn(1, 3, 8, 8), ratio=0.5, restore=restore, forecast=False)
    return sum(p.numel() * 4 for p in net.parameters())

compressed(8, 8)
before = peak()
model = compressed(256, 4096)
print((peak() - before) / model)
"""


@pytest.mark.posix
def test_large_weights_are_not_copied_more_often_than_needed() -> None:
    """The model, its new weights, and plain pruning to compare with; and a little for what libraries need."""
    done = subprocess.run([sys.executable, "-c", _WEIGHED], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 3.4


@pytest.mark.parametrize("shape", [(6, 5), (1, 5), (4, 5, 7), (3, 5, 4, 6), (2, 5, 3, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_at_batch_norms_are_mean_and_variance_and_can_be_differentiated(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    net = kinds[len(shape)](5).eval().to(dtype)
    x = (3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    dims = [dim for dim in range(len(shape)) if dim != 1]

    def measured(x: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def on_norm(_: str, __: str, mean: Tensor, var: Tensor) -> None:
            seen.extend((mean, var))

        run_intercepted(net, ExampleInputs.of(x), on_norm=on_norm)
        return seen[0], seen[1]

    mean, var = measured(x)
    within = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(mean, x.mean(dims), rtol=within, atol=within)
    torch.testing.assert_close(var, x.var(dims, unbiased=False), rtol=within, atol=within)
    assert mean.dtype is var.dtype is dtype
    if dtype is torch.float64:
        torch.autograd.gradcheck(measured, x.requires_grad_())
