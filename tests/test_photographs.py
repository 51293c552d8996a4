"""Photographs that come with the package: crops of them, where inputs are color images, and who made them."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch
from nets import settle
from torch import Tensor, nn

import lbyl
from lbyl.moments import Probes
from lbyl.moments.photographs import photographs, takes_photographs
from lbyl.moments.synthesis import dead_leaves
from lbyl.runtime.inputs import ExampleInputs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(16, 16), (33, 20), (400, 700)])
def test_crops_have_the_size_asked_for_and_unit_variance(size: tuple[int, int]) -> None:
    crops = photographs((9, 3, *size), generator())
    assert crops.shape == (9, 3, *size)
    torch.testing.assert_close(crops.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(crops.std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)


def test_every_photograph_is_used_and_no_crop_comes_twice() -> None:
    crops = photographs((64, 3, 32, 32), generator()).flatten(1)
    assert torch.equal(crops, photographs((64, 3, 32, 32), generator()).flatten(1))
    assert torch.pdist(crops).min() > 5
    # Two crops of one photograph look alike more often than crops of two.
    likeness = torch.corrcoef(crops.unflatten(1, (3, 32, 32)).mean((2, 3)))
    same = likeness.diagonal(32).mean()
    assert same > likeness[:32, :32].fill_diagonal_(0).sum() / (32 * 31)


def test_what_is_no_color_image_gets_scenes() -> None:
    for shape in [(4, 1, 32, 32), (4, 3, 8, 8), (4, 6)]:
        assert torch.equal(photographs(shape, generator()), dead_leaves(shape, generator()))
        assert not takes_photographs(ExampleInputs.of(torch.zeros(shape)))
    assert not takes_photographs(ExampleInputs.of(torch.zeros(1, 3, 32, 32, dtype=torch.int64)))


def test_every_photograph_has_a_source_and_a_license() -> None:
    folder = files("lbyl.moments") / "images"
    told = (folder / "SOURCES.md").read_text(encoding="utf-8")
    names = [file.name for file in folder.iterdir() if file.name.endswith(".jpg")]
    assert len(names) == 32
    for name in names:
        (row,) = [line for line in told.splitlines() if f"| {name} |" in line]
        assert "public domain" in row or "CC0" in row or "CC BY" in row


def dream(x: Tensor, **settings: bool) -> Probes:
    net = settle(nn.Sequential(nn.Conv2d(x.shape[1], 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    return lbyl.Dream(images=8, steps=1, **settings).probes(net, ExampleInputs.of(x), generator(), None)


def test_they_take_the_place_of_scenes_and_other_crops_are_held_out() -> None:
    probes = dream(torch.zeros(1, 3, 24, 24))
    assert [len(batch.tensors()[0]) for batch in probes.batches] == [8, 4, 4]
    assert probes.recalibration_batches == probes.evaluation_batches == (1, 2)
    crops = torch.cat([batch.tensors()[0] for batch in (*probes.batches[1:], probes.held_out)])
    assert len(crops) == 16
    torch.testing.assert_close(crops.std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("channels", "settings"), [(3, {"photographs": False}), (1, {})])
def test_without_them_dreams_are_held_out(channels: int, settings: dict[str, bool]) -> None:
    probes = dream(torch.zeros(1, channels, 24, 24), **settings)
    assert [len(batch.tensors()[0]) for batch in probes.batches] == [8, 8]
    assert (probes.recalibration_batches, probes.evaluation_batches) == ((1,), ())
    assert len(probes.held_out.tensors()[0]) == 4


def test_many_dreams_come_in_batches_and_what_is_held_out_may_be_more_than_one_of_them() -> None:
    net = settle(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    source = lbyl.Dream(images=600, steps=0)
    probes = source.probes(net, ExampleInputs.of(torch.zeros(1, 1, 4, 4)), generator(), None)
    sizes = [len(batch.tensors()[0]) for batch in probes.batches]
    assert sizes[-1] == sum(sizes[:-1]) == 600
    assert max(sizes[:-1]) < 150 == len(probes.held_out.tensors()[0])


def bare(channels: int) -> nn.Module:
    """Without batch norm."""
    layers = (nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 400, 4))
    return settle(nn.Sequential(*layers))


def test_networks_without_batch_norm_get_photographs_or_dreams_of_classes() -> None:
    for channels, source, told in (
        (3, lbyl.Photographs(), "lbyl's own photographs"),
        (1, lbyl.ClassDream(), "dreamed for random classes"),
    ):
        net, x = bare(channels), torch.randn(1, channels, 24, 24, generator=generator())
        chosen, asked = (
            lbyl.compress(net, x, ratio=0.5, restore=restore, forecast=False)
            for restore in ("auto", lbyl.LeastSquares(source))
        )
        assert any(told in note for note in chosen.report.notes)
        for name, tensor in chosen.model.state_dict().items():
            assert torch.equal(tensor, asked.model.state_dict()[name])
        assert chosen.report.assessment
        assert chosen.report.assessment.restored < chosen.report.assessment.pruned


def test_photographs_alone() -> None:
    net, inputs = bare(3), ExampleInputs.of(torch.zeros(1, 3, 24, 24))
    probes = lbyl.Photographs(images=10).probes(net, inputs, generator(), None)
    crops = torch.cat([probes.batches[0].tensors()[0], probes.held_out.tensors()[0]])
    assert torch.equal(crops, photographs((13, 3, 24, 24), generator()))
    with pytest.raises(lbyl.InputError, match="at least 2"):
        lbyl.Photographs(images=1)


def test_crops_are_not_blurred_by_scaling_up() -> None:
    """The photographs have 320 pixels: crops of that size are nearly as sharp as crops of 224."""

    def detail(size: int) -> float:
        crops = photographs((32, 3, size, size), generator())
        return float((crops[..., 1:] - crops[..., :-1]).square().mean())

    assert detail(320) > 0.8 * detail(224)
