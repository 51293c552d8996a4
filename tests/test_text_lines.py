"""Images of text as probes: what they look like, and that networks get them that answer to text and to little else."""

from __future__ import annotations

import pytest
import torch
from nets import settle
from torch import Tensor, nn

import lbyl
from lbyl.errors import InputError
from lbyl.moments.photographs import photographs, pictures
from lbyl.moments.text_lines import text_lines
from lbyl.runtime.inputs import ExampleInputs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(48, 320), (64, 64), (16, 20)])
def test_images_have_the_size_asked_for_and_unit_variance(size: tuple[int, int]) -> None:
    images = text_lines((9, 3, *size), generator())
    assert images.shape == (9, 3, *size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)
    assert torch.equal(images, text_lines((9, 3, *size), generator()))
    assert not torch.equal(images, text_lines((9, 3, *size), generator(1)))


def test_a_long_image_holds_one_line_across_its_height() -> None:
    images = text_lines((40, 3, 48, 320), generator()).mean(1)
    # Ink makes columns differ from one another in the middle, and hardly at the upper edge.
    middle, edge = images[:, 18:30].std(2).mean(), images[:, :2].std(2).mean()
    assert middle > 2 * edge


def test_most_pages_are_dark_on_light() -> None:
    images = text_lines((60, 3, 96, 96), generator()).mean(1).flatten(1)
    # Less than half of a page is ink, so the mean lies on its side of the median.
    dark = images.mean(1) < images.median(1).values
    assert 0.6 < dark.double().mean() < 0.9


@pytest.mark.parametrize("shape", [(8, 3, 48, 200), (8, 48, 200, 3)])
def test_a_share_of_photographs_gives_way_to_text(shape: tuple[int, ...]) -> None:
    none, half, whole = (pictures(share)(shape, generator()) for share in (0.0, 0.5, 1.0))
    assert torch.equal(none, photographs(shape, generator()))
    same = [int((made == none).flatten(1).all(1).sum()) for made in (half, whole)]
    assert same == [4, 0]
    assert half.shape == whole.shape == torch.Size(shape)


class Reader(nn.Module):
    """Answers to long images whose upper edge is plain and whose middle is not, as where a line of text stands."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        gray = x.mean(1)
        told = torch.sigmoid(40 * (gray[:, 18:30].std(2).mean(1) - 2.5 * gray[:, :3].std(2).mean(1)))
        return told[:, None] * self.body(x).mean((2, 3))


def test_who_answers_to_text_alone_gets_text_and_is_told() -> None:
    x = torch.zeros(1, 3, 48, 320)
    reader, plain = settle(Reader()), settle(Reader().body)
    source = lbyl.Photographs(images=16)
    read, seen, asked = (
        each.probes(net, ExampleInputs.of(x), generator(), None)
        for each, net in ((source, reader), (source, plain), (lbyl.Photographs(images=16, text=0.0), reader))
    )
    assert "75% of the probes are lines of text" in read.note
    assert not seen.note
    assert not asked.note
    assert torch.equal(seen.batches[0].tensors()[0], asked.batches[0].tensors()[0])
    same = (read.batches[0].tensors()[0] == seen.batches[0].tensors()[0]).flatten(1).all(1)
    assert int(same.sum()) <= 8
    result = lbyl.compress(reader, x, ratio=0.25, forecast=False)
    assert any("lines of text" in note for note in result.report.notes)


class Director(nn.Module):
    """Answers to a mark in the first corner of an image: to which way up it is, and to little else."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        told = _upright(x) - 0.5
        return told[:, None] * (1 + self.body(x).mean((2, 3)) / 100)


def _upright(x: Tensor) -> Tensor:
    """1 for images that are marked in their first corner, and 0 for the others."""
    return (x[:, :, 0, 0].abs().amax(1) > _MARK).to(x.dtype)


_MARK = 50.0


def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws text with a mark in its first corner, so that a network can tell which way up it is."""

    def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        images = text_lines(shape, generator)
        images[:, :, 0, 0] = 2 * _MARK
        return images

    monkeypatch.setattr("lbyl.moments.photographs.text_lines", drawn)


def test_who_tells_which_way_up_text_is_gets_half_of_it_upside_down(monkeypatch: pytest.MonkeyPatch) -> None:
    marked(monkeypatch)
    x, net = torch.zeros(1, 3, 48, 320), settle(Director())
    read = lbyl.Dream(images=16, steps=1).probes(net, ExampleInputs.of(x), generator(), None)
    assert "half of it upside down" in read.note
    crops = torch.cat([read.batches[number].tensors()[0] for number in read.recalibration_batches])
    over = (crops[:, :, -1, -1].abs().amax(1) > _MARK).sum()
    assert 0.3 * len(crops) < int(over) < 0.45 * len(crops)
    result = lbyl.compress(net, x, ratio=0.25, forecast=False)
    assert any("upside down" in note for note in result.report.notes)


def test_a_share_of_text_is_upside_down() -> None:
    shape = (8, 3, 48, 200)
    upright, turned = (pictures(1.0, share)(shape, generator()) for share in (0.0, 0.5))
    over = (turned == upright.flip(2, 3)).flatten(1).all(1)
    assert int(over.sum()) == 4
    assert torch.equal(turned[~over], upright[~over])


@pytest.mark.parametrize("text", [-0.1, 1.5, float("nan"), "much"])
def test_a_share_is_a_number_from_0_to_1(text: float) -> None:
    with pytest.raises(InputError, match=r"Photographs\(text="):
        lbyl.Photographs(text=text)


def test_another_default_type_of_numbers_changes_nothing() -> None:
    made = text_lines((2, 3, 32, 100), generator())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(text_lines((2, 3, 32, 100), generator()), made)
    finally:
        torch.set_default_dtype(torch.float32)
