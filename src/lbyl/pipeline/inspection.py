"""`inspect`: lists the channel groups of a model, and the reasons why some can't be pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from lbyl.graph import Graph
from lbyl.graph.submodules import joined
from lbyl.io.report.format import shown
from lbyl.pipeline.prepare import check_widths, plain_module, trace_model
from lbyl.pipeline.result import Inputs
from lbyl.runtime.contexts import alone, own_settings
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.recursion import deep_calls


@dataclass(frozen=True)
class Inspection:
    """The channel groups of a model; print it with Rich, or read ``graph``.

    If the model could not be traced as a whole, ``graph`` holds the groups of the traceable parts, ``untraced`` names
    the other parts, and ``note`` says why. ``note`` also holds notes about the traced run.
    """

    graph: Graph
    untraced: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Names, widths, producers, consumers, and why a group can't be pruned, as plain data."""
        return {
            "groups": [
                {
                    "name": group.name,
                    "width": group.width,
                    "producers": list(group.layers),
                    "consumers": [slot.parameter.rpartition(".")[0] for slot in group.consumers],
                    "coupled": group.coupled,
                    "outside": group.excluded_from_inner,
                    "prunable": group.prunable,
                    "reason": group.reason,
                }
                for group in self.graph.groups
            ],
            "barriers": list(self.graph.barriers),
            "untraced": dict(self.untraced),
            "note": self.note,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, title="Channel groups", title_justify="left")
        for name in ("group", "width", "also made by", "read by", "prunable"):
            table.add_column(name, justify="right" if name == "width" else "left")
        for row in self.to_dict()["groups"]:
            if row["reason"]:
                verdict = f"no: {row['reason']}"
            else:
                verdict = f"scope=all ({row['outside']})" if row["outside"] else "yes"
            others, consumers = row["producers"][1:], row["consumers"]
            table.add_row(*map(shown, (row["name"], str(row["width"]), _few(others), _few(consumers), verdict)))
        yield table
        for barrier in self.graph.barriers:
            yield shown(f"barrier: {barrier}")
        for name, why in self.untraced:
            yield shown(f"not traced: {name} ({why})")
        if self.note:
            yield shown(f"note: {self.note}")

    def _repr_html_(self) -> str:
        from lbyl.io.report.page import inspection_html

        return inspection_html(self)


def _few(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


@own_settings()
def inspect(
    model: nn.Module, example_inputs: Inputs, *, strict: bool = False, submodule: str | None = None
) -> Inspection:
    """Find the channel groups of a model: names, widths, producers, consumers, prunable or why not.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        strict: whether to raise an error if the model can't be traced as a whole or branches on values that it
            computes. Otherwise traceable parts are listed, and the branches that the example inputs take are traced.
        submodule: inspect only the submodule of this name.

    Raises:
        InputError: the inputs can't be used, or there is no such submodule.
        TraceError: ``torch.export`` can't trace the model on them.
    """
    model = plain_module(model)
    check_widths(model)
    with deep_calls(model), alone(model):
        found = trace_model(model, ExampleInputs.of(example_inputs), strict, submodule)
    if found.graph is not None:
        return Inspection(found.graph, note="; ".join(found.graph.notes))
    return Inspection(joined(found.parts), found.untraced, found.why)
