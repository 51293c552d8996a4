"""Small networks that the tests share. Batch norms get statistics, or a test could not tell sigma from 1."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl
from lbyl.io.artifact import CARD, DOCUMENT, MANIFEST, PAGE, WEIGHTS
from lbyl.runtime.memory import held_at_once

Module = TypeVar("Module", bound=nn.Module)


def digits_example() -> ModuleType:
    """The example that trains a network on scikit-learn's digits, as a module."""
    file = Path(__file__).parent.parent / "examples" / "digits" / "network.py"
    spec = importlib.util.spec_from_file_location("digits_network", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settle(model: Module, seed: int = 0) -> Module:
    """Seeded weights and batch-norm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                if module.affine:
                    normal(module.weight, 0.3)
                    module.weight.add_(1)
                    normal(module.bias, 0.3)
                if module.track_running_stats:
                    normal(module.running_mean, 0.5)
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) * 2 + 0.2)
            elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                normal(module.weight, module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    normal(module.bias, 0.2)
    return model.eval()


def mlp(inputs: int = 6, *widths: int, classes: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths or (10, 8):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return settle(nn.Sequential(*layers, nn.Linear(inputs, classes)))


def flat_convnet() -> nn.Sequential:
    """conv-BN-ReLU-pool-flatten-linear: a channel has 2 x 2 columns in the consumer. Input 3 x 4 x 4."""
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
    )


class Block(nn.Module):
    """A basic residual block whose shortcut is a convolution where the width or the stride changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Residual(nn.Module):
    """A stem, an identity block, a projecting block, a classifier. Input 3 x 8 x 8."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.a = Block(width, width)
        self.b = Block(width, 2 * width, 2)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(self.stem(x))).mean((2, 3)))


def residual() -> Residual:
    return settle(Residual())


class Depthwise(nn.Module):
    """An inverted residual without the residual: 1x1, depthwise, 1x1. Input 3 x 6 x 6."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, width, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.project = nn.Conv2d(width, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.depthwise(F.relu6(self.bn0(self.expand(x))))))
        return self.fc(F.relu(self.project(y)).mean((2, 3)))


class HardCoded(nn.Module):
    """Its forward pass knows the width of one layer by heart, which no trace can see."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.head(y) * (1.0 if y.shape[1] == 8 else 2.0)


def room_for(count: int, each: int) -> int:
    """The smallest memory in which so many probes are held at once."""
    sizes = range(count * each, 3 * count * each, each // 8)
    return next(room for room in sizes if held_at_once(room, each) == count)


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SAVED = (WEIGHTS, MANIFEST, CARD, PAGE, DOCUMENT)
"""The files of a saved folder."""


def compress(model: nn.Module, inputs: Any, **settings: Any) -> lbyl.Result:
    """From the weights alone: half of all channels where nothing else is asked for, and nothing is foretold."""
    if settings.get("budget") is None:
        settings.setdefault("ratio", 0.5)
    return lbyl.compress(model, inputs, **{"restore": "lbyl", "forecast": False, **settings})
