"""Recurrent layers. The file holds all gates and directions of a layer in one array, which is taken apart here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lbyl.errors import InputError
from lbyl.io.onnx.arrays import as_tensor
from lbyl.io.onnx.network import Source
from lbyl.io.onnx.operators.base import Node, operator, whole

_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""The place in the file of each gate of PyTorch's layers."""
_MODES = {
    ("LSTM", ("Sigmoid", "Tanh", "Tanh")): "LSTM",
    ("GRU", ("Sigmoid", "Tanh")): "GRU",
    ("RNN", ("Tanh",)): "RNN_TANH",
    ("RNN", ("Relu",)): "RNN_RELU",
}
_CALLS: dict[str, Any] = {
    "LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu
}  # fmt: skip


@operator("LSTM", "GRU", "RNN")
def recurrent(node: Node) -> None:
    """A recurrent layer with the usual activations, in one direction or in both, from the first step to the last."""
    get, kind = node.attributes.get, node.operator
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[kind]
    direction = str(get("direction", "forward"))
    count = 2 if direction == "bidirectional" else 1
    asked = [str(name) for name in get("activations", usual * count)]
    mode = _MODES.get((kind, tuple(asked[: len(usual)])))
    if mode is None or asked != asked[: len(usual)] * count:
        raise node.refuse(f"its activations are {', '.join(asked)}; the usual ones are {', '.join(usual)}")
    if get("clip") or get("input_forget", 0):
        raise node.refuse("it clips its gates, or couples two of them")
    lengths = node.constant(4)
    if _given(node, 4) and (not node.is_number(4) or (lengths is not None and len(set(whole(lengths))) > 1)):
        raise node.refuse("its sequences have lengths of their own")
    if kind == "LSTM" and _given(node, 7):
        raise node.refuse("its gates see the cell (peepholes)")
    if not all(node.is_constant(index) for index in (1, 2) + ((3,) if _given(node, 3) else ())):
        raise node.refuse("its weights are computed")
    if get("layout", 0):
        raise node.refuse("its batch is the first axis (layout=1), which onnxruntime can't run")
    # States of zeros are left to PyTorch, because theirs is the width that may be cut.
    states = [None if node.is_zero(index) else node.source(index) for index in ((5, 6) if kind == "LSTM" else (5,))]
    if kind == "GRU" and not get("linear_before_reset", 0):
        call = partial(_reset_first, gates=_GATES[kind], direction=direction, name=node.where)
        node.run(call, *(node.source(index) for index in range(5)), *states)
    else:
        _layer(node, mode, direction, states)


def _layer(node: Node, mode: str, direction: str, states: Sequence[Source]) -> None:
    weight, from_state = node.constant(1), node.constant(2)
    assert weight is not None
    assert from_state is not None
    sizes = weight.shape[2], from_state.shape[2]
    module = Recurrent(mode, *sizes, bias=_given(node, 3), direction=direction, name=node.where)
    node.recurrent(module, _GATES[node.operator], node.source(0), node.source(4), *states)


class Recurrent(nn.RNNBase):
    """A recurrent layer that returns what the file's does: the outputs by step and direction, and the last states."""

    def __init__(self, mode: str, inputs: int, units: int, *, bias: bool, direction: str, name: str) -> None:
        super().__init__(mode, inputs, units, bias=bias, bidirectional=direction == "bidirectional", device="meta")
        self.direction, self.name = direction, name

    def forward(self, x: Tensor, lengths: Any, *states: Any) -> tuple[Tensor, ...]:
        """All outputs: those of each step, and the last states.

        Args:
            x: steps x batch x inputs.
            lengths: the sequences' lengths, which must be the number of steps; None if the file gives none.
            states: the first states, directions x batch x units; None for zeros.

        Raises:
            InputError: the first states are for another batch, or of another size, or a sequence is shorter.
        """
        _check_lengths(lengths, x, self.name)
        ends = ("", "_reverse") if self.bidirectional else ("",)
        names = ("weight_ih_l0", "weight_hh_l0", *(("bias_ih_l0", "bias_hh_l0") if self.bias else ()))
        parts = [getattr(self, f"{name}{end}") for end in ends for name in names]
        call = partial(_CALLS[self.mode], params=parts, has_biases=self.bias, num_layers=1, dropout=0.0, train=False,
                       bidirectional=self.bidirectional, batch_first=False)  # fmt: skip
        return _run(call, x, states, (len(ends), x.shape[1], parts[1].shape[1]), self.direction, self.name)


def _given(node: Node, index: int) -> bool:
    if index >= node.operands:
        return False
    return node.is_constant(index) or node.source(index) is not None


def _run(
    call: Any, x: Tensor, states: Sequence[Any], wanted: tuple[int, int, int], direction: str, name: str
) -> tuple[Tensor, ...]:
    """What a layer returns, by PyTorch's function: see :meth:`Recurrent.forward`."""
    # PyTorch doesn't check the states' shapes here, and reads memory that is not theirs.
    given = [x.new_zeros(wanted) if state is None else _of_batch(_like(state, x), wanted, name) for state in states]
    x = x.flip(0) if direction == "reverse" else x
    each, *last = call(x, hx=given if len(given) > 1 else given[0])
    each = each.flip(0) if direction == "reverse" else each
    return each.reshape(*each.shape[:2], wanted[0], wanted[2]).transpose(1, 2), *last


def _reset_first(
    x: Tensor,
    from_input: Any,
    from_state: Any,
    bias: Any,
    lengths: Any,
    state: Any,
    *,
    gates: Sequence[int],
    direction: str,
    name: str,
) -> tuple[Tensor, ...]:
    """What a GRU returns whose reset gate acts before the product with the state.

    Its weights are taken as they are in the file: directions x (gates x units) x inputs or units, and the bias
    directions x (2 x gates x units), or None.
    """
    _check_lengths(lengths, x, name)
    from_input, from_state, bias = (_like(value, x) for value in (from_input, from_state, bias))
    directions, _, units = from_state.shape
    order = torch.as_tensor(np.concatenate([np.arange(gate * units, (gate + 1) * units) for gate in gates]))
    order = order.to(x.device)
    parts = []
    for one in range(directions):
        parts += [from_input[one][order], from_state[one][order]]
        if bias is not None:
            first, second = bias[one].chunk(2)
            parts += [first[order], second[order]]
    call = partial(_gru_that_resets_first, params=parts, has_biases=bias is not None)
    return _run(call, x, [state], (directions, x.shape[1], units), direction, name)


def _check_lengths(lengths: Any, x: Tensor, name: str) -> None:
    """Raise InputError for sequences that end before the last step. Exporters state the lengths of all as well."""
    if lengths is not None and any(length != x.shape[0] for length in whole(lengths)):
        raise InputError(
            f"{name} has sequences of lengths {sorted(set(whole(lengths)))}, and {x.shape[0]} steps; only sequences "
            "over all steps can be read"
        )


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


def _gru_that_resets_first(x: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool) -> tuple[Tensor, Tensor]:
    """A GRU whose reset gate acts before the product with the state, which PyTorch does not have.

    It takes the arguments of ``torch.gru``; a second direction is run if there are parts for it.
    """
    each, last, count = [], [], 4 if has_biases else 2
    for one, state in enumerate(hx):
        from_input, from_state, *biases = params[one * count : (one + 1) * count]
        first, second = biases if has_biases else (None, None)
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
