"""Renders plan and report as HTML through Jinja2, which escapes untrusted text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lbyl.errors import visible
from lbyl.io.report import colors
from lbyl.io.report.format import FLOAT32, line, number, percent, share, size
from lbyl.io.report.page.pictures import errors, has_errors, widths
from lbyl.io.report.page.svg import inline_svg
from lbyl.io.report.rows import ReportData
from lbyl.io.report.snippets import arguments, loading, reproducing, shown_source, title_of
from lbyl.io.report.words import evaluation, expectation
from lbyl.surgery.plan import Plan


@dataclass(frozen=True)
class Total:
    """A quantity of the whole network before and after, as text, and the ratio of both."""

    name: str
    before: str
    after: str
    share: float
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An SVG and its caption."""

    svg: Markup
    caption: str


class Described(Protocol):
    """An object that can be converted to plain data, such as :class:`lbyl.Inspection`."""

    def to_dict(self) -> dict[str, Any]:
        """The plain data."""
        ...


def page(plan: Plan, report: ReportData) -> str:
    """The report as a self-contained HTML file, without scripts, fonts or requests.

    Equal plans and reports give equal text.
    """
    return _render("page.html.j2", report, plan)


def result_html(plan: Plan, report: ReportData) -> str:
    """The report as HTML for a notebook's cell."""
    return _render("notebook.html.j2", report, plan)


def report_html(report: ReportData) -> str:
    """Totals and groups for a notebook's cell, without pictures and code, which need the plan."""
    return _render("notebook.html.j2", report, None)


def inspection_html(inspection: Described) -> str:
    """The groups of a model for a notebook's cell."""
    return _environment().get_template("inspection.html.j2").render(inspection.to_dict())


def _render(template: str, report: ReportData, plan: Plan | None) -> str:
    return (
        _environment()
        .get_template(template)
        .render(
            report=report,
            verdict=expectation(report.forecast),
            evaluation=evaluation(report.evaluation),
            totals=list(_totals(report, plan)),
            measured={name: any(getattr(row, name) for row in report.rows) for name in ("note", "seconds")},
            terms=report.has_terms,
            plan=plan,
            pictures=list(_pictures(report)) if plan else [],
            title=title_of(plan) if plan else "",
            source=shown_source(plan.source) if plan and plan.source else "",
            settings=arguments(plan) if plan else {},
            loading="\n".join(loading(plan)) if plan else "",
            reproducing="\n".join(reproducing(plan)) if plan else "",
        )
    )


def _totals(report: ReportData, plan: Plan | None) -> Iterator[Total]:
    before, after = report.parameters
    kept = after / before if before else 1.0
    yield Total("Weights", size(before * FLOAT32), size(after * FLOAT32), kept, "in float32")
    yield Total("Parameters", f"{before:,}", f"{after:,}", kept)
    if report.macs:
        before, after = report.macs
        kept = after / before if before else 1.0
        yield Total("Multiply-accumulates", _count(before), _count(after), kept, f"on {plan.inputs}" if plan else "")
    if report.latency:
        timing = report.latency
        note = f"(± {timing.margin:.0%})"
        yield Total("Latency", _milliseconds(timing.before), _milliseconds(timing.after), timing.ratio, note)


def _pictures(report: ReportData) -> Iterator[Picture]:
    if report.rows:
        title = "Channels of each group, before and after"
        yield Picture(Markup(inline_svg(widths, report, "widths", title)), title + ", from input to output.")
    # Errors of single solves are not shown: later layers compensate for most of them.
    if has_errors(report.rows) and not report.probed:
        title = "Error of each group"
        caption = "Residual (RE), batch-norm (BE) and activation error (AE) of each group."
        yield Picture(Markup(inline_svg(errors, report, "errors", title)), caption)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _count(value: int) -> str:
    """A large count in thousands, millions or billions.

    >>> _count(1_820_000_000), _count(950)
    ('1.82 G', '950')
    """
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return str(value)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lbyl.io.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = {"line": line, "number": number, "percent": percent, "share": share}
    environment.filters.update(filters)
    environment.globals["colors"] = colors
    return environment
