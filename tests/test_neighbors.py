"""Sums over the 3x3 patches of an input, which are taken without making patches, are those of the patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lbyl.moments import accumulate
from lbyl.moments.accumulate import Columns, Moments, PatchSums, WholeSums
from lbyl.moments.neighbors import add_patch_products, patch_sums, patch_targets
from lbyl.runtime.forward import ConsumerCall

SIZES = [(3, 10, 6, 5), (2, 3, 1, 1), (4, 2, 1, 7), (2, 9, 2, 2), (1, 8, 3, 1)]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def patches(x: Tensor) -> Tensor:
    """One row for each pixel."""
    return functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_products_and_sums_are_those_of_patches(size: tuple[int, ...], layout: torch.memory_format) -> None:
    x, r = drawn(*size).contiguous(memory_format=layout), drawn(size[0], 4, *size[2:])
    rows, targets = patches(x.double()), r.double().flatten(2).transpose(1, 2).flatten(0, 1)
    found = torch.zeros(9 * size[1], 9 * size[1], dtype=torch.float64)
    for _ in range(2):
        add_patch_products(found, x)
    torch.testing.assert_close(found, 2 * rows.T @ rows, rtol=1e-5, atol=1e-4)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(patch_sums(x), rows.sum(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(patch_targets(x, r).double(), rows.T @ targets, rtol=1e-5, atol=1e-4)


KEEP, DROP = torch.tensor([0, 1, 3, 4, 6, 7, 8, 9, 11]), torch.tensor([2, 5, 10])
"""Channels of each block."""


def call_of(blocks: int, fed: bool) -> tuple[ConsumerCall, Tensor]:
    """A call with several blocks of 12 channels, and its weight."""
    x, weight = drawn(5, 12 * blocks, 7, 6), drawn(4 * blocks, 12, 3, 3)
    out = functional.conv2d(x, weight, padding=1, groups=blocks)
    call = ConsumerCall("weight", "conv2d", x, out, (1, 1), (1, 1), (1, 1), drawn(*x.shape) if fed else None)
    return call, weight


def wide(call: ConsumerCall) -> ConsumerCall:
    """The call in float64, of which patches are made."""
    fed = None if call.fed is None else call.fed.double()
    return replace(call, x=call.x.double(), out=call.out.double(), fed=fed)


def assert_same(found: Moments, expected: Moments) -> None:
    assert found.count == expected.count
    for name in ("p", "r", "pp", "pr", "rr"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-3, msg=name)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("kind", ["lost", "fed", "wanted"])
@pytest.mark.parametrize("chunk", [16 * 2**20, 4096])
def test_sums_for_kept_channels(blocks: int, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulate, "_CHUNK_BYTES", chunk)
    call, weight = call_of(blocks, kind == "fed")
    wanted = drawn(*call.out.shape) if kind == "wanted" else None
    found, expected = (
        PatchSums(Columns((KEEP,) * blocks, (DROP,) * blocks), 20_000, torch.Generator()) for _ in range(2)
    )
    found.add(call, weight, wanted)
    expected.add(wide(call), weight.double(), None if wanted is None else wanted.double())
    for mine, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert_same(mine, theirs)


def test_sums_of_several_calls_that_are_joined() -> None:
    """Joined calls may give as many positions as all of them; where patches are made, they stay apart."""
    call, weight = call_of(1, fed=False)
    half = replace(call, x=call.x[:2], out=call.out[:2]), replace(call, x=call.x[2:], out=call.out[2:])
    wanted = drawn(*call.out.shape)
    for most, joined in (20, False), (40, True):
        sums = [PatchSums(Columns((KEEP,), (DROP,)), most, torch.Generator()) for _ in range(2)]
        assert sums[0].takes_all(call, weight, 2) == joined
        assert not sums[0].takes_all(call, weight, 1)
        if joined:
            sums[0].add(call, weight, wanted, joined=2)
            for each, part in zip(half, (wanted[:2], wanted[2:]), strict=True):
                sums[1].add(each, weight, part)
            assert_same(sums[0].blocks[0], sums[1].blocks[0])
            assert sums[0].blocks[0].count == 5 * 42


def test_sums_for_all_channels() -> None:
    call, weight = call_of(1, fed=False)
    found, expected = (WholeSums(1, 20_000, torch.Generator()) for _ in range(2))
    found.add(call, weight)
    expected.add(wide(call), weight.double())
    assert_same(found.blocks[0], expected.blocks[0])


@pytest.mark.parametrize("positions", [20_000, 30])
@pytest.mark.parametrize("changed", [{}, {"stride": (2, 2)}, {"padding": (0, 0)}, {"dilation": (2, 2)}])
def test_sums_of_layers_that_do_not_read_around_every_pixel(
    changed: dict[str, tuple[int, int]], positions: int
) -> None:
    """Strides, other pads and dilations, and samples of the pixels."""
    call, weight = call_of(1, fed=False)
    call = replace(call, **changed)
    call = replace(call, out=functional.conv2d(call.x, weight, None, call.stride, call.padding, call.dilation))
    found, expected = (PatchSums(Columns((KEEP,), (DROP,)), positions, torch.Generator()) for _ in range(2))
    found.add(call, weight)
    expected.add(wide(call), weight.double())
    assert found.blocks[0].count == 5 * min(call.out[0, 0].numel(), positions // 5)
    assert_same(found.blocks[0], expected.blocks[0])


def test_all_pixels_are_taken_where_they_are_four_times_as_many() -> None:
    """They take no more time than a sample. With more images, a sample is taken, as for other layers."""
    call, weight = call_of(1, fed=False)
    few, all_of_them, other = (PatchSums(Columns((KEEP,), (DROP,)), most, torch.Generator()) for most in (50, 55, 55))
    for sums in (few, all_of_them):
        sums.add(call, weight)
    other.add(wide(call), weight.double())
    assert [sums.blocks[0].count for sums in (few, all_of_them, other)] == [5 * 10, 5 * 42, 5 * 11]
