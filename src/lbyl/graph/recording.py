"""Records a model's program during one run: it finds what `torch.export` finds, in a fraction of the time."""

from __future__ import annotations

import inspect
import operator
from contextlib import AbstractContextManager
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from lbyl.errors import InputError
from lbyl.graph.program import (
    CODE,
    CONSTANT,
    LINE,
    LITERALS,
    ORIGIN,
    SETTING,
    SIZES,
    Program,
    attribute_text,
    loses_channels,
    remember,
    unsaved_text,
)
from lbyl.runtime.contexts import MODULE_ATTRIBUTES, plain_attention
from lbyl.runtime.inputs import ExampleInputs, check_output, output_tensors
from lbyl.runtime.intercept import OperatorInterceptor, module_hooks, undivided
from lbyl.runtime.macs import MacCounter
from lbyl.runtime.reductions import aten_name

_LIKE_NONZERO = (torch.ops.aten.where.default, torch.ops.aten.argwhere.default, torch.ops.aten.nonzero_numpy.default)
"""Operations that PyTorch does not mark as such, although the size of their result depends on the data."""


class Unseen(Exception):
    """One run does not determine the program, because the model may branch on values that it computes."""


def record(model: nn.Module, inputs: ExampleInputs, follow: bool = False) -> Program:
    """Run the model and record its operations.

    All runs have the same program unless Python code reads a value that depends on inputs or weights. So the expensive
    layers need not be computed: they return zeros. A model that fails on zeros is run with real values instead.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
        follow: where Python code reads such a value, record the branch that it takes on these inputs, and note it.

    Raises:
        Unseen: Python code reads such a value and ``follow`` is False; a size depends on such a value; or a weight is
            used in a way that the recorder can't see.
    """
    if follow:
        return _record(model, inputs, MacCounter(), follow)
    try:
        return _record(model, inputs, MacCounter(spare=True))
    except Unseen:
        raise
    except Exception:
        return _record(model, inputs, MacCounter())


def _record(model: nn.Module, inputs: ExampleInputs, counter: MacCounter, follow: bool = False) -> Program:
    recorder = _Recorder(model, follow)
    own = inputs.cloned()
    for tensor in own.tensors():
        recorder.place(tensor, depends=True)
    with torch.no_grad(), plain_attention(), recorder.following(model), undivided(), counter, recorder:
        found = own.call(model)
        tensors = output_tensors(found)
    check_output(tensors, found)
    return recorder.finish(tensors, counter)


class _Recorder(OperatorInterceptor):
    def __init__(self, model: nn.Module, follow: bool) -> None:
        super().__init__()
        self._follow, self._seen = follow, list[str]()
        self._graph = fx.Graph()
        self._nodes: Any = WeakIdKeyDictionary()
        self._depends: set[fx.Node] = set()
        self._stack: list[tuple[str, type]] = []
        self._ran: set[str] = set()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._parameters: dict[fx.Node, str] = {}
        self._unsaved: dict[fx.Node, str] = {}  # buffers that are not saved with the model
        self._own: set[fx.Node] = set()  # parameters, and no buffers
        self._storages: set[int] = set()
        constants = {
            f"{path}.{name}".lstrip(".")
            for path, module in model.named_modules()
            for name in module._non_persistent_buffers_set
        }
        self._attributes = {
            id(item): attribute_text(path, name)
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if name not in MODULE_ATTRIBUTES
            for item in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,))
            if isinstance(item, Tensor)
        }
        # A tied tensor has several names. The last one is used, as in an exported program.
        everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        for name, tensor in {id(tensor): (name, tensor) for name, tensor in everything}.values():
            node = self.place(tensor, depends=name not in constants)
            remember(node, tensor)
            if isinstance(tensor, nn.Parameter):
                self._own.add(node)
            if name in constants:
                self._unsaved[node] = name
                node.meta[ORIGIN] = unsaved_text(name)
            else:
                self._parameters[node] = name
                self._storages.add(_storage(tensor))

    def place(self, tensor: Tensor, depends: bool = False) -> fx.Node:
        """A placeholder for a tensor that no operation made."""
        node = self._graph.placeholder(f"value_{len(self._graph.nodes)}")
        node.meta["val"] = _outline(tensor)
        self._nodes[tensor] = node
        if depends:
            self._depends.add(node)
        return node

    def following(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keep track of the modules that are running."""

        def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append((path, type(module)))
            self._ran.add(path)

        def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        return module_hooks(dict(model.named_modules()), enter, leave, enter_first=True)

    def finish(self, outputs: list[Tensor], counter: MacCounter) -> Program:
        """The program that returns these tensors."""
        self._graph.output([self._node(tensor) for tensor in outputs])
        notes, idle = counter.notes, self._idle()
        if self._seen:
            where = ", ".join(repr(path) for path in list(dict.fromkeys(self._seen))[:3])
            notes += (
                f"the network branches on values that it computes (in {where}): it was traced, cut and verified only "
                f"for the branches that the example inputs take{'; ' if idle else ''}{idle}",
            )
        elif idle:
            notes += (f"{idle}: in training, say, or with other inputs",)
        cut = {node: name for node, name in self._unsaved.items() if loses_channels(node)}
        return Program(self._graph, {**self._parameters, **cut}, counter.total, notes)

    def _idle(self) -> str:
        """What to say of layers and parameters that this run did not use; "" if there are none."""
        owners = {node: name.rpartition(".")[0] or name for node, name in self._parameters.items() if node in self._own}
        # A layer may run without some of its tensors: a batch norm does not use its count of batches.
        used = {owner for node, owner in owners.items() if node.users}
        unused = {self._parameters[node]: owner for node, owner in owners.items() if owner not in used}
        # A module that ran holds a parameter that it only uses in training, say.
        ran = {name for name, owner in unused.items() if owner in self._ran or owner == name}
        named = list(dict.fromkeys(name if name in ran else owner for name, owner in unused.items()))
        if not named:
            return ""
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        what = ("was not used" if len(named) == 1 else "were not used") if ran else "did not run"
        return f"{', '.join(named[:3])}{more} {what} and may no longer fit the cut network"

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in pytree.tree_leaves((args, kwargs))):
            where = repr(self._stack[-1][0]) if self._stack and self._stack[-1][0] else "the network"
            raise InputError(
                f"{where} works on nested tensors, which can't be followed; let it work on padded ones, or pass a part "
                "of the network that does"
            )
        # Before the call: asked for its variables, this frame would hold the result, and PyTorch copy it.
        told = self._caller()
        result = func(*args, **kwargs)
        given, named = (self._nodes_in(item) for item in (args, kwargs))
        node = self._graph.call_function(func, given, named)
        node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in self._stack}
        node.meta |= told
        node.meta["val"] = (
            _outline(result) if isinstance(result, Tensor) else pytree.tree_map_only(Tensor, _outline, result)
        )
        depends = any(source in self._depends for source in node.all_input_nodes)
        if depends:
            self._depends.add(node)
            number = isinstance(result, (bool, int, float, complex)) and aten_name(func) != SETTING
            if number and self._follow:
                self._seen.append(self._stack[-1][0] if self._stack else "")
            elif number or _shape_depends(func, args):
                raise Unseen(f"{func} makes the program depend on its data")
        if isinstance(result, Tensor):
            self._nodes[result] = node
        elif isinstance(result, (list, tuple)):
            for index, item in enumerate(result):
                if isinstance(item, Tensor):
                    piece = self._graph.call_function(operator.getitem, (node, index))
                    piece.meta = {**node.meta, "val": _outline(item)}
                    self._nodes[item] = piece
                    if depends:
                        self._depends.add(piece)
        return result

    def _caller(self) -> dict[str, Any]:
        """What is known of the code that makes the call: its module, its line, what it spells out, and more.

        The module is the one that runs, or a part of which it calls another method. It is None if Python does not know.
        """
        frame = inspect.currentframe()
        frame, told = frame and frame.f_back, {CODE: None, LITERALS: (), SIZES: False}
        while frame is not None:
            code = frame.f_code
            if LINE not in told and not frame.f_globals.get("__name__", "").startswith(("lbyl.", "torch.")):
                free = (frame.f_locals.get(name) for name in code.co_freevars)
                held = (*code.co_consts, *free, *(frame.f_globals.get(name) for name in code.co_names))
                told[LITERALS] = tuple(value for value in held if isinstance(value, int | float | tuple))
                told[SIZES] = "shape" in code.co_names or "size" in code.co_names
                told[LINE] = f"{PurePath(code.co_filename).name}:{frame.f_lineno}"
            path = self._paths.get(id(frame.f_locals.get(code.co_varnames[0]))) if code.co_argcount else None
            if path is not None:
                return told | {CODE: path}
            frame = frame.f_back
        return told

    def _nodes_in(self, value: Any) -> Any:
        """The value with nodes in place of tensors, also inside lists, tuples and dicts."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, (tuple, list)):
            return type(value)([self._nodes_in(item) for item in value])
        if isinstance(value, dict):
            return {key: self._nodes_in(item) for key, item in value.items()}
        return value

    def _node(self, tensor: Tensor) -> fx.Node:
        if tensor in self._nodes:
            return self._nodes[tensor]
        if tensor.numel() and _storage(tensor) in self._storages:
            raise Unseen("a weight is used under another name")
        node = self.place(tensor)
        node.meta[CONSTANT] = True
        if id(tensor) in self._attributes:
            node.meta[ORIGIN] = self._attributes[id(tensor)]
        remember(node, tensor)
        return node


def _shape_depends(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the size of the result depends on numbers in the arguments."""
    if func.namespace != "aten" or func in _LIKE_NONZERO:
        return True  # unknown here; `torch.export` uses what was registered with the operation
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:  # depends on data only if an index is a mask
        return any(item is not None and item.dtype in (torch.bool, torch.uint8) for item in args[1])
    return True


def _outline(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
