"""A traced program: the operations of one forward pass, and the names of the parameters that they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Program:
    """The ATen operations of one forward pass, before composite ones are decomposed.

    Attributes:
        graph: one node for each operation; ``node.meta`` holds the outputs as tensors without data (``val``) and the
            modules that the operation ran in (``nn_module_stack``).
        parameters: the parameter or buffer that each placeholder stands for. Placeholders that are not listed are
            inputs, constants, and buffers that are not saved with the model (masks, rotary frequencies).
        macs: multiply-accumulates of the pass; None where it was not run with real tensors.
        notes: what the user should know about the pass.
    """

    graph: fx.Graph
    parameters: Mapping[fx.Node, str]
    macs: int | None = None
    notes: tuple[str, ...] = ()
