"""Recurrent layers. Their weights stay whole: the file holds all gates and directions of a layer in one array."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbyl.io.onnx.operators.base import Node, operator, tensors

_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""The place in the file of each gate of PyTorch's layers."""
_CALLS = {
    ("LSTM", ("Sigmoid", "Tanh", "Tanh")): torch.lstm,
    ("GRU", ("Sigmoid", "Tanh")): torch.gru,
    ("RNN", ("Tanh",)): torch.rnn_tanh,
    ("RNN", ("Relu",)): torch.rnn_relu,
}


@operator("LSTM", "GRU", "RNN")
def recurrent(node: Node) -> None:
    """A recurrent layer with the usual activations, in one direction or in both, from the first step to the last."""
    get, kind = node.attributes.get, node.operator
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[kind]
    direction = str(get("direction", "forward"))
    count = 2 if direction == "bidirectional" else 1
    asked = [str(name) for name in get("activations", usual * count)]
    call = _CALLS.get((kind, tuple(asked[: len(usual)])))
    if call is None or asked != asked[: len(usual)] * count:
        raise node.refuse(f"its activations are {', '.join(asked)}; the usual ones are {', '.join(usual)}")
    if get("clip") or get("input_forget", 0):
        raise node.refuse("it clips its gates, or couples two of them")
    if kind == "GRU" and not get("linear_before_reset", 0):
        raise node.refuse("its reset gate acts before the product with the state (linear_before_reset=0)")
    if _given(node, 4):
        raise node.refuse("its sequences have lengths of their own")
    if kind == "LSTM" and _given(node, 7):
        raise node.refuse("its gates see the cell (peepholes)")
    if not all(node.is_constant(index) for index in (1, 2) + ((3,) if _given(node, 3) else ())):
        raise node.refuse("its weights are computed")
    if get("layout", 0):
        raise node.refuse("its batch is the first axis (layout=1), which onnxruntime can't run")
    settings = {"call": call, "gates": _GATES[kind], "direction": direction}
    places = (0, 1, 2, 3, 5, 6) if kind == "LSTM" else (0, 1, 2, 3, 5)
    node.run(partial(_recurrent, **settings), *(node.source(index) for index in places))


def _given(node: Node, index: int) -> bool:
    if index >= node.operands:
        return False
    return node.is_constant(index) or node.source(index) is not None


def _recurrent(
    x: Tensor,
    from_input: Any,
    from_state: Any,
    bias: Any,
    *states: Any,
    call: Any,
    gates: Sequence[int],
    direction: str,
) -> tuple[Tensor, ...]:
    """All outputs of a layer: those of each step, and the last states.

    Args:
        x: steps x batch x inputs.
        from_input: weights, directions x (gates x units) x inputs.
        from_state: weights, directions x (gates x units) x units.
        bias: directions x (2 x gates x units), or None.
        states: the first states, directions x batch x units; None for zeros.
        call: PyTorch's function.
        gates: the place of each of its gates.
        direction: "forward", "reverse" or "bidirectional".
    """
    x, from_input, from_state, bias, *first_states = tensors(x, from_input, from_state, bias, *states)
    directions, _, units = from_state.shape
    x = x.flip(0) if direction == "reverse" else x
    order = torch.as_tensor(np.concatenate([np.arange(gate * units, (gate + 1) * units) for gate in gates]))
    order = order.to(x.device)
    parts = []
    for one in range(directions):
        parts += [from_input[one][order], from_state[one][order]]
        if bias is not None:
            first, second = bias[one].chunk(2)
            parts += [first[order], second[order]]
    zeros = x.new_zeros(directions, x.shape[1], units)
    start = [zeros if state is None else state for state in first_states]
    hidden = start if call is torch.lstm else start[0]
    each, *last = call(x, hidden, parts, bias is not None, 1, 0.0, False, directions == 2, False)
    each = each.flip(0) if direction == "reverse" else each
    return each.reshape(*each.shape[:2], directions, units).transpose(1, 2), *last
