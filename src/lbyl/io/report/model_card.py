"""Writes the model card from plan and report: a ``README.md`` with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lbyl.io.report.format import FLOAT32, share, size
from lbyl.io.report.markdown import code_span, plain_words
from lbyl.io.report.report import Report
from lbyl.io.report.snippets import loading, reproducing, shown_source, title_of
from lbyl.io.report.words import evaluation, expectation
from lbyl.surgery.plan import Plan, is_rebuildable


def card(plan: Plan, report: Report) -> str:
    """The model card as Markdown: what was cut, the expected loss, how to load the network, how to reproduce it.

    Args:
        plan: the cuts and the settings.
        report: the totals, and a row for each group.

    Returns:
        The text of a model card: YAML metadata, then Markdown.
    """
    sections = (
        [*_metadata(plan)],
        [*_summary(plan, report)],
        ["## How to load", "", *_code(loading(plan)), "", *_exporting(plan)],
        ["## What was cut", "", *_groups(report), *_left(report)],
        ["## How to reproduce", "", *_code(reproducing(plan))],
    )
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _metadata(plan: Plan) -> Iterator[str]:
    yield from ("---", "library_name: lbyl", "tags:", "- pruned", "- lbyl", "- pytorch")
    if plan.source:
        # Not base_model, which must be a repository of the Hub: the plan does not tell which weights were loaded.
        yield f"base_model_source: {json.dumps(shown_source(plan.source), ensure_ascii=False)}"
    yield "---"


def _summary(plan: Plan, report: Report) -> Iterator[str]:
    before, after = report.parameters
    made = f" from {code_span(shown_source(plan.source))}" if plan.source else ""
    trained = "The network was not retrained."
    if plan.trained:
        when = "between the cuts or after them" if "after" in plan.settings else "after that"
        trained = f"Its weights were trained {when}, which the settings do not say."
    what = " and ".join(["blocks"] * bool(plan.blocks) + ["channels"] * (bool(plan.groups) or not plan.blocks))
    yield f"# {plain_words(title_of(plan))}"
    yield ""
    yield (
        f"Whole {what} were removed{made} by lbyl {plain_words(plan.library)}, with "
        f"[this method](https://arxiv.org/abs/2502.08474) and the settings below. {trained} "
        "The result is an ordinary, smaller network."
    )
    yield ""
    words = expectation(report.forecast)
    yield f"**{plain_words(words.headline)}** {words.detail}"
    if report.evaluation:
        yield f"\n{plain_words(evaluation(report.evaluation))}"
    yield ""
    yield "| | before | after | |"
    yield "|---|--:|--:|--:|"
    yield f"| parameters | {before:,} | {after:,} | {share(before, after)} |"
    yield (f"| size in float32 | {size(before * FLOAT32)} | {size(after * FLOAT32)} | {share(before, after)} |")
    if report.macs:
        counts = f"{report.macs[0]:,} | {report.macs[1]:,} | {share(*report.macs)}"
        yield f"| MACs on {plain_words(plan.inputs)} | {counts} |"
    yield ""
    if report.verified is None:
        yield "The cut was not verified."
    else:
        yield (
            "The cut was verified: the smaller network computes what the masked one does "
            f"(relative difference {report.verified:.1e})."
        )
    for note in report.notes:
        yield f"\nNote: {plain_words(note)}"


def _exporting(plan: Plan) -> Iterator[str]:
    model = "" if plan.source and is_rebuildable(plan.source) else " --model module:factory"
    yield f"`lbyl export path/to/this/folder --format onnx{model}` writes a file for other runtimes."


def _groups(report: Report) -> Iterator[str]:
    yield from ("[report.html](report.html) shows this in pictures.", "")
    for number, block in enumerate(report.blocks):
        if not number:
            yield from ("| dropped block | effect alone |", "|---|--:|")
        yield f"| {code_span(block.block, cell=True)} | {block.alone:.3g} |"
    if report.blocks:
        yield ""
    if report.blocks and not report.rows:
        return
    yield "| group | channels |"
    yield "|---|--:|"
    for row in report.rows:
        yield f"| {code_span(row.group, cell=True)} | {row.before} → {row.after} |"


def _left(report: Report) -> Iterator[str]:
    if report.left:
        yield from ("", "Left whole:", "")
        for group, why in report.left:
            yield f"- {code_span(group)}: {plain_words(why)}"


def _code(lines: Iterator[str]) -> Iterator[str]:
    yield "```python"
    yield from lines
    yield "```"
