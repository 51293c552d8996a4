"""Runs a model and reports the inputs of its consumers and the statistics at its batch norms.

The PyTorch functions that the user's modules call are intercepted (see `lbyl.runtime.intercept`). So custom layers,
with their own padding or functional calls, need no special treatment, and no module is changed or hooked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbyl.runtime.attended import Attended, at_attended, attended_positions
from lbyl.runtime.contexts import without_checkpoints
from lbyl.runtime.contractions import PRODUCTS, factors_of, linear_axes
from lbyl.runtime.copying import call_with
from lbyl.runtime.grouped import GROUPED
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.intercept import FunctionInterceptor, Names, leading_arguments, names_by_id
from lbyl.runtime.layer_norms import LookAheadNorms, NormMasks, statistics_of_kept


@dataclass(frozen=True)
class ConsumerCall:
    """One call of a layer that mixes channels.

    ``stride``, ``padding`` and ``dilation`` have one number for each axis; for a linear layer they are empty. ``fed``
    is the input that the cut layer will get in place of ``x``, at the kept channels, where a layer norm changes it.
    Positions that an attention mask excludes are left out.

    For experts of a mixture, the positions are sorted by expert, and ``ends`` holds where the positions of each expert
    end. Input and output are multiplied by the router's weight of the expert, if the model multiplies the output by it.
    """

    weight: str
    op: str
    x: Tensor
    out: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    fed: Tensor | None = None
    ends: Tensor | None = None


OnConsumer = Callable[[ConsumerCall], None]
OnNorm = Callable[[str, str, Tensor, Tensor], None]
"""Called as ``on_norm(name of the running mean, name of the running variance, mean, variance)``, where mean and
(biased) variance are this batch's, at the input of the batch norm, and can be differentiated."""


def _without_asking(function: Any) -> FunctionType:
    """A copy of a Python function of `torch.nn.functional` that is not intercepted itself; its inner calls are."""
    unasked = {**vars(functional), "has_torch_function": lambda tensors: False}
    twin = FunctionType(function.__code__, unasked, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


_ATTENTION = _without_asking(functional.multi_head_attention_forward)
"""With this copy, interceptors see the linear layers that attention calls, and not only attention as a whole."""


class _Enough(Exception):
    """Raised inside a forward pass to end it early."""


def run_intercepted(
    model: nn.Module,
    inputs: ExampleInputs,
    *,
    values: Mapping[str, Tensor] | None = None,
    on_consumer: OnConsumer | None = None,
    on_norm: OnNorm | None = None,
    batch_statistics: bool = False,
    stop_after: str | None = None,
    kept: NormMasks | None = None,
    foresee: Collection[str] | None = None,
    everywhere: bool = False,
) -> Any:
    """Run a model that is in evaluation mode, and report the calls of its consumers and batch norms.

    Args:
        model: the network; nothing in it is changed.
        inputs: the inputs of the model.
        values: parameters and buffers to use instead of the model's own, by name.
        on_consumer: called for every convolution and linear layer on a named weight.
        on_norm: called for every batch normalization, before it acts.
        batch_statistics: normalize with the mean and variance of this batch instead of the running ones.
        stop_after: name of a weight; the pass ends, and returns None, after the layer with this weight has run.
        kept: the kept channels at layer norms, by the names of their weights. Statistics are taken over these channels.
        foresee: names of consumers' weights. If given, layer norms keep their usual statistics, and the reported calls
            of these consumers also hold the input that they will have after the layer norms are cut.
        everywhere: also report positions that an attention mask excludes.
    """
    names = names_by_id(model, values)
    ahead = LookAheadNorms(kept, names, foresee) if kept and foresee is not None else None
    statistics = ahead or statistics_of_kept(model, kept or {}, names)
    attended = {} if everywhere else attended_positions(model, inputs)
    calls = _LayerCalls(names, on_consumer, on_norm, batch_statistics, stop_after, ahead, attended)
    try:
        with statistics, calls:
            found = call_with(model, inputs, values or {})
            calls.finish()
            return found
    except _Enough:
        return None


# Positions of the input and of the weight, stored input first, among the arguments of a matrix product.
_PRODUCTS: dict[Any, tuple[int, int]] = {torch.addmm: (1, 2), **dict.fromkeys(PRODUCTS, (0, 1))}
_TURNS = (
    *(torch.Tensor.t, torch.Tensor.transpose, torch.Tensor.permute, torch.Tensor.swapaxes, torch.Tensor.swapdims),
    *(torch.t, torch.transpose, torch.permute, torch.swapaxes, torch.swapdims),
    *(torch.Tensor.T.__get__, torch.Tensor.mT.__get__),  # pyright: ignore
)
_VIEWS = frozenset(
    getattr(place, name)
    for place in (torch, torch.Tensor)
    for name in ("squeeze", "unsqueeze", "view", "reshape", "flatten", "unflatten", "contiguous", "detach")
    if hasattr(place, name)
)
CONVOLUTIONS: dict[Any, int] = {functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3}
CONVOLVED = frozenset(f"conv{axes}d" for axes in CONVOLUTIONS.values())
TRANSPOSED: dict[Any, int] = {
    functional.conv_transpose1d: 1,
    functional.conv_transpose2d: 2,
    functional.conv_transpose3d: 3,
}
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
_TIMES = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__)
BATCH_NORM = inspect.signature(functional.batch_norm)


class _LayerCalls(FunctionInterceptor):
    """Reports the calls of consumers and batch norms; see :func:`run_intercepted` for its arguments."""

    def __init__(
        self,
        names: Names,
        on_consumer: OnConsumer | None,
        on_norm: OnNorm | None,
        batch_statistics: bool,
        stop_after: str | None,
        ahead: LookAheadNorms | None,
        attended: Attended,
    ) -> None:
        super().__init__(names)
        self.on_consumer, self.on_norm = on_consumer, on_norm
        self.batch_statistics, self.stop_after = batch_statistics, stop_after
        self.ahead, self.attended = ahead, attended
        self._turned: dict[int, tuple[str, Tensor]] = {}  # transposed weights, by their ids
        self._shaped: dict[int, tuple[str, Tensor, Tensor]] = {}  # names, weights, and views of them, by the views' ids
        self._waiting: tuple[str, Tensor, Tensor, Tensor] | None = None  # a call of experts

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is functional.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _PRODUCTS and kwargs and kwargs.keys() <= {"other", "mat2"}:
            args, kwargs = (*args, *kwargs.values()), {}
        if func is functional.linear or func in CONVOLUTIONS:
            _, weight = leading_arguments(args, kwargs, "input", "weight")
            self._report(weight, lambda name: consumer_call(func, name, out, *args, **kwargs))
        elif func in TRANSPOSED:
            self._transposed(func, out, *args, **kwargs)
        elif (
            func in _PRODUCTS
            and len(args) > _PRODUCTS[func][1]
            and not kwargs
            and self._named(args[_PRODUCTS[func][1]])
        ):
            x, weight = (args[place] for place in _PRODUCTS[func])
            self._report(weight, lambda name: ConsumerCall(name, "linear", x, out))
        elif factors := factors_of(func, args, kwargs):
            self._linear(*factors, out)
        elif func is GROUPED and GROUPED is not None:
            self._experts(*args, **kwargs, out=out)
        elif func in _TURNS and isinstance(out, Tensor) and (name := self.name_of(args[0])):
            self._turned[id(out)] = name, out
        elif func in _VIEWS and isinstance(out, Tensor):
            self._view(args[0], out)
        elif func in _RECURRENT or func in _CELLS:
            self._recurrent(func, out, args, kwargs)
        elif self._waiting and func in _TIMES and args[0] is self._waiting[2]:
            self.finish(args[1])
        return out

    def _linear(self, factors: list[Tensor], names: list[str], labels: str, out: Tensor) -> None:
        """Report a sum of products if one factor is a named matrix that mixes channels of the other one."""
        for x, matrix in ((0, 1), (1, 0)):
            axes = linear_axes(names[x], names[matrix], labels) if self._named(factors[matrix]) else None
            if axes:
                read, made = factors[x].movedim(axes.read, -1), out.movedim(axes.made, -1)
                read = factors[x] if axes.read == factors[x].dim() - 1 else read  # norms know it by its identity
                self._report(factors[matrix], lambda name, x=read, y=made: ConsumerCall(name, "linear", x, y))
                return

    def _transposed(
        self,
        func: Any,
        out: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> None:
        """Report a transposed convolution, unless it is grouped: each block of inputs then makes other outputs."""
        if groups == 1:
            axes = TRANSPOSED[func]
            reads = [_each(value, axes) for value in (stride, padding, dilation)]
            op = f"conv_transpose{axes}d"
            self._report(weight, lambda name: ConsumerCall(name, op, input, out, reads[0], reads[1], reads[2]))

    def _recurrent(self, func: Any, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Report what recurrent layers make of their inputs and of their states, where these are known."""
        if self.on_consumer is None and self.stop_after is None:
            return  # nobody asks, and stacked layers would run once more
        of, names = (_of_cell, _CELL) if func in _CELLS else (_of_layers, _LAYERS)
        named: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs)
        given: list[Any] = [named.get(name) for name in names]
        for x, weight, bias in of(func, out, *given):
            self._report(
                weight, lambda name, x=x, w=weight, b=bias: ConsumerCall(name, "linear", x, functional.linear(x, w, b))
            )

    def _view(self, source: Any, out: Tensor) -> None:
        """Remember a view of a named parameter, which may get the parameter's shape again later."""
        name = self.name_of(source)
        name, weight, _ = (name, source, out) if name else self._shaped.get(id(source), ("", out, out))
        if name:
            self._shaped[id(out)] = name, weight, out
            if out.shape == weight.shape:
                self._turned[id(out)] = name, out

    def _named(self, weight: Any) -> bool:
        """Whether a tensor is a named parameter, or a transposed one."""
        return self.name_of(weight) is not None or id(weight) in self._turned

    def _experts(self, x: Tensor, weight: Tensor, *, offs: Tensor | None = None, out: Tensor, **options: Any) -> None:
        """Keep a call of experts until the router's weights are known, by which the model multiplies its output."""
        self.finish()
        name = self.name_of(weight) or self._turned.pop(id(weight), ("",))[0]
        if name and offs is not None:
            self._waiting = name, x, out, offs

    def finish(self, factor: Any = None) -> None:
        """Report the call of experts that is kept, if any, given the router's weights if these are known."""
        if self._waiting is None:
            return
        (name, x, out, ends), self._waiting = self._waiting, None
        if isinstance(factor, Tensor) and factor.shape == (len(x), 1):
            x, out = (x * factor).to(x.dtype), (out * factor).to(out.dtype)
        self._report_as(name, lambda name: ConsumerCall(name, "linear", x, out, ends=ends))

    def _report(self, weight: Any, describe: Callable[[str], ConsumerCall]) -> None:
        """Report a call if its weight is a named parameter of the model, or a transposed one."""
        if name := self.name_of(weight) or self._turned.get(id(weight), ("",))[0]:
            self._report_as(name, describe)

    def _report_as(self, name: str, describe: Callable[[str], ConsumerCall]) -> None:
        if self.on_consumer:
            call = describe(name)
            call = call if self.ahead is None else replace(call, fed=self.ahead.twin(call.x))
            self.on_consumer(at_positions(call, self.attended))
        if name == self.stop_after:
            raise _Enough

    def _batch_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = BATCH_NORM.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        mean_name, var_name = (self.name_of(call[key]) for key in ("running_mean", "running_var"))
        watched = self.on_norm if mean_name is not None and var_name is not None and not call["training"] else None
        if not self.batch_statistics or call["training"]:
            if watched:
                watched(str(mean_name), str(var_name), *channel_statistics(at_attended(self.attended, call["input"])))
            return functional.batch_norm(**call)
        seen = at_attended(self.attended, call["input"])
        if seen is not call["input"]:
            mean, var = channel_statistics(seen)
            if watched:
                watched(str(mean_name), str(var_name), mean, var)
            call["running_mean"], call["running_var"] = mean, var
            return functional.batch_norm(**call)
        out, mean, inverse = _BatchStatistics.apply(call["input"], call["weight"], call["bias"], call["eps"])  # pyright: ignore
        if watched:
            watched(str(mean_name), str(var_name), mean, inverse.square().reciprocal() - call["eps"])
        return out


_Products = Iterator[tuple[Tensor, Tensor, Tensor | None]]
"""Inputs of linear layers, their weights and their biases."""


_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
_LAYERS = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
"""The arguments of PyTorch's functions for recurrent cells and layers."""


def _of_cell(_: Any, __: Any, x: Tensor, state: Any, from_input: Any, from_state: Any, *biases: Any) -> _Products:
    """The products of a recurrent cell: of its input, and of its state."""
    yield x, from_input, biases[0]
    yield _first(state), from_state, biases[1]


def _of_layers(func: Any, out: Any, x: Tensor, state: Any, weights: Any, *options: Any) -> _Products:
    """The products of stacked recurrent layers in each direction: with their inputs, and with their earlier states.

    Layers in between are run once more, one by one, because what they give is not known from outside. Packed sequences
    and projections have no such products.
    """
    if not isinstance(weights, (list, tuple)) or not _first(state).is_floating_point():
        return  # packed sequences have their lengths here
    has_biases, layers, _, _, bidirectional, batch_first = options
    directions, each = 2 if bidirectional else 1, 4 if has_biases else 2
    if len(weights) != layers * directions * each:
        return
    steps = 1 if batch_first and x.dim() == 3 else 0
    for layer in range(layers):
        own = weights[layer * directions * each :][: directions * each]
        states = [part[layer * directions :][:directions] for part in _all(state)]
        if layer < layers - 1:
            begin = tuple(states) if len(states) > 1 else states[0]
            made = func(x, begin, own, has_biases, 1, 0.0, False, bidirectional, batch_first)[0]
        else:
            made = out[0]
        for number, units in enumerate(made.chunk(directions, -1)):
            parts = own[number * each :]
            yield x, parts[0], parts[2] if has_biases else None
            start, lasting = states[0][number].unsqueeze(steps).to(units), units.shape[steps] - 1
            before = (
                [start, units.narrow(steps, 0, lasting)] if number == 0 else [units.narrow(steps, 1, lasting), start]
            )
            yield torch.cat(before, steps), parts[1], parts[3] if has_biases else None
        x = made


def _all(state: Any) -> Sequence[Tensor]:
    """The states that a layer keeps from step to step: two for LSTM."""
    return state if isinstance(state, (list, tuple)) else [state]


def _first(state: Any) -> Tensor:
    """The hidden state, which LSTM keeps beside another one."""
    return _all(state)[0]


def at_positions(call: ConsumerCall, attended: Attended) -> ConsumerCall:
    """A call of a linear layer, restricted to the positions that an attention mask allows.

    Positions of experts are not in the order of the mask, so all of them stay.
    """
    if not attended or call.op != "linear" or call.ends is not None:
        return call
    fed = None if call.fed is None else at_attended(attended, call.fed)
    return replace(call, x=at_attended(attended, call.x), out=at_attended(attended, call.out), fed=fed)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel, which can be differentiated."""
    if x.numel() and x.device.type in _WITH_KERNEL:
        return _Statistics.apply(x)  # pyright: ignore
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], unbiased=False)
    return mean, var


_WITH_KERNEL = ("cpu", "cuda")
"""Types of devices with the kernel by which batch norms measure statistics."""


class _Statistics(torch.autograd.Function):
    """Mean and variance of each channel by a kernel of batch norms: on CPU, `var_mean` takes many times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        ctx.save_for_backward(x, mean)
        return mean.to(x.dtype), var.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:  # pyright: ignore
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        # d var / dx = 2 (x - mean) / count
        slope = 2 * grad_var / count
        view = [1, -1] + [1] * (x.dim() - 2)
        return (x * slope.reshape(view)).add_((grad_mean / count - slope * mean).reshape(view))


class _BatchStatistics(torch.autograd.Function):
    """Batch normalization with the batch's own statistics, which are returned and can be differentiated.

    One kernel computes output, mean and inverse deviation. Computing them separately makes a step of dreaming several
    times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:  # pyright: ignore
        out, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return out, mean, inverse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_mean: Tensor, grad_inverse: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, mean, inverse = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        grad = torch.ops.aten.native_batch_norm_backward(
            grad_out, x, weight, None, None, mean, inverse, True, ctx.eps, [True, False, False]
        )[0]
        # d inverse / dx = -inverse^3 (x - mean) / count
        slope = -grad_inverse * inverse**3 / count
        view = [1, -1] + [1] * (x.dim() - 2)
        # In place, because allocating memory of this size takes several times as long as the sums.
        grad.addcmul_(x, slope.reshape(view)).add_((grad_mean / count - slope * mean).reshape(view))
        return grad, None, None, None


def consumer_call(
    func: Any,
    name: str,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> ConsumerCall:
    """Describe the call of a convolution or linear function by its arguments; only the weight's shape is used."""
    if func is functional.linear:
        return ConsumerCall(name, "linear", input, out)
    axes = CONVOLUTIONS[func]
    stride, dilation = _each(stride, axes), _each(dilation, axes)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        # `unfold` can't pad unequally, so the input is padded here.
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        input, padding = functional.pad(input, sides), 0
    return ConsumerCall(name, f"conv{axes}d", input, out, stride, _each(padding, axes), dilation)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return (int(value),) * axes if isinstance(value, int) else tuple(int(v) for v in value) * (axes // len(value))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off gradients of all parameters within the context, so that backward passes only reach the inputs.

    Checkpoints keep their activations, see :func:`lbyl.runtime.contexts.without_checkpoints`.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        with without_checkpoints():
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
