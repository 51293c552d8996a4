"""Recurrent layers: LSTM, GRU and plain RNN, whole layers and single cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import Builder, ParameterRef, layer_name
from lbyl.graph.rules import rule
from lbyl.graph.union_find import compact, small, varies
from lbyl.runtime.reductions import aten_name

_GATES = {"lstm": 4, "gru": 3}
"""How many rows the weights have for each unit of the state; other layers have one."""


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stacked layers over a sequence. All layers and directions share one state width, so their units are merged."""
    op, where = str(node.target).split(".")[1], layer_name(node)
    x, state, parameters = args[:3]
    if not isinstance(parameters, (list, tuple)) or not isinstance(x, Tensor):
        return builder.barrier(node, args, f"{op} in {where!r} on packed sequences")
    has_biases, layers, _, _, bidirectional, _ = args[3:9]
    directions, each = 2 if bidirectional else 1, 4 if has_biases else 2
    if not all(isinstance(p, ParameterRef) for p in parameters):
        return builder.barrier(node, args, f"{op} in {where!r} with weights that the code computes")
    if len(parameters) != layers * directions * each:
        return builder.barrier(node, args, f"{op} in {where!r} with projections")
    ids = builder.gather(x, -1)
    if ids is None:
        return builder.barrier(node, args, f"{op} in {where!r} on mixed axes")
    names, units = iter(parameters), None
    for _ in range(layers):
        made = None
        for _ in range(directions):
            made = _layer(builder, node, op, ids, [next(names) for _ in range(each)], units)
            units = made
        assert made is not None
        ids = made.repeat(directions)
    assert units is not None
    _start(builder, node, state, units)
    builder.step(units, op, where, parametric=True)
    shapes = [item.shape for item in node.meta["val"]]
    return [builder.spread(ids, -1, shapes[0]), *(builder.spread(units, -1, shape) for shape in shapes[1:])]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One step of a recurrent layer."""
    op, where = str(node.target).split(".")[1].removesuffix("_cell"), layer_name(node)
    x, state, *parameters = args[:6]
    if not isinstance(x, Tensor) or not all(isinstance(p, ParameterRef) for p in parameters if p is not None):
        return builder.barrier(node, args, f"{op} cell in {where!r} with computed weights")
    ids = builder.gather(x, -1)
    if ids is None:
        return builder.barrier(node, args, f"{op} cell in {where!r} on mixed axes")
    units = _layer(builder, node, op, ids, [p for p in parameters if p is not None], None)
    _start(builder, node, state, units)
    builder.step(units, op, where, parametric=True)
    val = node.meta["val"]
    if isinstance(val, Tensor):
        return builder.spread(units, -1, val.shape)
    return [builder.spread(units, -1, item.shape) for item in val]


def _layer(
    builder: Builder, node: fx.Node, op: str, ids: Tensor, parameters: Sequence[ParameterRef], units: Tensor | None
) -> Tensor:
    """The ids of the units that a layer makes from channels ``ids``; they are merged with ``units``, if given.

    It mixes the channels of its input like a linear layer, once for all steps, and those of its own state like another.
    """
    from_input, from_state, *biases = parameters
    bias = biases[0].name if biases else None
    layer = from_input.name.rpartition(".")[0] or layer_name(node)
    builder.read(layer, from_input.name, bias, "linear", ids)
    rows = builder.produce(node, layer, from_input.name, bias, from_input.shape[0])
    builder.pure.pop(node, None)
    made = builder.join(rows.reshape(_GATES.get(op, 1), -1), [0])[0]
    if units is not None:
        builder.ids.union(made, units)
    builder.slot(from_state.name, 0, rows, "carrier")
    builder.read(layer, from_state.name, biases[1].name if len(biases) > 1 else None, "linear", made)
    for other in biases[1:]:
        builder.slot(other.name, 0, rows, "carrier")
    return builder.ids.find(made)


def _start(builder: Builder, node: fx.Node, state: Any, units: Tensor) -> None:
    """Merge the channels of the initial state with the units of the layer.

    If the model's code makes a state of zeros, the shape there may spell out the number of units.
    """
    for value, source in zip(_tensors(state), _nodes(node.args[1]), strict=False):
        if not bool(builder.ids.issued(small(value)).any()):
            if not any(varies(compact(value), d) for d in range(value.dim() - 1)):
                builder.ids.union(units.expand(value.shape), value)
            made = made_by(source)
            if made is not None and layer_name(made) != layer_name(node):
                builder.shaped(builder.spread(units, -1, value.shape), made)
            continue
        value = compact(builder.ids.find(value))
        if any(varies(value, d) for d in range(value.dim() - 1)):
            builder.pin(value, f"they run along several axes of the initial state of {layer_name(node)!r}")
        builder.ids.union(units.expand(value.shape), value)


def _tensors(state: Any) -> Iterator[Tensor]:
    for value in state if isinstance(state, (list, tuple)) else [state]:
        if isinstance(value, Tensor):
            yield value


def _nodes(state: Any) -> Iterator[fx.Node]:
    for value in state if isinstance(state, (list, tuple)) else [state]:
        if isinstance(value, fx.Node):
            yield value


_MAKE = ("zeros", "new_zeros", "ones", "new_ones", "full", "new_full", "empty", "new_empty", "randn", "rand")
_MOVE = ("to", "_to_copy", "clone", "detach", "contiguous", "alias", "expand", "repeat", "zero_", "fill_", "normal_")


def made_by(node: fx.Node) -> fx.Node | None:
    """The call that made a constant from its shape alone, if the value was only moved or repeated since."""
    while node.op == "call_function" and aten_name(node.target) in _MOVE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.op == "call_function" and aten_name(node.target) in _MAKE else None
