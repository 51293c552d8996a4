"""The report of a compression, for people (Rich, notebooks) and for programs (plain data)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table

from lbyl.io.report.format import number, shown
from lbyl.io.report.rows import ReportData, Row
from lbyl.io.report.words import evaluation, expectation
from lbyl.runtime.documents import check_no_faults, read_as


@dataclass(frozen=True)
class Report(ReportData):
    """The outcome of one compression.

    Attributes:
        rows: one for each pruned group.
        left: (group, reason) for every group that was not pruned.
        barriers: operations that the trace could not see through.
        parameters: count before and after.
        macs: multiply-accumulate operations on the example inputs, before and after; None if not counted.
        verified: the largest relative difference between the cut and the masked network; None if switched off.
        seconds: wall-clock time of each stage.
        notes: anything else that the user should know.
        assessment: relative error of the network's outputs on the probes that it names; None without probes.
        latency: the latency of both networks; None if not measured.
        held_out_errors: relative error of the network's outputs on held-out probes, by the way its consumers were
            solved ("all at once", "halfway between", "in turn"), and without restoration ("pruned").
        forecast: how well the smaller network is expected to agree with the original on real inputs; None if switched
            off.
        evaluation: the results of the user's own function before and after; None without one.
        blocks: one for each dropped block, in the order in which they were chosen.
    """

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any) -> Report:
        """Read a report back from plain data. Raises ArtifactError if it is damaged."""
        report = read_as(Report, data, "the report")
        check_no_faults(_foreign_fields(data["rows"]), "the report")
        return report

    def prefixed(self, path: str) -> Report:
        """The report with ``path`` before all names, for a network that contains this one as the submodule ``path``."""
        return dataclasses.replace(
            self,
            rows=tuple(dataclasses.replace(row, group=f"{path}.{row.group}") for row in self.rows),
            left=tuple((f"{path}.{name}", why) for name, why in self.left),
            barriers=tuple(f"{path}: {barrier}" for barrier in self.barriers),
            notes=tuple(f"{path}: {note}" for note in self.notes),
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.blocks:
            yield self._dropped()
        if not self.blocks or self.rows:
            yield self._pruned()
        if self.left:
            kept = Table(box=box.SIMPLE_HEAD, title="Left whole", title_justify="left")
            kept.add_column("group")
            kept.add_column("why")
            for name, why in self.left:
                kept.add_row(shown(name), shown(why))
            yield kept
        yield Group(*map(shown, self.summary()))

    def _dropped(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, title="Dropped blocks, in the order of choice", title_justify="left")
        for name in ("block", "effect alone", "with those above", "note"):
            table.add_column(name, justify="left" if name in ("block", "note") else "right")
        for row in self.blocks:
            table.add_row(shown(row.block), f"{row.alone:.3g}", f"{row.together:.3g}", shown(row.note))
        return table

    def _pruned(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, title="Pruned groups", title_justify="left")
        names = () if self.probed else ("RE", "BE", "AE", "s")
        for name in ("group", "channels", *names, "note"):
            table.add_column(name, justify="left" if name in ("group", "note") else "right")
        for row in self.rows:
            terms = [number(row.re), number(row.be), number(row.ae), f"{row.seconds:.2f}"]
            numbers = () if self.probed else terms
            table.add_row(shown(row.group), f"{row.before} → {row.after}", *numbers, shown(row.note))
        return table

    def _repr_html_(self) -> str:
        from lbyl.io.report.page import report_html

        return report_html(self)

    def summary(self) -> list[str]:
        """The report as lines of text: the forecast, the user's evaluation, the totals, and the notes."""
        lines = [line for line in (expectation(self.forecast).text, evaluation(self.evaluation)) if line]
        lines.append(_change("parameters", *self.parameters))
        if self.macs:
            lines.append(_change("MACs", *self.macs))
        if self.latency:
            lines.append(f"latency: {self.latency} on {self.latency.place}")
            if self.latency.no_speed:
                lines.append(f"cut, but not faster: {self.latency.no_speed}")
        if self.verified is None:
            if not any(note.startswith("not verified") for note in self.notes):
                lines.append("not verified: verification was switched off")
        else:
            lines.append(f"verified: the cut network equals the masked one (relative difference {self.verified:.1e})")
        if self.assessment:
            lines.append(
                f"output error on {self.assessment.where}: "
                f"{self.assessment.pruned:.1%} pruned, {self.assessment.restored:.1%} restored"
            )
        lines.append("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in self.seconds.items()))
        return [*lines, *(f"note: {note}" for note in self.notes)]


def _foreign_fields(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    known = {field.name for field in dataclasses.fields(Row)}
    for index, row in enumerate(rows):
        for name in row.keys() - known:
            yield f"unknown field {name!r}", f"$.rows[{index}]"


def _change(name: str, before: int, after: int) -> str:
    share = f" ({after / before:.1%})" if before else ""
    return f"{name}: {before:,} → {after:,}{share}"
