"""What was done, in rows and totals, for people (Rich) and machines (plain data)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from lbyl.errors import ArtifactError
from lbyl.io.report.format import number, percent
from lbyl.io.report.rows import Row
from lbyl.runtime.bench import Timing
from lbyl.runtime.output_error import DESTROYED, Assessment


@dataclass(frozen=True)
class Report:
    """The outcome of one compression.

    Attributes:
        rows: one a pruned group.
        left: (group, reason) for every group that was left whole.
        barriers: operations that channels could not be followed through.
        parameters: count before and after.
        macs: multiply-accumulate operations on the example inputs, before and after (None if not counted).
        verified: the largest relative difference between the cut and the masked network; None if switched off.
        seconds: wall-clock time by stage.
        notes: anything else that the user should know.
        assessment: relative error of the network's outputs on held-out probes; None without probes.
        latency: how long both networks take; None if not measured.
        held_out_errors: relative error of the network's outputs on held-out probes, by the way its consumers were
            solved ("all at once", "halfway between", "in turn"), and where nothing was restored ("pruned").
    """

    rows: tuple[Row, ...]
    left: tuple[tuple[str, str], ...]
    barriers: tuple[str, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    verified: float | None
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    assessment: Assessment | None = None
    latency: Timing | None = None
    held_out_errors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any) -> Report:
        """Read a report back; raises ArtifactError where it is none."""
        try:
            return Report(
                rows=tuple(map(_row, data["rows"])),
                left=tuple((_text(name), _text(why)) for name, why in data["left"]),
                barriers=tuple(map(_text, data["barriers"])),
                parameters=(int(data["parameters"][0]), int(data["parameters"][1])),
                macs=None if data["macs"] is None else (int(data["macs"][0]), int(data["macs"][1])),
                verified=None if data["verified"] is None else float(data["verified"]),
                seconds={stage: float(value) for stage, value in data["seconds"].items()},
                notes=tuple(map(_text, data["notes"])),
                assessment=None
                if data.get("assessment") is None
                else Assessment(**{name: float(value) for name, value in data["assessment"].items()}),
                latency=None if data.get("latency") is None else _timing(data["latency"]),
                held_out_errors={_text(way): float(error) for way, error in data.get("held_out_errors", {}).items()},
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(f"the report is damaged: {error!r}") from error

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, title="Pruned groups", title_justify="left")
        probed = any(row.errors for row in self.rows)
        names = ("error pruned", "error restored") if probed else ("RE", "BE", "AE", "s")
        for name in ("group", "channels", *names, "note"):
            table.add_column(name, justify="left" if name in ("group", "note") else "right")
        for row in self.rows:
            terms = [number(row.re), number(row.be), number(row.ae), f"{row.seconds:.2f}"]
            numbers = [percent(error) for error in row.errors or (None, None)] if probed else terms
            table.add_row(Text(row.group), f"{row.before} → {row.after}", *numbers, Text(row.note))
        yield table
        if self.left:
            kept = Table(box=box.SIMPLE_HEAD, title="Left whole", title_justify="left")
            kept.add_column("group")
            kept.add_column("why")
            for name, why in self.left:
                kept.add_row(Text(name), Text(why))
            yield kept
        yield Group(*(Text(line) for line in self.summary()))

    def _repr_html_(self) -> str:
        from lbyl.io.report.page import report_html

        return report_html(self)

    def summary(self) -> list[str]:
        """The totals, a line each."""
        lines = [_change("parameters", *self.parameters)]
        if self.macs:
            lines.append(_change("MACs", *self.macs))
        if self.latency:
            lines.append(f"latency: {self.latency} on {self.latency.place}")
            if self.latency.no_speed:
                lines.append(f"no speed from the cut of {self.latency.no_speed}")
        if self.verified is None:
            lines.append("not verified: verification was switched off")
        else:
            lines.append(f"verified: the cut network equals the masked one (relative difference {self.verified:.1e})")
        if self.assessment:
            lines.append(
                "output error on held-out probes: "
                f"{self.assessment.pruned:.1%} pruned, {self.assessment.restored:.1%} restored"
            )
            if self.assessment.restored > DESTROYED:
                lines.append("WARNING: the network is likely destroyed; prune less, or give real inputs (lbyl.Data)")
        lines.append("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in self.seconds.items()))
        return lines + [f"note: {note}" for note in self.notes]


def _row(data: Any) -> Row:
    row = Row(**{**data, "errors": _pair(data.get("errors"))})
    numbers = (row.before, row.after, row.seconds, *(term for term in (row.re, row.be, row.ae) if term is not None))
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError(f"{row.group}: expected numbers, found {numbers!r}")
    return dataclasses.replace(row, group=_text(row.group), note=_text(row.note))


def _timing(data: Any) -> Timing:
    before, after, ratio, margin = (float(data[name]) for name in ("before", "after", "ratio", "margin"))
    return Timing(before, after, ratio, margin, _text(data["place"]), _text(data["no_speed"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _pair(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))


def _change(name: str, before: int, after: int) -> str:
    share = f" ({after / before:.1%})" if before else ""
    return f"{name}: {before:,} → {after:,}{share}"
