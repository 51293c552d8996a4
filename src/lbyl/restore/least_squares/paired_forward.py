"""Two networks in one forward pass: the original, and the one that is cut as far as the pass has come.

All probes are in one batch, once for each network. So a layer can be solved when its output is first asked for: all
that comes before it is cut by then. Where that output goes into a sum (a residual one, mostly), the layer can also make
up for what the sum's other operand has lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from lbyl.restore.least_squares.recalibrate import Statistics, expected_shift, variance_change
from lbyl.runtime.batches import join, layout
from lbyl.runtime.forward import BATCH_NORM, CONVOLUTIONS, ConsumerCall, consumer_call
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.intercept import FunctionInterceptor, names_by_id
from lbyl.runtime.seeding import generator_for, sample_positions

_FAINT = 1e-3
"""A channel that enters the sum with less than this share of the largest gain can't make up for anything."""


_POSITIONS = 16384
"""How many outputs are looked at to tell how a change depends on the output."""


class NotPairable(Exception):
    """The two networks can't be run as one; the message says why."""


@dataclass(frozen=True)
class ConsumerDue:
    """A consumer whose output is asked for, so that it has to be solved now.

    Attributes:
        calls: its call in the cut network, batch by batch; ``out`` is the original network's output.
        wanted: what the output should be, batch by batch: the original one, and what makes up for the sum.
    """

    calls: tuple[ConsumerCall, ...]
    wanted: tuple[Tensor, ...]


@dataclass(frozen=True)
class PairedPass:
    """The result of one paired pass.

    Attributes:
        original: mean and variance that each batch norm of the original network normalized with.
        cut: the same of the cut network.
        made_up: the consumers that made up for the other operand of a sum, by the names of their weights.
        missing: how much higher the mean at some batch norms will be on inputs that match their running means than
            probes say, by the names of these means.
    """

    original: Statistics
    cut: Statistics
    made_up: tuple[str, ...]
    missing: Mapping[str, Float[Tensor, " channels"]]


def run_paired(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    consumers: Collection[str],
    values: Mapping[str, Tensor],
    solve: Callable[[ConsumerDue], None],
    *,
    batch_statistics: bool,
    renorm: bool,
) -> PairedPass:
    """Run the original and the cut network side by side; let each consumer be solved when its turn comes.

    A consumer that goes into a sum ``s = bn(y) + o`` is asked for ``y + (o - o_cut) / gain``, where ``gain`` is the
    batch norm's weight over its standard deviation, channel by channel, or 1 where there is none: then the sum is
    what it was, whatever its other operand ``o`` has lost (He, Zhang, Sun, ICCV 2017, section 3.2). Any other consumer
    is asked for its original output.

    Args:
        model: the unpruned network in evaluation mode; nothing in it is changed.
        batches: probes that differ in their number only.
        consumers: names of the weights that are solved for: convolutions and linear layers that run once.
        values: parameters and buffers of the cut network that differ from the model's. Each is looked up when it is
            used: ``solve`` puts new ones in.
        solve: called for each consumer, in the order in which their outputs are asked for.
        batch_statistics: normalize with the mean and variance of each batch of the original network.
        renorm: let the cut network's batch norms follow it as they are reached, as
            :func:`lbyl.restore.least_squares.recalibrate.renormalize`
            does; but behind a consumer that is solved, the mean is the one that was asked for.

    With batch statistics, :func:`lbyl.restore.least_squares.recalibrate.expected_shift`
    tells what the means of these batch norms, and of all
    that follow, leave out.

    Raises:
        NotPairable: the probes differ in shape, or the network does what can't be done for two at once.
    """
    both = _PairedForward(model, batches, consumers, values, solve, batch_statistics, renorm)
    whole = _joined(batches)
    with both:
        whole.call(model)
    both.settle_rest()
    return PairedPass(both.original, both.cut, tuple(both.made_up), both.missing)


def _joined(batches: Sequence[ExampleInputs]) -> ExampleInputs:
    """All batches as one, and once more."""
    first = [t.shape[1:] for t in batches[0].tensors()]
    if batches[0].rows is not None:
        raise NotPairable(f"the network takes {batches[0].rows} inputs at a time, no more and no fewer")
    for batch in batches:
        tensors = batch.tensors()
        if [t.shape[1:] for t in tensors] != first or any(not t.dim() or len(t) != len(tensors[0]) for t in tensors):
            raise NotPairable("the probes differ in shape, or not every input has a row a probe")
    return join([*batches, *batches])


@dataclass
class _Pending:
    """A consumer that has run in the original network only.

    Attributes:
        run: runs it on an input with some weight and bias.
        name: of its weight.
        tensors: its input in both networks, its weight and its bias.
        call: what the call was, on a part of the input and of the output.
        out: its output; the cut network's half is not there yet.
        version: of its input, which nobody may change meanwhile.
        normed: the output of the batch norm behind it, and what fills in the cut network's half of that.
        gains: what that batch norm multiplies by, batch by batch.
        wanted: what the consumer was asked for, where that is not its original output.
    """

    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    name: str
    tensors: tuple[Tensor, Tensor, Tensor | None]
    call: Callable[[Tensor, Tensor], ConsumerCall]
    out: Tensor
    version: int
    normed: tuple[Tensor, Callable[[Tensor], None]] | None = None
    gains: list[Tensor] = field(default_factory=list)
    wanted: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """What the network would go on with."""
        return self.normed[0] if self.normed else self.out


@dataclass(frozen=True)
class _NormCall:
    """A call of a batch norm.

    Attributes:
        x: its input in both networks.
        weight: gamma.
        bias: beta.
        eps: added to the variance.
        running: its running mean and variance.
        names: the names of these two.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    running: tuple[Tensor, Tensor]
    names: tuple[str, str]

    def normalize(self, part: Tensor, mean: Tensor, var: Tensor, into: Tensor) -> None:
        """Normalize a part of the input with these statistics."""
        mean, var = mean.to(self.x.dtype), var.to(self.x.dtype)
        into.copy_(functional.batch_norm(part, mean, var, self.weight, self.bias, False, 0.0, self.eps))


@dataclass(frozen=True)
class _Normed:
    """A batch norm that has run in the original network.

    Attributes:
        call: how it was called.
        original: its input in the original network.
        out: its output in both networks.
        sizes: how many rows share their statistics: those of a batch, or all.
        used: mean and variance that it normalized with, part by part.
        measured: mean and variance of its input, part by part; the running ones where nobody needs them.
        item: the consumer before it, where that is pending.
    """

    call: _NormCall
    original: Tensor
    out: Tensor
    sizes: Sequence[int]
    used: Sequence[tuple[Tensor, Tensor]]
    measured: Sequence[tuple[Tensor, Tensor]]
    item: _Pending | None


# ``x + y`` and ``x += y`` come as methods.
_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__)
_ASKING = ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size")
_ASKED = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "is_sparse", "is_mkldnn")


class _PairedForward(FunctionInterceptor):
    """Makes each call for both networks; see :func:`run_paired` for its arguments."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[ExampleInputs],
        consumers: Collection[str],
        values: Mapping[str, Tensor],
        solve: Callable[[ConsumerDue], None],
        batch_statistics: bool,
        renorm: bool,
    ) -> None:
        super().__init__(names_by_id(model))
        self.sizes = [len(batch.tensors()[0]) for batch in batches]
        self.half = sum(self.sizes)
        self.consumers, self.values, self.solve = set(consumers), values, solve
        self.batch_statistics, self.renorm = batch_statistics, renorm
        self.pending: dict[int, _Pending] = {}
        self.original: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.cut: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.made_up: list[str] = []
        self.missing: dict[str, Tensor] = {}

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call for both networks at once, or once for each where their weights differ."""
        if _only_asks(func):
            return func(*args, **kwargs)
        if func is functional.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            self._add(*args)
            return func(*args)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._settle(tensor)
        if func is functional.linear or func in CONVOLUTIONS:
            return self._read(func, *args, **kwargs)
        for tensor in tensors:
            name = self.name_of(tensor)
            if name in self.values:
                raise NotPairable(f"{name} is used by {getattr(func, '__name__', func)}, not by its layer alone")
        return func(*args, **kwargs)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of both networks."""
        if len(x) != 2 * self.half:
            raise NotPairable(
                f"a layer sees {len(x)} rows of {2 * self.half} probes: the batch is not its first dimension"
            )
        return x[: self.half], x[self.half :]

    def _twice(self, original: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """What a layer gives, and as many rows again that are not yet filled in."""
        # Batch by batch: a whole output beside the one that it is copied to would be the largest thing in memory.
        parts = original.split(self.sizes)
        first = run(parts[0])
        shape = (2 * self.half, *first.shape[1:])
        out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout(first))
        places = out[: self.half].split(self.sizes)
        places[0].copy_(first)
        for part, place in zip(parts[1:], places[1:], strict=True):
            place.copy_(run(part))
        return out

    def _fill(self, out: Tensor, cut: Tensor, run: Callable[[Tensor], Tensor]) -> None:
        """Put what a layer gives the cut network into the half that is for it."""
        for part, place in zip(cut.split(self.sizes), out[self.half :].split(self.sizes), strict=True):
            place.copy_(run(part))

    def _now(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor as the cut network has it."""
        return None if tensor is None else self.values.get(self.name_of(tensor) or "", tensor)

    # -- consumers ---------------------------------------------------------------------------------------

    def _read(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return func(x, weight, bias, *args, **kwargs)

        name = self.name_of(weight) or ""
        new_weight, new_bias = self._now(weight), self._now(bias)
        waits = name in self.consumers
        if not waits and new_weight is weight and new_bias is bias:
            return run(input, weight, bias)
        original, cut = self._halves(input)
        out = self._twice(original, lambda part: run(part, weight, bias))
        if not waits:
            self._fill(out, cut, lambda part: run(part, new_weight, new_bias))
            return out

        def call(x: Tensor, out: Tensor) -> ConsumerCall:
            return consumer_call(func, name, out, x, weight, bias, *args, **kwargs)

        self.consumers.discard(name)
        self.pending[id(out)] = _Pending(run, name, (input, weight, bias), call, out, input._version)
        return out

    def _settle(self, tensor: Tensor, other: Tensor | None = None) -> None:
        """If this is a pending output, solve its consumer and fill in what the cut network gives.

        ``other`` is what it is going to be added to.
        """
        item = self.pending.get(id(tensor))
        if item is None:
            return
        x, weight, bias = item.tensors
        if x._version != item.version:
            raise NotPairable(f"the input of {item.name} was changed in place before its output was used")
        outs = self._halves(item.out)[0].split(self.sizes)
        wanted = list(outs)
        if other is not None and tensor is item.last:
            # Part by part into one tensor: each of these is as large as any in the network.
            item.wanted = torch.empty_like(self._halves(item.out)[0])
            wanted = list(item.wanted.split(self.sizes))
            lost = zip(*(half.split(self.sizes) for half in self._halves(other)), strict=True)
            for place, out, (a, b), gain in zip(wanted, outs, lost, item.gains or [None] * len(outs), strict=True):
                torch.sub(a, b, out=place)
                if gain is not None:
                    heard = gain.abs() > _FAINT * gain.abs().max()
                    place *= torch.where(heard, 1 / gain, 0).reshape(-1, *[1] * (place.dim() - 2))
                place += out
            self.made_up.append(item.name)
        cut = self._halves(x)[1]
        calls = [item.call(part, out) for part, out in zip(cut.split(self.sizes), outs, strict=True)]
        self.solve(ConsumerDue(tuple(calls), tuple(wanted)))
        self.pending = {key: each for key, each in self.pending.items() if each is not item}
        new_weight = self._now(weight)
        assert new_weight is not None
        new_bias = self._now(bias)
        self._fill(item.out, cut, lambda part: item.run(part, new_weight, new_bias))
        if item.normed:
            item.normed[1](self._halves(item.out)[1])
            # It refers to the item in its turn, and the largest tensors here must not wait for the garbage collector.
            item.normed = None

    def settle_rest(self) -> None:
        """Solve what nobody has asked for."""
        for item in list(self.pending.values()):
            self._settle(item.out)

    def _add(self, a: Any, b: Any) -> None:
        """Before two operands are added: if one is a pending output, it makes up for the other."""
        both = [t for t in (a, b) if isinstance(t, Tensor)]
        waiting = [t for t in both if id(t) in self.pending]
        if len(both) < 2 or a is b or a.shape != b.shape:
            for tensor in waiting:
                self._settle(tensor)
            return
        if len(waiting) == 2:
            # The one that ran later has the other's sum to look after only once it is there itself.
            order = list(self.pending)
            waiting.sort(key=lambda t: order.index(id(t)))
            self._settle(waiting.pop())
        for tensor in waiting:
            self._settle(tensor, b if tensor is a else a)

    # -- batch norms -----------------------------------------------------------------------------------

    def _batch_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self._norm_call(*args, **kwargs)
        item = self.pending.get(id(call.x))
        if item and item.normed:
            self._settle(call.x)
            item = None
        original, cut = self._halves(call.x)
        normed = self._normalize_original(call, original, item)
        if item is None:
            self._normalize_cut(normed, cut)
            return normed.out
        scale = torch.ones_like(call.running[1]) if call.weight is None else call.weight
        gains = [scale / (var + call.eps).sqrt() for _, var in normed.used]
        item.gains = gains if len(gains) == len(self.sizes) else gains * len(self.sizes)
        item.normed = normed.out, partial(self._normalize_cut, normed)
        self.pending[id(normed.out)] = item
        return normed.out

    def _norm_call(self, *args: Any, **kwargs: Any) -> _NormCall:
        bound = BATCH_NORM.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        running = call["running_mean"], call["running_var"]
        mean_name, var_name = (self.name_of(tensor) for tensor in running)
        if call["training"] or mean_name is None or var_name is None:
            raise NotPairable("a batch norm normalizes with the statistics of its batch")
        if any(self._now(t) is not t for t in (call["weight"], call["bias"])):
            raise NotPairable(f"weight or bias of the batch norm at {mean_name} were changed")
        return _NormCall(call["input"], call["weight"], call["bias"], call["eps"], running, (mean_name, var_name))

    def _normalize_original(self, call: _NormCall, original: Tensor, item: _Pending | None) -> _Normed:
        """Normalize the original network's half; the other one is not yet filled in."""
        # Running statistics hold for all probes, a batch's own for that batch.
        sizes = self.sizes if self.batch_statistics else [self.half]
        out, measured = torch.empty_like(call.x), []
        for part, into in zip(original.split(sizes), out[: self.half].split(sizes), strict=True):
            if not self.batch_statistics:
                call.normalize(part, *call.running, into)
            if self.batch_statistics or self.renorm:
                own, mean, var = _own(part, call.weight, call.bias, call.eps)
                measured.append((mean, var))
                if self.batch_statistics:
                    into.copy_(own)
            else:
                measured.append(call.running)
        used = measured if self.batch_statistics else [call.running]
        return _Normed(call, original, out, sizes, used, measured, item)

    def _normalize_cut(self, normed: _Normed, cut: Tensor) -> None:
        """Fill in the cut network's half of what a batch norm gives, now that its input there is known."""
        call, item = normed.call, normed.item
        mean_name, var_name = call.names
        new_running_mean = self._now(call.running[0])
        assert new_running_mean is not None
        shift = new_running_mean - call.running[0]
        used = []
        for part, place, (mean, var), (own_mean, own_var) in zip(
            cut.split(normed.sizes),
            normed.out[self.half :].split(normed.sizes),
            normed.used,
            normed.measured,
            strict=True,
        ):
            new_mean, new_var = mean + shift, var
            if self.renorm:
                _, cut_mean, cut_var = _own(part, call.weight, call.bias, call.eps)
                alive, ratio = variance_change(own_var, cut_var, call.running[1])
                new_var = torch.where(alive, var * ratio, var)
                if item is None:
                    new_mean = torch.where(alive, mean + (cut_mean - own_mean), new_mean)
            call.normalize(part, new_mean, new_var, place)
            used.append((new_mean, new_var))
        if self.batch_statistics and (item or self.renorm):
            asked = normed.original if item is None or item.wanted is None else item.wanted
            gap = call.running[0].double() - _mean(normed.measured)[0]
            self.missing[mean_name] = _beyond_probes(normed.original, asked, cut, gap)
        self.original[mean_name, var_name], self.cut[mean_name, var_name] = _mean(normed.used), _mean(used)


def _own(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """A batch normalized with its own mean and (biased) variance, and these: one kernel gives all three."""
    out, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return out, mean, (inverse.square().reciprocal() - eps).clamp_min(0)


def _beyond_probes(original: Tensor, asked: Tensor, given: Tensor, gap: Tensor) -> Tensor:
    """How what an output lacks moves along with the original's mean; see `expected_shift`."""
    rows = [t.flatten(2).transpose(1, 2) if t.dim() > 2 else t[:, None] for t in (original, asked, given)]
    count, places = rows[0].shape[:2]
    chosen = sample_positions(count * places, _POSITIONS, generator_for(0, "positions"))
    index = (torch.arange(count * places) if chosen is None else chosen).to(original.device)
    # Picked before anything is computed: whole outputs are large.
    y, wanted, found = (t[index // places, index % places] for t in rows)
    return expected_shift(y, y + (found - wanted), gap)


def _mean(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    mean, var = (torch.stack(each).double().mean(0) for each in zip(*parts, strict=True))
    return mean, var


def _only_asks(func: Any) -> bool:
    """Whether a function only asks for shape, kind or place of a tensor."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _ASKED
    return name in _ASKING
