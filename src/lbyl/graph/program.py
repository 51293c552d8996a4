"""What the rules walk over: the operations of one forward pass, by the names of the tensors that they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Program:
    """The ATen operations of one forward pass, before any of them is taken apart.

    Attributes:
        graph: one node an operation; ``node.meta`` holds what it returned without the numbers (``val``) and the
            modules that it ran in (``nn_module_stack``).
        parameters: which parameter or buffer a placeholder stands for. Other placeholders are inputs, constants
            and buffers that are not saved with the model (masks, rotary frequencies).
        macs: multiply-accumulates of the pass; None where it was not run with real tensors.
        notes: what the user should know of the pass.
    """

    graph: fx.Graph
    parameters: Mapping[fx.Node, str]
    macs: int | None = None
    notes: tuple[str, ...] = ()
