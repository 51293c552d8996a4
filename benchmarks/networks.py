"""The networks that the benchmarks restore, published ones and one trained here, and the images for them.

Definitions are our own; names of layers follow the published state dicts. See `paper.py` for where the files
come from.
"""

from __future__ import annotations

import copy
import io
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lbyl.io.sources import load_weights
from lbyl.moments import Probes, ProbeSource
from lbyl.moments.base import is_lifelike
from lbyl.runtime.inputs import ExampleInputs


@dataclass(frozen=True)
class Given:
    """A moment source of probes that are there already, so that several restorations share them.

    Attributes:
        made: the probes.
        source: what made them, and says whether they are like real inputs; None where they are.
    """

    made: Probes
    source: ProbeSource | None = None

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """What the source says of them."""
        return self.source is None or is_lifelike(self.source, inputs)

    def probes(self, model: object, inputs: object, generator: object, progress: object) -> Probes:
        """The same ones again."""
        return self.made


class LeNet300100(nn.Module):
    """784-300-100-10, fully connected."""

    def __init__(self) -> None:
        super().__init__()
        self.ip1 = nn.Linear(28 * 28, 300)
        self.ip2 = nn.Linear(300, 100)
        self.ip3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.ip1(x.flatten(1)))
        return self.ip3(torch.relu(self.ip2(hidden)))


class ActivatedFirst(nn.Module):
    """A basic block that starts with the activation, and so has none after its sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if (inputs, stride) != (outputs, 1):
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return shortcut + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for small images with the Neuron Merging authors' blocks."""

    def __init__(self, depth: int = 56, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16)
        self.layer2 = self._stage(blocks, 16, 32)
        self.layer3 = self._stage(blocks, 32, 64)
        self.fc = nn.Linear(64, classes)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int) -> nn.Sequential:
        first = ActivatedFirst(inputs, outputs, outputs // inputs)
        return nn.Sequential(first, *(ActivatedFirst(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        return self.fc(torch.relu(x).mean((2, 3)))


def lenet_300_100(data: Path) -> LeNet300100:
    """The LBYL authors' weights."""
    net = LeNet300100()
    load_weights(net, data / "weights" / "lenet_300_100.pth.tar")
    return net.eval()


def resnet56(data: Path) -> CifarResNet:
    """The Neuron Merging authors' weights."""
    net = CifarResNet(56)
    load_weights(net, data / "weights" / "resnet56_cifar10.pth.tar")
    return net.eval()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 as the demo builds it, with its ImageNet weights."""
    return _example("efficientnet_lite0").model()


def folded(net: nn.Module, x: Tensor) -> nn.Module:
    """The same network without batch norms: each is folded into the convolution before it, as for deployment."""
    net, made, behind = copy.deepcopy(net).eval(), dict[int, nn.Module](), dict[str, nn.Module]()
    held: list[Tensor] = []  # so that no two outputs have one id
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(conv: nn.Module, inputs: Any, out: Tensor) -> None:
                held.append(out)
                made[id(out)] = conv

            hooks.append(module.register_forward_hook(note))
        elif isinstance(module, nn.BatchNorm2d):

            def meet(norm: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                behind[name] = made[id(inputs[0])]

            hooks.append(module.register_forward_pre_hook(meet))
    with torch.no_grad():
        expected = net(x)
    for hook in hooks:
        hook.remove()
    for name, conv in behind.items():
        norm, (above, _, leaf) = net.get_submodule(name), name.rpartition(".")
        weights = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *weights)  # pyright: ignore
        setattr(net.get_submodule(above), leaf, nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-3)
    return net


def digits_resnet(epochs: int = 30) -> CifarResNet:
    """ResNet-14, trained here on scikit-learn's digits but those that the examples hold out; half a minute."""
    images, labels = _example("digits.network").data(train=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CifarResNet(14, channels=1)
        optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True, lr=0.1)
        steps = epochs * -(-len(labels) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(labels)).split(64):
                down, right = torch.randint(-1, 2, (2,)).tolist()
                x = torch.roll(images[chosen], (down, right), (2, 3))
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return net.eval()


def _example(name: str) -> ModuleType:
    examples = str(Path(__file__).parent.parent / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    return import_module(name)


@dataclass(frozen=True)
class Images:
    """Preprocessed images and their classes."""

    pixels: Tensor
    labels: Tensor

    @torch.no_grad()
    def accuracy(self, net: nn.Module, batch: int = 500) -> float:
        """Top-1 accuracy in percent, rounded to two decimals."""
        right = 0
        for pixels, labels in zip(self.pixels.split(batch), self.labels.split(batch), strict=True):
            # This layout is what convolutions on CPU are quickest in.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            right += int((net(pixels).argmax(1) == labels).sum())
        return round(100 * right / len(self.labels), 2)


def _read(file: Path, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Images:
    with np.load(file, allow_pickle=False) as arrays:
        return _normalized(arrays["images"], arrays["labels"], mean, deviation)


def _normalized(
    pixels: np.ndarray, labels: np.ndarray, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> Images:
    x = torch.from_numpy(pixels).float() / 255
    x = x.unsqueeze(1) if x.dim() == 3 else x.movedim(3, 1)
    shape = (1, -1, 1, 1)
    x = (x - torch.tensor(mean).reshape(shape)) / torch.tensor(deviation).reshape(shape)
    return Images(x.contiguous(), torch.from_numpy(labels.astype(np.int64)))


def fashion_mnist(data: Path) -> Images:
    """The FashionMNIST test set, pixels scaled to [-1, 1]."""
    return _read(data / "data" / "fashion_mnist_test.npz", (0.5,), (0.5,))


def digits() -> Images:
    """Scikit-learn's digits but those that the examples hold out."""
    return Images(*_example("digits.network").data(train=True))


def held_out_digits() -> Images:
    """The 597 of scikit-learn's digits that the examples hold out."""
    return Images(*_example("digits.network").data())


_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def cifar10(data: Path) -> Images:
    """The CIFAR-10 test set, normalized as the networks were trained."""
    return _read(data / "data" / "cifar10_test.npz", *_CIFAR10)


def cifar10_pixels(data: Path) -> Images:
    """The CIFAR-10 test set as pixels of 0 to 255."""
    return _read(data / "data" / "cifar10_test.npz", (0.0,), (1 / 255,))


class _Padded(nn.Module):
    """A border of one pixel in the mean color, which a layer that takes pixels as they are needs in place of zeros."""

    color: Tensor

    def __init__(self, color: Tensor) -> None:
        super().__init__()
        self.register_buffer("color", color.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x - self.color, (1, 1, 1, 1)) + self.color


def resnet56_pixels(data: Path) -> nn.Module:
    """ResNet-56 that takes pixels of 0 to 255: what normalizes them is folded into its first layer."""
    net = resnet56(data)
    mean, deviation = (255 * torch.tensor(part) for part in _CIFAR10)
    old = net.conv1
    new = nn.Conv2d(3, 16, 3, bias=True)
    with torch.no_grad():
        new.weight.copy_(old.weight / deviation.reshape(1, -1, 1, 1))
        assert new.bias is not None
        new.bias.copy_(-(new.weight.sum((2, 3)) @ mean))
    net.conv1 = nn.Sequential(_Padded(mean), new)  # pyright: ignore[reportAttributeAccessIssue]
    return net.eval()


def imagenet(data: Path) -> Images:
    """1,300 ImageNet validation images, all of each at 224 px, as EfficientNet-Lite0 takes them."""
    from PIL import Image

    with np.load(data / "data" / "imagenet_val1300_227.npz", allow_pickle=False) as arrays:
        blob, offsets, labels = arrays["blob"].tobytes(), arrays["offsets"], arrays["labels"]
    pixels = np.empty((len(labels), 224, 224, 3), np.uint8)
    for index in range(len(labels)):
        with Image.open(io.BytesIO(blob[offsets[index] : offsets[index + 1]])) as file:
            pixels[index] = np.asarray(file.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    return _normalized(pixels, labels, (127 / 255,), (128 / 255,))
