"""From a model to its channel graph.

The program, recorded or exported, is only read: what gets cut later are the user's own modules. Each value in it gets
a *shadow*, an integer tensor of the same shape that says which channel every element belongs to. One walk over the
program then finds out what belongs together (see `lbyl.graph.rules`).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from lbyl.graph import channel_means as averages
from lbyl.graph.builder import Builder, ParameterRef, layer_name, nobody_like
from lbyl.graph.exported import export
from lbyl.graph.program import Program
from lbyl.graph.recording import record as watch
from lbyl.graph.rules import find_rule
from lbyl.graph.types import NOT_OURS, Average, Consumer, Graph, Group, LayerNorm, Producer, Size, Slot, Step
from lbyl.graph.union_find import NOBODY, compact, small, varies
from lbyl.runtime.contexts import uncollected, undisturbed
from lbyl.runtime.inputs import ExampleInputs

_NO_EFFECT = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_set_grad_enabled")


def trace(model: nn.Module, inputs: ExampleInputs) -> Graph:
    """Find the channel groups of a model in evaluation mode.

    Args:
        model: any module that ``torch.export`` can trace; it is not changed.
        inputs: the example inputs, see :class:`lbyl.runtime.inputs.ExampleInputs`.

    Raises:
        TraceError: ``torch.export`` refused the model.
    """
    try:
        with uncollected(), undisturbed(model):  # what the run leaves in caches would be constants to `torch.export`
            program = watch(model, inputs)
    except Exception:  # whatever it is, `torch.export` says whether the model can be traced, and if not, why
        program = export(model, inputs)
    with uncollected():
        return graph_of(model, program)


def graph_of(model: nn.Module, program: Program) -> Graph:
    """The channel groups in a model's program."""
    builder = Builder(program.parameters)
    env: dict[fx.Node, Any] = {}

    def value(argument: Any) -> Any:
        return map_arg(argument, lambda node: env[node])

    uses = _last_uses(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = program.parameters.get(node)
            env[node] = nobody_like(node) if name is None else ParameterRef(name, tuple(node.meta["val"].shape))
        elif node.op == "call_function":
            env[node] = _call(builder, node, value(node.args), value(node.kwargs))
        elif node.op == "output":
            for item in _flat(value(node.args)):
                if isinstance(item, Tensor):
                    builder.pin(item, "the model's output")
        else:
            env[node] = nobody_like(node)
        averages.follow(builder, node)
        for done in uses[node]:
            env.pop(done, None)
    builder.finish_free_parameters()
    graph = _freeze(builder)
    return replace(graph, groups=_coupled_with(model, graph.groups), macs=program.macs)


def _coupled_with(model: nn.Module, groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, where the heads of torch's MultiheadAttention and the stream of its queries know of each other.

    It takes the width of all heads for that of its input, so that both can only lose the same share.
    """
    found = list(groups)
    for path, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        weights = {f"{path}.{name}".lstrip(".") for name in ("in_proj_weight", "q_proj_weight")}
        makes = [i for i, g in enumerate(groups) if weights & {producer.weight.parameter for producer in g.producers}]
        reads = [i for i, g in enumerate(groups) if weights & {slot.parameter for slot in g.consumers}]
        if len(makes) == len(reads) == 1 and makes != reads:
            heads, stream = found[makes[0]], groups[reads[0]].name
            if heads.coupled_with in ("", stream):
                found[makes[0]] = replace(heads, coupled_with=stream)
                continue
        why = f"{path!r} is torch's MultiheadAttention, which takes the width of its heads for that of its input"
        for index in (*makes, *reads):
            found[index] = replace(found[index], reason=found[index].reason or why)
    return tuple(found)


def _call(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]] if isinstance(args[0], (list, tuple)) else nobody_like(node)
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema else getattr(node.target, "__name__", str(node.target))
    if name in _NO_EFFECT:
        return None
    rule = find_rule(name)
    if rule is None:
        everything = list(_flat(args)) + list(_flat(list(kwargs.values())))
        where = layer_name(node)
        return builder.barrier(node, everything, f"{name} in {where!r} has no rule" if where else f"{name} has no rule")
    return rule(builder, node, args, kwargs)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    uses: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for source, node in last.items():
        uses[node].append(source)
    return uses


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [value]


# -- freezing -------------------------------------------------------------------------------------------


def _freeze(builder: Builder) -> Graph:
    find = builder.ids.find
    group_of = torch.full((len(builder.ids),), NOT_OURS, dtype=torch.int64)  # root id -> group
    channel_of = torch.full((len(builder.ids),), NOT_OURS, dtype=torch.int64)  # root id -> channel in it
    members = _link_producers(builder)
    widths: list[int] = []
    for index, records in enumerate(members):
        roots = _distinct(find(torch.cat([record.ids for record in records])))
        group_of[roots] = index
        channel_of[roots] = torch.arange(len(roots))
        widths.append(len(roots))

    carriers: list[list[Slot]] = [[] for _ in members]
    consumers: list[list[Slot]] = [[] for _ in members]
    for record in builder.slots.values():
        roots = find(record.ids)
        owners = group_of[roots]
        places = channel_of[roots]
        alone = bool((owners == owners[:1]).all())  # as a rule
        for index in sorted(set(owners[: 1 if alone else None].tolist()) - {NOT_OURS}):
            channels = places if alone else torch.where(owners == index, places, NOT_OURS)
            slot = Slot(record.parameter, record.dim, tuple(channels.tolist()), record.blocks)
            (consumers if record.role == "consumer" else carriers)[index].append(slot)

    reasons: list[str | None] = [None] * len(members)
    sizes, broken = _shapes(builder, group_of, channel_of)
    for ids, why in [*builder.pins, *_fixed(builder), *broken]:
        for index in _groups_of(group_of, find(ids)):
            reasons[index] = reasons[index] or why
    coupled = {index for ids in builder.sums for index in _groups_of(group_of, find(ids))}
    steps: list[list[Step]] = [[] for _ in members]
    for ids, step in builder.steps:
        for index in _groups_of(group_of, find(ids)):
            if step not in steps[index]:
                steps[index].append(step)

    taken: list[list[Average]] = [[] for _ in members]
    for record in builder.averages:
        roots = find(record.ids)
        over = _groups_of(group_of, roots)
        if len(over) == 1 and _evenly(roots, group_of, channel_of, widths[over[0]]):
            taken[over[0]].append(Average(record.module, record.eps, record.weight, record.power))
        else:
            for index in over:
                reasons[index] = reasons[index] or f"a mean in {record.module!r} is over more than their group"
    norms: list[list[LayerNorm]] = [[] for _ in members]
    for ids, norm in builder.layer_norms:
        roots = find(ids)
        over = _groups_of(group_of, roots)
        for index in over:
            if norm not in norms[index]:
                norms[index].append(norm)
        if not _some_stay(roots, group_of, channel_of, widths):
            for index in over:
                reasons[index] = reasons[index] or f"layer_norm {norm.layer!r} takes statistics over a part of them"
    equal: list[list[tuple[Tensor, int]]] = [[] for _ in members]
    for ids, blocks in builder.equal:
        roots = find(ids)
        for index in _groups_of(group_of, roots):
            equal[index].append((roots, blocks))

    groups: list[Group] = []
    named: set[str] = set()
    for index, records in enumerate(members):
        blocks, trouble = _blocks(equal[index], group_of, channel_of, index, widths[index])
        reason = reasons[index] or trouble
        tied = tuple(slot for slot in carriers[index] if (slot.parameter, slot.dim) in builder.tied)
        if reason is None and not consumers[index] and not tied:
            reason = "no layer reads these channels"
        if reason is None and widths[index] < 2:
            reason = "a single channel"
        slots = {(slot.parameter, slot.dim): slot for slot in carriers[index]}
        producers = tuple(
            Producer(record.layer, slots[record.weight, record.dim], record.bias, tuple(record.stages))
            for record in records
        )
        name = next((p.layer for p in producers if p.layer not in named), f"{producers[0].layer}#{index}")
        named.add(name)
        groups.append(
            Group(
                name,
                widths[index],
                producers,
                tuple(carriers[index]),
                tuple(consumers[index]),
                blocks,
                index in coupled,
                tuple(steps[index]),
                tuple(taken[index]),
                reason,
                tuple(norms[index]),
                tied=tied,
            )
        )
    reading = tuple(
        Consumer(record.layer, record.weight, record.bias, record.op, record.blocks, columns, record.calls, record.dim)
        for record in builder.consumers.values()
        for roots in [find(builder.slots[record.weight, record.dim].ids)]
        for columns in [tuple(zip(group_of[roots].tolist(), channel_of[roots].tolist(), strict=True))]
    )
    return Graph(
        tuple(groups), reading, tuple(dict.fromkeys(builder.barriers)), sizes, tuple(dict.fromkeys(builder.computed))
    )


def _fixed(builder: Builder) -> Iterator[tuple[Tensor, str]]:
    """Ids that do run along a dimension that must keep its size, with the reason."""
    for shadow, dims, why in builder.fixed:
        final = compact(builder.ids.find(shadow))
        if any(varies(final, dim) for dim in dims):
            yield small(final).reshape(-1), why


def _shapes(
    builder: Builder, group_of: Tensor, channel_of: Tensor
) -> tuple[tuple[Size, ...], list[tuple[Tensor, str]]]:
    """Sizes that the model's code may know by heart; and ids that leave no rectangle when some of them go."""
    sizes: dict[Size, None] = {}
    broken = []
    for shadow, module in builder.shapes:
        final = compact(builder.ids.find(shadow))
        moving = [dim for dim in range(final.dim()) if varies(final, dim)]
        if len(moving) > 1:
            broken.append((small(final).reshape(-1), f"a view in {module!r} splits them in a pattern"))
        elif moving:
            roots = small(final).reshape(-1)
            columns = tuple(zip(group_of[roots].tolist(), channel_of[roots].tolist(), strict=True))
            sizes[Size(module, final.shape[moving[0]], columns)] = None
    return tuple(sizes), broken


def _link_producers(builder: Builder) -> list[list[Any]]:
    """Producers that share a channel form one group; in order of execution."""
    owner: dict[int, int] = {}
    sets: list[list[Any]] = []
    for record in builder.producers.values():
        roots = set(builder.ids.find(record.ids).tolist()) - {NOBODY}
        met = sorted({owner[root] for root in roots if root in owner})
        if met:
            target = met[0]
            for other in met[1:]:
                sets[target] += sets[other]
                sets[other] = []
                owner = {root: target if index == other else index for root, index in owner.items()}
        else:
            target = len(sets)
            sets.append([])
        sets[target].append(record)
        owner.update(dict.fromkeys(roots, target))
    order = {id(record): position for position, record in enumerate(builder.producers.values())}
    return [sorted(records, key=lambda record: order[id(record)]) for records in sets if records]


def _distinct(ids: Tensor) -> Tensor:
    """Distinct values in order of first appearance."""
    return torch.tensor(list(dict.fromkeys(ids.tolist())), dtype=torch.int64)


def _evenly(roots: Tensor, group_of: Tensor, channel_of: Tensor, width: int) -> bool:
    """Whether these are all channels of one group, each equally often: only then is one factor right for all cuts."""
    if bool((group_of[roots] == NOT_OURS).any()):
        return False
    return len(set(torch.bincount(channel_of[roots], minlength=width).tolist())) == 1


def _some_stay(roots: Tensor, group_of: Tensor, channel_of: Tensor, widths: list[int]) -> bool:
    """Whether some of these channels stay whatever is cut: others than ours, or all of a group are among them."""
    if bool((group_of[roots] == NOT_OURS).any()):
        return True
    return any(
        len(torch.unique(channel_of[roots[group_of[roots] == index]])) == widths[index]
        for index in _groups_of(group_of, roots)
    )


def _groups_of(group_of: Tensor, roots: Tensor) -> list[int]:
    return sorted(set(group_of.take(roots.reshape(-1)).tolist()) - {NOT_OURS})


def _blocks(
    equal: list[tuple[Tensor, int]], group_of: Tensor, channel_of: Tensor, index: int, width: int
) -> tuple[tuple[int, ...], str | None]:
    """Label the channels so that cutting equally many of every label suits all grouped convolutions."""
    if not equal:
        return (0,) * width, None
    labels = torch.zeros(width, dtype=torch.int64)
    for roots, blocks in equal:
        ours = group_of[roots] == index
        block = torch.arange(len(roots)) * blocks // len(roots)
        # Which blocks each channel has a seat in; channels with seats in the same ones are alike.
        seats = torch.unique(channel_of[roots[ours]] * blocks + block[ours])
        counts = torch.bincount(seats // blocks, minlength=width)
        if bool((counts == 1).all()):
            rows = seats % blocks
        else:
            kinds: dict[tuple[int, ...], int] = {}
            each = iter((seats % blocks).tolist())
            rows = torch.tensor([kinds.setdefault(tuple(islice(each, n)), len(kinds)) for n in counts.tolist()])
        labels = torch.unique(labels * (width + blocks) + rows, return_inverse=True)[1]
    # Numbered in order of appearance.
    names = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    result = tuple(names[label] for label in labels.tolist())
    if len(set(torch.bincount(labels).tolist())) > 1:
        return result, "the channels are split into blocks of different sizes"
    return result, None
