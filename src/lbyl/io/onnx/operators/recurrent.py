"""Recurrent layers. Their weights stay whole: the file holds all gates and directions of a layer in one array."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lbyl.errors import InputError
from lbyl.io.onnx.arrays import as_tensor
from lbyl.io.onnx.operators.base import Node, operator

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
    call: Any = _CALLS.get((kind, tuple(asked[: len(usual)])))
    if call is None or asked != asked[: len(usual)] * count:
        raise node.refuse(f"its activations are {', '.join(asked)}; the usual ones are {', '.join(usual)}")
    if get("clip") or get("input_forget", 0):
        raise node.refuse("it clips its gates, or couples two of them")
    if kind == "GRU" and not get("linear_before_reset", 0):
        call = _gru_that_resets_first
    if _given(node, 4):
        raise node.refuse("its sequences have lengths of their own")
    if kind == "LSTM" and _given(node, 7):
        raise node.refuse("its gates see the cell (peepholes)")
    if not all(node.is_constant(index) for index in (1, 2) + ((3,) if _given(node, 3) else ())):
        raise node.refuse("its weights are computed")
    if get("layout", 0):
        raise node.refuse("its batch is the first axis (layout=1), which onnxruntime can't run")
    settings = {"call": call, "gates": _GATES[kind], "direction": direction, "name": node.where}
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
    name: str,
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
        name: the node's name in errors.

    Raises:
        InputError: the first states are for another batch, or of another size.
    """
    from_input, from_state, bias, *first_states = (_like(value, x) for value in (from_input, from_state, bias, *states))
    directions, _, units = from_state.shape
    # PyTorch doesn't check the states' shapes here, and reads memory that is not theirs.
    wanted = (directions, x.shape[1], units)
    first_states = [None if state is None else _of_batch(state, wanted, name) for state in first_states]
    x = x.flip(0) if direction == "reverse" else x
    order = torch.as_tensor(np.concatenate([np.arange(gate * units, (gate + 1) * units) for gate in gates]))
    order = order.to(x.device)
    parts = []
    for one in range(directions):
        parts += [from_input[one][order], from_state[one][order]]
        if bias is not None:
            first, second = bias[one].chunk(2)
            parts += [first[order], second[order]]
    zeros = x.new_zeros(wanted)
    start = [zeros if state is None else state for state in first_states]
    hidden = start if call is torch.lstm else start[0]
    each, *last = call(x, hidden, parts, bias is not None, 1, 0.0, False, directions == 2, False)
    each = each.flip(0) if direction == "reverse" else each
    return each.reshape(*each.shape[:2], directions, units).transpose(1, 2), *last


def _like(value: Any, x: Tensor) -> Any:
    """Weights and states as tensors of the dtype and on the device of ``x``; None stays None."""
    return as_tensor(value).to(x.device, x.dtype) if isinstance(value, np.ndarray) else value


def _of_batch(state: Tensor, wanted: tuple[int, int, int], name: str) -> Tensor:
    """First states for the batch at hand: a file with a fixed batch holds them for that one."""
    if tuple(state.shape) == wanted:
        return state
    same = state.dim() == 3 and (state.shape[1] == 1 or bool((state == state[:, :1]).all()))
    if not same or (state.shape[0], state.shape[2]) != (wanted[0], wanted[2]):
        given, asked = ("x".join(map(str, sizes)) for sizes in (state.shape, wanted))
        raise InputError(
            f"{name} has first states of {given}, but runs on a batch that needs {asked}; leave the batch of the "
            "states open, or store states that are the same for the whole batch"
        )
    return state[:, :1].expand(wanted)


def _gru_that_resets_first(
    x: Tensor, hidden: Tensor, parts: Sequence[Tensor], biased: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    """A GRU whose reset gate acts before the product with the state, which PyTorch does not have.

    It takes the arguments of ``torch.gru``; a second direction is run if there are parts for it.
    """
    each, last, count = [], [], 4 if biased else 2
    for one, state in enumerate(hidden):
        from_input, from_state, *biases = parts[one * count : (one + 1) * count]
        first, second = biases if biased else (None, None)
        inputs = functional.linear(x, from_input, first)
        *gates, new = from_state.chunk(3)
        *gate_biases, new_bias = (None,) * 3 if second is None else second.chunk(3)
        steps: list[Tensor] = []
        for step in inputs.flip(0) if one else inputs:
            reset, update = (
                torch.sigmoid(given + functional.linear(state, weight, shift))
                for given, weight, shift in zip(step.chunk(3, -1), gates, gate_biases, strict=False)
            )
            made = torch.tanh(step.chunk(3, -1)[2] + functional.linear(reset * state, new, new_bias))
            state = (1 - update) * made + update * state
            steps.append(state)
        each.append(torch.stack(steps[::-1] if one else steps))
        last.append(state)
    return torch.cat(each, -1), torch.stack(last)
