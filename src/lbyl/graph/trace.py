"""Traces a model and builds its channel graph.

The model's program is recorded or exported, and only read; it is the user's own modules that are cut later. Each value
in the program gets a *shadow*, an integer tensor of the same shape that says which channel every element belongs to.
One pass over the program finds out which channels belong together (see `lbyl.graph.rules`).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from lbyl.errors import InputError, TraceError, first_line
from lbyl.graph import channel_means, rewritten, width_factors
from lbyl.graph.builder import Builder, ParameterRef, layer_name, nobody_like
from lbyl.graph.compared import Compared, find_compared, note_entering
from lbyl.graph.experts import by_expert
from lbyl.graph.exported import export
from lbyl.graph.freeze import freeze
from lbyl.graph.lengths import find_lengths
from lbyl.graph.numbers import factors_of, numbers_of
from lbyl.graph.origins import origins_of
from lbyl.graph.program import Program
from lbyl.graph.recording import record
from lbyl.graph.repeats import notes_of_repeats
from lbyl.graph.rules import find_rule
from lbyl.graph.types import Graph, Group
from lbyl.graph.written import settle, write_back
from lbyl.runtime.contexts import uncollected, undisturbed
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs

_NO_EFFECT = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_set_grad_enabled")


def trace(model: nn.Module, inputs: ExampleInputs, follow: bool = True) -> Graph:
    """Find the channel groups of a model in evaluation mode.

    Args:
        model: any module that ``torch.export`` can trace; it is not changed.
        inputs: the example inputs, see :class:`lbyl.runtime.inputs.ExampleInputs`.
        follow: if the model branches on values that it computes, trace the branches that these inputs take.

    Raises:
        TraceError: ``torch.export`` refused the model.
        InputError: the model returns no tensor.
    """
    try:
        with uncollected(), undisturbed(model):  # `torch.export` would take values cached by this run for constants
            program = record(model, inputs)
    except InputError:  # it returns no tensor
        raise
    except Exception:  # `torch.export` decides whether the model can be traced, and says why if it can't
        program = _exported(model, inputs) if follow else export(model, inputs)
    with uncollected():
        graph = graph_of(model, program, find_compared(model, inputs))
        notes = *graph.notes, *notes_of_repeats(model, inputs)
        return replace(graph, lengths=find_lengths(model, inputs, graph.sizes), notes=notes)


def _exported(model: nn.Module, inputs: ExampleInputs) -> Program:
    """The program from ``torch.export``, or else one recorded for these inputs only.

    Raises:
        TraceError: neither is possible.
        InputError: the model returns no tensor.
    """
    try:
        return export(model, inputs)
    except TraceError as error:
        try:
            with uncollected(), undisturbed(model):
                return record(model, inputs, follow=True)
        except InputError:  # it returns no tensor
            raise
        except Exception:  # the first error says more
            raise error from None


def graph_of(model: nn.Module, program: Program, compared: Compared = frozenset()) -> Graph:
    """The channel groups in a model's program, in which modules compare these numbers with sizes."""
    again = dict(program.parameters)
    lengths = {name: tuple(node.meta["val"].shape) for node, name in program.parameters.items()}
    widths = frozenset(length for shape in lengths.values() for length in shape)
    builder = Builder(again, numbers=numbers_of(model), factors=factors_of(model), widths=widths, batch=_batch(program))
    env: dict[fx.Node, Any] = {}

    def value(argument: Any) -> Any:
        return map_arg(argument, lambda node: env[node])

    uses, idle = _last_uses(program.graph), _idle(model, program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = program.parameters.get(node)
            env[node] = nobody_like(node) if name is None else ParameterRef(name, tuple(node.meta["val"].shape))
            builder.origins[node] = frozenset() if name is not None else frozenset({node.name})
            if name is not None and name in idle:
                builder.whole[name] = "no operation used it on the example inputs"
        elif node.op == "call_function":
            builder.origins[node] = origins_of(node, builder.origins)
            env[node] = _call(builder, node, value(node.args), value(node.kwargs))
            write_back(builder, env, node)
            note_entering(builder, node, env, compared)
            width_factors.note(builder, node, env)
            if name := _parameter_again(node, again):
                env[node], again[node] = ParameterRef(name, lengths[name]), name
        elif node.op == "output":
            for item in _flat(value(node.args)):
                if isinstance(item, Tensor):
                    builder.pin(item, "the model's output")
        else:
            env[node] = nobody_like(node)
        if node.op != "call_function" or _name(node) not in _NO_EFFECT:
            channel_means.follow(builder, node)
        for done in uses[node]:
            env.pop(done, None)
    settle(builder)
    builder.finish()
    rewritten.settle(builder)
    channel_means.settle(builder, model)
    graph = by_expert(freeze(builder), builder.experts, lengths)
    return replace(graph, groups=_coupled_with(model, graph.groups), macs=program.macs, notes=program.notes)


_RESHAPES = frozenset((
    "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "flatten", "unflatten", "contiguous", "alias", "detach",
))  # fmt: skip


def _parameter_again(node: fx.Node, parameters: Mapping[fx.Node, str]) -> str | None:
    """The name of the parameter that a value is after it was given another shape and then its own shape again."""
    source: Any = node
    while isinstance(source, fx.Node) and source.op == "call_function" and _name(source) in _RESHAPES:
        source = source.args[0]
    if source is node or not isinstance(source, fx.Node) or source not in parameters:
        return None
    given, made = (getattr(each.meta.get("val"), "shape", None) for each in (source, node))
    return parameters[source] if given == made is not None else None


def _batch(program: Program) -> int:
    """The number of rows of the first input; 0 if it has none."""
    inputs = (n for n in program.graph.nodes if n.op == "placeholder" and n not in program.parameters)
    shapes = (value.shape for node in inputs if isinstance(value := node.meta.get("val"), Tensor))
    return next((int(shape[0]) for shape in shapes if shape), 0)


def _idle(model: nn.Module, program: Program) -> set[str]:
    """Parameters and buffers that no operation of a program uses, under any of their names."""
    state = tensors_of(model)
    used = {id(state[name]) for node, name in program.parameters.items() if node.users and name in state}
    return {name for name in program.parameters.values() if name in state and id(state[name]) not in used}


def _coupled_with(model: nn.Module, groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, where heads of torch's MultiheadAttention are coupled with the group that its queries come from.

    The module assumes that all heads together are as wide as its input, so both groups must lose the same share.
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
        why = f"{path!r} is torch's MultiheadAttention, which needs its heads together to be as wide as its input"
        for index in (*makes, *reads):
            found[index] = replace(found[index], reason=found[index].reason or why)
    return tuple(found)


def _name(node: fx.Node) -> str:
    """The ATen name of an operation."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema else getattr(node.target, "__name__", str(node.target))


def _call(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]] if isinstance(args[0], (list, tuple)) else nobody_like(node)
    name = _name(node)
    if name in _NO_EFFECT:
        return None
    rule, where = find_rule(name), layer_name(node)
    builder.calls[where, name] += 1
    place = f"{name} in {where!r}" if where else name
    everything = [*_flat(args), *_flat(list(kwargs.values()))]
    if (weight := rewritten.rewrite(builder, node, args)) is not None:
        return weight
    if rule is None:
        return builder.barrier(node, everything, f"{place} has no rule")
    _separate(builder, name, place, everything)
    try:
        found = rule(builder, node, args, kwargs)
    except Exception as error:  # the rule does not handle this call; some rules come from users
        what = first_line(error) or type(error).__name__
        return builder.barrier(node, everything, f"{place} is called in a way that its rule does not handle ({what})")
    if not _fits(found, node):
        return builder.barrier(node, everything, f"{place} is called in a way that its rule does not handle")
    return found


def _separate(builder: Builder, name: str, place: str, values: Sequence[Any]) -> None:
    """Merge the channels of pairs that an operation does not leave by themselves (see `lbyl.graph.pairs`)."""
    having = [value for value in values if isinstance(value, Tensor) and builder.pairs.among(value)]
    if not having:
        return
    layers = name in ("linear", "batch_norm")  # the only ones that read a parameter pair by pair
    shadows = [value if layers else builder.shadow(value) for value in values]
    if not builder.pairs.stay(name.rstrip("_"), [shadow for shadow in shadows if isinstance(shadow, Tensor)]):
        builder.joins.append((builder.pairs.merge(having), f"products of two of them are used by {place}"))


def _fits(found: Any, node: fx.Node) -> bool:
    """Whether a rule's result has the shapes of the operation's outputs."""
    val = node.meta.get("val")
    if isinstance(val, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) >= len(val)
    return not isinstance(val, Tensor) or (isinstance(found, (Tensor, ParameterRef)) and found.shape == val.shape)


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
