"""A traced program: the operations of one forward pass, and the names of the parameters that they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

_LONGEST = 2**14


def remember(node: fx.Node, tensor: Tensor) -> None:
    """Keep the whole numbers of a constant or a buffer in ``node.meta``."""
    if tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 1 and tensor.numel() <= _LONGEST:
        node.meta["whole numbers"] = tensor.detach().to("cpu", torch.int64, copy=True)


@dataclass(frozen=True)
class Program:
    """The ATen operations of one forward pass, before composite ones are decomposed.

    Attributes:
        graph: one node for each operation; ``node.meta`` holds the outputs as tensors without data (``val``) and the
            modules that the operation ran in (``nn_module_stack``).
        parameters: the parameter or buffer that each placeholder stands for. Placeholders that are not listed are
            inputs, constants, and buffers that are not saved with the model (masks, rotary frequencies).
            Their ``node.meta`` also holds the ``whole numbers`` in short constants and buffers, which may be indices.
        macs: multiply-accumulates of the pass; None where it was not run with real tensors.
        notes: what the user should know about the pass.
    """

    graph: fx.Graph
    parameters: Mapping[fx.Node, str]
    macs: int | None = None
    notes: tuple[str, ...] = ()
