"""A model's program from `torch.export`, for models whose program one recorded run does not determine."""

from __future__ import annotations

import operator
import re
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from lbyl.errors import TraceError, first_line
from lbyl.graph.program import CONSTANT, LINE, ORIGIN, Program, attribute_text, loses_channels, remember, unsaved_text
from lbyl.runtime.inputs import ExampleInputs, output_tensors

_INSIDE = "model"
_LINES = re.compile(r'File "([^"]+)", line (\d+)')


class _TensorsOnly(nn.Module):
    """Returns a model's output tensors as a list, because `torch.export` refuses objects of unknown classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return output_tensors(self.model(*args, **kwargs))


def export(model: nn.Module, inputs: ExampleInputs) -> Program:
    """Trace the model with ``torch.export``.

    Raises:
        TraceError: ``torch.export`` refused the model, or a size in the program depends on the data.
    """
    try:
        # A failed export prints the whole program. The error says enough.
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            own = inputs.cloned()
            program = torch.export.export(_TensorsOnly(model), own.args, dict(own.kwargs), strict=False)
    except Exception as error:
        raise TraceError(
            f"torch.export can't trace {type(model).__name__}: {first_line(error)}. "
            "Check that the model runs on the example inputs, or pass a part of it that can be traced."
        ) from error
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    parameters = {}
    _inline_regions(program.graph_module)
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        inside = {path.removeprefix(_INSIDE).lstrip("."): kind for path, kind in stack.values()}
        node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in inside.items()}
        if lines := _LINES.findall(node.meta.get("stack_trace") or ""):
            node.meta[LINE] = f"{PurePath(lines[-1][0]).name}:{lines[-1][1]}"
        for item in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(item, Tensor) and not all(isinstance(size, int) for size in item.shape):
                raise TraceError(
                    f"{type(model).__name__}: the size of what {node.target} returns depends on the data. "
                    "Pass a part of the model in which no size depends on the data."
                )
        spec = specs.get(node.name) if node.op == "placeholder" else None
        held = None if spec is None else {**program.constants, **program.state_dict}.get(str(spec.target))
        if isinstance(held, Tensor):
            remember(node, held)
            if spec is not None and spec.kind is InputKind.CONSTANT_TENSOR:
                node.meta[CONSTANT] = True
                path, _, name = str(spec.target).removeprefix(f"{_INSIDE}.").rpartition(".")
                if not name.startswith("lifted"):
                    node.meta[ORIGIN] = attribute_text(path, name)
        if spec is None or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            continue
        if spec.persistent is False and not loses_channels(node):
            node.meta[ORIGIN] = unsaved_text(str(spec.target).removeprefix(f"{_INSIDE}."))
            continue
        if isinstance(node.meta.get("val"), Tensor):
            parameters[node] = str(spec.target).removeprefix(f"{_INSIDE}.")
    return Program(program.graph, parameters)


_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
"""Operations that run a program of their own in another state of PyTorch, as ``with torch.autocast(...)`` does."""


def _inline_regions(whole: fx.GraphModule) -> None:
    """Put the operations of such regions in the place of the one that runs them: all shapes are the same outside."""
    graph = whole.graph
    for node in [each for each in graph.nodes if getattr(each.target, "__name__", "") in _REGIONS]:
        place = next(i for i, item in enumerate(node.args) if isinstance(item, fx.Node) and item.op == "get_attr")
        region = whole.get_submodule(str(node.args[place].target))
        if not isinstance(region, fx.GraphModule):
            continue
        _inline_regions(region)
        entries = [each for each in region.graph.nodes if each.op == "placeholder"]
        copies: dict[fx.Node, Any] = dict(zip(entries, node.args[place + 1 :], strict=True))
        with graph.inserting_before(node):
            outputs = graph.graph_copy(region.graph, copies)
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(outputs[user.args[1]])  # pyright: ignore[reportIndexIssue, reportOptionalSubscript, reportArgumentType]
                graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)
