"""A small convolutional network for scikit-learn's handwritten digits, and its weights.

`train.py` beside this file wrote `digits.safetensors`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("digits.safetensors")
HELD_OUT = 597


def network() -> nn.Module:
    """Three conv-BN-ReLU layers and a linear one, for 1x8x8 images; not trained."""
    layers: list[nn.Module] = []
    widths = (1, 32, 32, 64)
    for index, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        # Whole channels go missing in training, which is what pruning does later.
        layers.append(nn.Dropout2d(0.4))
        if index:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, 10)).eval()


def load() -> nn.Module:
    """The trained network."""
    net = network()
    net.load_state_dict(load_file(WEIGHTS))
    return net


def data(train: bool = False) -> tuple[Tensor, Tensor]:
    """Images (N x 1 x 8 x 8, in -0.5..0.5) and labels: those held out, or those for training."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(np.asarray(pixels), dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 - 0.5
    labels = torch.tensor(np.asarray(digits), dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[HELD_OUT:] if train else order[:HELD_OUT]
    return images[chosen], labels[chosen]


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """Share of the held-out digits that the network names correctly, in percent."""
    images, labels = data()
    return 100 * float((net(images).argmax(1) == labels).double().mean())
