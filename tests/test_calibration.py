"""Batches for calibration have the form of the example inputs, and what a static quantizer is given them for works."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Residual, flat_convnet, images, mlp, settle
from torch import Tensor, nn

import lbyl


def small_photo_net() -> nn.Sequential:
    return settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)))


def test_batches_have_the_form_of_the_example() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_photo_net()

        def forward(self, image: Tensor) -> Tensor:
            return self.inner(image)

    net, image = Named().eval(), images(1, 3, 8, 8)
    forms: dict[type, Any] = {Tensor: image, tuple: (image,), dict: {"image": image}}
    found = {kind: lbyl.calibration_batches(net, form, batch_size=4) for kind, form in forms.items()}
    for kind, batches in found.items():
        assert batches
        assert all(isinstance(batch, kind) for batch in batches)
    for tensor, single, named in zip(*found.values(), strict=True):
        assert tensor.shape == (4, 3, 8, 8)
        assert tensor.is_contiguous()
        assert torch.equal(tensor, single[0])
        assert torch.equal(tensor, named["image"])


def test_equal_seeds_give_equal_batches_and_nothing_changes() -> None:
    net = flat_convnet()
    before = copy.deepcopy(net.state_dict())
    generator = torch.get_rng_state()
    first, same, other = (lbyl.calibration_batches(net, images(1, 3, 4, 4), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_batch_norms_see_about_their_statistics() -> None:
    """What makes the batches stand for real inputs: noise of the same size is further from the statistics."""
    net = Residual()
    settle(net)

    def gap(batches: list[Tensor]) -> float:
        norm, seen = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)), []
        hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                net(batch)
        hook.remove()
        outputs = torch.cat(seen)
        assert norm.running_mean is not None
        return float((outputs.mean((0, 2, 3)) - norm.running_mean).square().mean())

    made = lbyl.calibration_batches(net, images(1, 3, 8, 8))
    generator = torch.Generator().manual_seed(0)
    assert gap(made) < gap([torch.randn(batch.shape, generator=generator) for batch in made])


def test_kinds_of_probes_are_mixed() -> None:
    """The means of the first half of the batches are like those of the second; dreams and photographs differ."""
    made = torch.cat(lbyl.calibration_batches(flat_convnet(), images(1, 3, 4, 4), batch_size=8))
    deviations = made.flatten(1).std(1)
    halves = deviations.chunk(2)
    assert abs(float(halves[0].mean() - halves[1].mean())) < 0.5 * float(deviations.std())


class OnlyPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_photo_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(2, 3, 8, 8))


def test_a_network_of_one_batch_size_gets_that_size() -> None:
    for batch in lbyl.calibration_batches(OnlyPairs().eval(), images(2, 3, 8, 8)):
        assert batch.shape == (2, 3, 8, 8)


def test_a_network_that_takes_no_images_gets_inputs_too() -> None:
    batches = lbyl.calibration_batches(mlp(6, 16), images(2, 6), batch_size=8)
    assert all(batch.shape == (8, 6) for batch in batches)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, r"calibration_batches\(batch_size=0\): must be a whole number of at least 1"),
        ({"batch_size": 10**6}, "inputs were made for this network; ask for fewer"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_bad_arguments_are_one_clear_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(lbyl.InputError, match=message):
        lbyl.calibration_batches(flat_convnet(), images(1, 3, 4, 4), **given)


def test_onnxruntime_quantizes_the_smaller_network_with_them(tmp_path: Path) -> None:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self, batches: list[Tensor], name: str) -> None:
            self.left = iter([{name: batch.numpy()} for batch in batches])

        def get_next(self) -> Any:
            return next(self.left, None)

    result = lbyl.compress(flat_convnet(), images(1, 3, 4, 4), ratio=0.25, restore="lbyl")
    file = lbyl.export(result.model, to=tmp_path / "smaller.onnx").file
    batches = lbyl.calibration_batches(result.model, images(1, 3, 4, 4), batch_size=8)
    name = onnxruntime.InferenceSession(str(file)).get_inputs()[0].name
    quantize_static(file, tmp_path / "int8.onnx", Batches(batches, name), quant_format=QuantFormat.QDQ)
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    x = batches[0]
    with torch.no_grad():
        wanted = result.model(x).numpy()
    (found,) = session.run(None, {name: x.numpy()})
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)
    assert not np.array_equal(found, wanted)


def test_torchao_quantizes_the_smaller_network() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    result = lbyl.compress(mlp(32, 64, 64), images(4, 32), ratio=0.25, restore="lbyl")
    x = images(16, 32)
    with torch.no_grad():
        wanted = result.model(x)
        for kind in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"):
            net = copy.deepcopy(result.model)
            quantization.quantize_(net, getattr(quantization, kind)())
            found = net(x)
            assert float((found - wanted).norm()) < 0.1 * float(wanted.norm()), kind
            assert not torch.equal(found, wanted), kind


def test_the_arguments_are_documented() -> None:
    said = inspect.getdoc(lbyl.calibration_batches) or ""
    assert all(f"{name}:" in said for name in inspect.signature(lbyl.calibration_batches).parameters)
