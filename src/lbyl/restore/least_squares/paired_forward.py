"""Runs the original and the cut network in one forward pass, and solves each consumer when it is reached.

All probes are in one batch, once for each network. A layer is solved when its output is first used; all layers before
it are cut by then. If that output is added to another value (usually in a residual connection), the layer can also
compensate for the error of the other operand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from lbyl.restore.least_squares.recalibrate import Regression, Statistics, variance_change
from lbyl.restore.least_squares.recall import Recall
from lbyl.runtime.batch_axis import rows_per_input
from lbyl.runtime.batches import join, layout
from lbyl.runtime.forward import BATCH_NORM, CONVOLUTIONS, ConsumerCall, consumer_call
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.intercept import FunctionInterceptor, names_by_id
from lbyl.runtime.seeding import generator_for, sample_positions

_FAINT = 1e-3
"""Channels whose gain is less than this share of the largest gain do not compensate for the other operand."""


_POSITIONS = 16384
"""How many outputs are sampled for the regression of a change on the output."""


class NotPairable(Exception):
    """The two networks can't be run in one pass; the message says why."""


@dataclass(frozen=True)
class ConsumerDue:
    """A consumer whose output is needed, so that it has to be solved now.

    Attributes:
        calls: its calls in the cut network, batch by batch; ``out`` is the original network's output.
        wanted: the target for its output, batch by batch: the original output, plus the compensation for a sum.
        whole: the same calls as one.
        whole_wanted: the target for its output.
    """

    calls: tuple[ConsumerCall, ...]
    wanted: tuple[Tensor, ...]
    whole: ConsumerCall
    whole_wanted: Tensor


@dataclass(frozen=True)
class PairedPass:
    """The result of one paired pass.

    Attributes:
        original: mean and variance with which each batch norm of the original network normalized.
        cut: the same for the cut network.
        made_up: names of the weights of consumers that compensated for the other operand of a sum.
        missing: corrections of the means at some batch norms, by the names of their running means: the difference
            between inputs that match the running means and the probes.
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
    recall: Recall | None = None,
) -> PairedPass:
    """Run the original and the cut network in one pass, and solve each consumer when it is reached.

    The target of a consumer whose output y enters a sum ``s = bn(y) + o`` is ``y + (o - o_cut) / gain``, where ``gain``
    is the batch norm's weight divided by its standard deviation for each channel, or 1 without a batch norm. The sum is
    then the original one, whatever the error of its other operand ``o`` (He, Zhang, Sun, ICCV 2017, arXiv 1707.06168,
    section 3.2). The target of all other consumers is their original output.

    Args:
        model: the unpruned network in evaluation mode; nothing in it is changed.
        batches: probes of equal shapes; only the numbers of rows may differ.
        consumers: names of the weights to solve for: convolutions and linear layers that run once.
        values: parameters and buffers of the cut network that differ from the model's. They are looked up at each use,
            because ``solve`` adds new ones.
        solve: called for each consumer, in the order in which their outputs are used.
        batch_statistics: normalize with the mean and variance of each batch of the original network.
        renorm: recalibrate the cut network's batch norms when they are reached, as in
            :func:`lbyl.restore.least_squares.recalibrate.renormalize`. After a solved consumer, the mean is that of its
            target. With batch statistics, the means at these and all later batch norms are corrected by
            :func:`lbyl.restore.least_squares.recalibrate.expected_shift`.
        recall: what earlier passes over these batches kept of the original network, and this one adds to.

    Raises:
        NotPairable: the probes differ in shape, or the network has an operation that can't be run for both at once.
    """
    both = _PairedForward(model, batches, consumers, values, solve, batch_statistics, renorm, recall or Recall())
    whole = _joined(batches)
    with both:
        whole.call(model)
    both.settle_rest()
    if both.consumers:
        raise NotPairable(f"{min(both.consumers)} is used by another function than that of its layer")
    return PairedPass(both.original, both.cut, tuple(both.made_up), both.missing)


def _joined(batches: Sequence[ExampleInputs]) -> ExampleInputs:
    """All batches joined, twice: one half for each network."""
    first = [t.shape[1:] for t in batches[0].tensors()]
    if batches[0].rows is not None:
        raise NotPairable(f"the network takes {batches[0].rows} inputs at a time, no more and no fewer")
    for batch in batches:
        tensors = batch.tensors()
        if [t.shape[1:] for t in tensors] != first or any(not t.dim() or len(t) != len(tensors[0]) for t in tensors):
            raise NotPairable("the probes differ in shape, or some input does not have a row for each probe")
    return join([*batches, *batches])


@dataclass
class _Pending:
    """A consumer that has only run in the original network.

    Attributes:
        run: runs the layer on an input with a weight and a bias.
        name: name of its weight.
        tensors: its input in both networks, its weight and its bias.
        call: describes the call for a part of the input and of the output.
        out: its output; the cut network's half is not filled in yet.
        version: version of its input, which must not be changed in place meanwhile.
        normed: the output of the batch norm after it, and a function that fills in the cut network's half of that.
        gains: the factors of that batch norm, batch by batch.
        wanted: the consumer's target, if it is not its original output.
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
        """The last output: that of the batch norm if there is one, else that of the consumer."""
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
        call: its call.
        original: its input in the original network.
        out: its output in both networks.
        sizes: the numbers of rows that share their statistics: those of each batch, or all rows.
        used: mean and variance with which it normalized, part by part.
        measured: mean and variance of its input, part by part; the running ones if they are not needed.
        item: the consumer before it, if that is pending.
    """

    call: _NormCall
    original: Tensor
    out: Tensor
    sizes: Sequence[int]
    used: Sequence[tuple[Tensor, Tensor]]
    measured: Sequence[tuple[Tensor, Tensor]]
    item: _Pending | None


# ``x + y`` and ``x += y`` are intercepted as methods.
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
        recall: Recall,
    ) -> None:
        super().__init__(names_by_id(model))
        self.sizes = [len(batch.tensors()[0]) for batch in batches]
        self.half = sum(self.sizes)
        self.multiples = rows_per_input(model, batches[0])
        self.consumers, self.values, self.solve = set(consumers), values, solve
        self.batch_statistics, self.renorm, self.recall = batch_statistics, renorm, recall
        recall.begin((tuple(self.sizes), frozenset(consumers), frozenset(values), batch_statistics, renorm))
        self.calls = Counter[str]()
        self.samples: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.pending: dict[int, _Pending] = {}
        self.original: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.cut: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.made_up: list[str] = []
        self.missing: dict[str, Tensor] = {}

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call for both networks at once, or once for each network if their weights differ."""
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
            if name is not None and name in self.values:
                return self._one_by_one(func, args, kwargs, name)
        return func(*args, **kwargs)

    def _one_by_one(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        """Make the call once for each network, because the tensor of this name differs between them."""
        what = f"{name} is also used by {getattr(func, '__name__', func)}, outside of its layer"

        def of(number: int, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if self.name_of(leaf) is not None:
                return self._now(leaf) if number else leaf
            return self._halves(leaf)[number] if leaf.dim() and len(leaf) == 2 * self.half else leaf

        given = [pytree.tree_map(partial(of, number), (args, kwargs)) for number in range(2)]
        found = [func(*own, **named) for own, named in given]
        if not all(isinstance(out, Tensor) and out.dim() and len(out) == self.half for out in found):
            raise NotPairable(what)
        return torch.cat(found)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of both networks."""
        half = self._rows_of(x) * self.half
        return x[:half], x[half:]

    def _rows_of(self, x: Tensor) -> int:
        """How many rows the tensor has for each probe."""
        rows, rest = divmod(len(x), 2 * self.half) if x.dim() else (0, 0)
        if rest or rows not in self.multiples:
            count = len(x) if x.dim() else 0
            if count < 2:
                raise NotPairable(
                    f"a layer sees the same for all of {2 * self.half} probes, such as a table of positions"
                )
            raise NotPairable(
                f"a layer sees {count} rows of {2 * self.half} probes: the batch is not its first dimension"
            )
        return rows

    def _split(self, half: Tensor) -> tuple[Tensor, ...]:
        """One network's rows, batch by batch."""
        rows = len(half) // self.half
        return half.split([rows * size for size in self.sizes])

    def _twice(self, original: Tensor, run: Callable[[Tensor], Tensor], known: Tensor | None = None) -> Tensor:
        """The output of a layer for the original network, followed by as many rows that are not filled in yet."""
        if known is not None:
            shape = (2 * len(original), *known.shape[1:])
            out = torch.empty(shape, dtype=known.dtype, device=known.device, memory_format=layout(known))
            out[: len(original)] = known
            return out
        # Batch by batch, because a whole output and its copy would be the largest tensors in memory.
        parts = self._split(original)
        first = run(parts[0])
        shape = (2 * len(original), *first.shape[1:])
        out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout(first))
        places = self._split(out[: len(original)])
        places[0].copy_(first)
        for part, place in zip(parts[1:], places[1:], strict=True):
            place.copy_(run(part))
        return out

    def _fill(self, out: Tensor, cut: Tensor, run: Callable[[Tensor], Tensor]) -> None:
        """Fill in the cut network's half of a layer's output."""
        for part, place in zip(self._split(cut), self._split(out[len(cut) :]), strict=True):
            place.copy_(run(part))

    def _now(self, tensor: Tensor | None) -> Tensor | None:
        """The cut network's value of a parameter or buffer."""
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
        # A layer that is not solved may run more than once.
        known = self.recall.get(name) if waits else None
        out = self._twice(original, lambda part: run(part, weight, bias), known[0] if known else None)
        if waits and not known:
            # As many products as give one number of the output.
            self.recall.keep(name, [out[: len(original)]], weight[0].numel() / out.element_size())
        if not waits:
            self._fill(out, cut, lambda part: run(part, new_weight, new_bias))
            return out

        def call(x: Tensor, out: Tensor) -> ConsumerCall:
            return consumer_call(func, name, out, x, weight, bias, *args, **kwargs)

        self.consumers.discard(name)
        self.pending[id(out)] = _Pending(run, name, (input, weight, bias), call, out, input._version)
        return out

    def _settle(self, tensor: Tensor, other: Tensor | None = None) -> None:
        """If this is a pending output, solve its consumer and fill in the cut network's half.

        ``other`` is the value that the output is going to be added to, if any.
        """
        item = self.pending.get(id(tensor))
        if item is None:
            return
        x, weight, bias = item.tensors
        if x._version != item.version:
            raise NotPairable(f"the input of {item.name} was changed in place before its output was used")
        out = self._halves(item.out)[0]
        outs = self._split(out)
        wanted = list(outs)
        if other is not None and tensor is item.last:
            # Part by part into one tensor, because these are as large as any tensor of the network.
            item.wanted = torch.empty_like(out)
            wanted = list(self._split(item.wanted))
            lost = zip(*(self._split(half) for half in self._halves(other)), strict=True)
            for place, part, (a, b), gain in zip(wanted, outs, lost, item.gains or [None] * len(outs), strict=True):
                torch.sub(a, b, out=place)
                if gain is not None:
                    heard = gain.abs() > _FAINT * gain.abs().max()
                    place *= torch.where(heard, 1 / gain, 0).reshape(-1, *[1] * (place.dim() - 2))
                place += part
            self.made_up.append(item.name)
        cut = self._halves(x)[1]
        calls = [item.call(*pair) for pair in zip(self._split(cut), outs, strict=True)]
        asked = out if item.wanted is None else item.wanted
        self.solve(ConsumerDue(tuple(calls), tuple(wanted), item.call(cut, out), asked))
        self.pending = {key: each for key, each in self.pending.items() if each is not item}
        new_weight = self._now(weight)
        assert new_weight is not None
        new_bias = self._now(bias)
        self._fill(item.out, cut, lambda part: item.run(part, new_weight, new_bias))
        if item.normed:
            item.normed[1](self._halves(item.out)[1])
            # This breaks a reference cycle, so that large tensors are freed without the garbage collector.
            item.normed = None

    def settle_rest(self) -> None:
        """Solve the consumers whose outputs were not used."""
        for item in list(self.pending.values()):
            self._settle(item.out)

    def _add(self, a: Any, b: Any) -> None:
        """Solve pending outputs before they are added; one of them compensates for the error of the other operand."""
        both = [t for t in (a, b) if isinstance(t, Tensor)]
        waiting = [t for t in both if id(t) in self.pending]
        if len(both) < 2 or a is b or a.shape != b.shape:
            for tensor in waiting:
                self._settle(tensor)
            return
        if len(waiting) == 2:
            # The later consumer can compensate only after the earlier one is solved.
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
        # Running statistics apply to all probes, batch statistics to one batch.
        rows = self._rows_of(call.x)
        sizes = [rows * size for size in (self.sizes if self.batch_statistics else [self.half])]
        out, measured = torch.empty_like(call.x), []
        for part, into in zip(original.split(sizes), out[: len(original)].split(sizes), strict=True):
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
        """Fill in the cut network's half of a batch norm's output, after its input there is known."""
        call, item = normed.call, normed.item
        mean_name, var_name = call.names
        new_running_mean = self._now(call.running[0])
        assert new_running_mean is not None
        shift = new_running_mean - call.running[0]
        used = []
        for part, place, (mean, var), (own_mean, own_var) in zip(
            cut.split(normed.sizes),
            normed.out[len(cut) :].split(normed.sizes),
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
            self.missing[mean_name] = self._beyond_probes(mean_name, normed.original, asked, cut, gap)
        self.original[mean_name, var_name], self.cut[mean_name, var_name] = _mean(normed.used), _mean(used)

    def _beyond_probes(self, name: str, original: Tensor, asked: Tensor, given: Tensor, gap: Tensor) -> Tensor:
        """How the error of an output changes with the mean of the original output; see `expected_shift`."""
        rows, columns = self._sampled(original)

        def at(x: Tensor) -> Tensor:
            return (x.flatten(2).transpose(1, 2) if x.dim() > 2 else x[:, None])[rows, columns]

        # Positions are sampled first, because whole outputs are large.
        self.calls[name] += 1
        place = f"{name}#{self.calls[name]}"
        known = self.recall.get(place)
        regression = Regression(*known) if known else Regression.on(at(original), gap)
        if not known:
            self.recall.keep(place, [regression.along, regression.scale])
        error = at(given).to(regression.along.dtype) - at(asked).to(regression.along.dtype)
        return regression.of(error)

    def _sampled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and positions in them that are sampled, the same in all tensors of a size."""
        size = count, places = len(x), x[0, 0].numel()
        if size not in self.samples:
            chosen = sample_positions(count * places, _POSITIONS, generator_for(0, "positions"))
            index = (torch.arange(count * places) if chosen is None else chosen).to(x.device)
            self.samples[size] = index // places, index % places
        return self.samples[size]


def _own(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """A batch normalized with its own mean and (biased) variance, followed by both, from a single kernel."""
    out, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return out, mean, (inverse.square().reciprocal() - eps).clamp_min(0)


def _mean(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    mean, var = (torch.stack(each).double().mean(0) for each in zip(*parts, strict=True))
    return mean, var


def _only_asks(func: Any) -> bool:
    """Whether a function only reads a tensor's shape, dtype or device."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _ASKED
    return name in _ASKING
