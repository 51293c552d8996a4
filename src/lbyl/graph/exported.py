"""A model's program from `torch.export`, for models that one recorded run does not tell everything about."""

from __future__ import annotations

import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from lbyl.errors import TraceError, first_line
from lbyl.graph.program import Program
from lbyl.runtime.inputs import ExampleInputs


def export(model: nn.Module, inputs: ExampleInputs) -> Program:
    """Trace the model with ``torch.export``.

    Raises:
        TraceError: it refused the model, or some size in it depends on data.
    """
    try:
        # A failed export prints the whole program; what matters of it is in the error.
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False)
    except Exception as error:
        raise TraceError(
            f"torch.export can't trace {type(model).__name__}: {first_line(error)}. "
            "Check that the model runs on the example inputs, or pass a part of it that can be traced."
        ) from error
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    parameters = {}
    for node in program.graph.nodes:
        for item in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(item, Tensor) and not all(isinstance(size, int) for size in item.shape):
                raise TraceError(
                    f"{type(model).__name__}: the size of what {node.target} returns depends on the data. "
                    "Pass a part of the model whose sizes do not."
                )
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or spec.persistent is False:
            continue
        if isinstance(node.meta.get("val"), Tensor):
            parameters[node] = str(spec.target)
    return Program(program.graph, parameters)
