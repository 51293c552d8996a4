"""The model card: a ``README.md`` with metadata, as the Hugging Face Hub reads it, made from plan and report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from lbyl.plan import Plan
from lbyl.report import Report
from lbyl.sources import is_rebuildable

_BYTES = 4  # a float32


def card(plan: Plan, report: Report) -> str:
    """What was cut, what it cost, how to load the result and how to make it again, as Markdown.

    Args:
        plan: what was cut and with which settings.
        report: the totals, and one row a group.

    Returns:
        The text of a model card: YAML metadata, then Markdown.
    """
    sections = (
        [*_metadata(plan)],
        [*_summary(plan, report)],
        ["## How to load", "", *_code(_loading(plan)), "", *_exporting(plan)],
        ["## What was cut", "", *_groups(report), *_left(report)],
        ["## How to reproduce", "", *_code(_reproducing(plan))],
    )
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _metadata(plan: Plan) -> Iterator[str]:
    yield from ("---", "library_name: lbyl", "tags:", "- pruned", "- lbyl", "- pytorch")
    if plan.source:
        # Not base_model, which must be a repository of the Hub: the plan does not know whose weights were loaded.
        yield f"base_model_source: {json.dumps(_source(plan.source), ensure_ascii=False)}"
    yield "---"


def _summary(plan: Plan, report: Report) -> Iterator[str]:
    before, after = report.parameters
    made = f" from `{_source(plan.source)}`" if plan.source else ""
    yield f"# {_name(plan)}, pruned"
    yield ""
    yield (
        f"Whole channels were removed{made} by lbyl {plan.library}, by "
        "[this method](https://arxiv.org/abs/2502.08474) and the settings below; there was no retraining. "
        "The result is an ordinary, smaller network."
    )
    yield ""
    yield "| | before | after | |"
    yield "|---|--:|--:|--:|"
    yield f"| parameters | {before:,} | {after:,} | {_share(before, after)} |"
    yield (f"| size in float32 | {_size(before * _BYTES)} | {_size(after * _BYTES)} | {_share(before, after)} |")
    if report.macs:
        yield f"| MACs on {plan.inputs} | {report.macs[0]:,} | {report.macs[1]:,} | {_share(*report.macs)} |"
    yield ""
    if report.assessment:
        yield (
            f"Predicted damage: the outputs' error on held-out probes is {report.assessment.restored:.1%} "
            f"({report.assessment.pruned:.1%} without restoration). This is no accuracy: evaluate it on your own data."
        )
    else:
        yield "Damage was not predicted: these settings look at weights alone. Evaluate the network on your own data."
    if report.verified is None:
        yield "The cut was not verified."
    else:
        yield (
            "The cut was verified in float64: the smaller network computes what the masked one does "
            f"(relative difference {report.verified:.1e})."
        )
    for note in report.notes:
        yield f"\nNote: {_line(note)}"


def _loading(plan: Plan) -> Iterator[str]:
    yield "import lbyl"
    yield ""
    if plan.source and is_rebuildable(plan.source):
        yield 'model = lbyl.load("path/to/this/folder")'
    else:
        known = f" ({_source(plan.source)})" if plan.source else ""
        yield f"fresh = ...  # an unpruned instance of the architecture{known}; its weights don't matter"
        yield 'model = lbyl.load("path/to/this/folder", fresh)'


def _exporting(plan: Plan) -> Iterator[str]:
    model = "" if plan.source and is_rebuildable(plan.source) else " --model module:factory"
    yield f"`lbyl export path/to/this/folder --format onnx{model}` writes a file for other runtimes."


def _groups(report: Report) -> Iterator[str]:
    probed = any(row.errors for row in report.rows)
    yield "| group | channels |" + (" error pruned | error restored |" if probed else "")
    yield "|---|--:|" + ("--:|--:|" if probed else "")
    for row in report.rows:
        errors = "".join(f" {error:.1%} |" for error in row.errors) if row.errors else " – | – |" if probed else ""
        yield f"| `{_cell(row.group)}` | {row.before} → {row.after} |{errors}"


def _left(report: Report) -> Iterator[str]:
    if report.left:
        yield from ("", "Left whole:", "")
        for group, why in report.left:
            yield f"- `{_line(group)}`: {_line(why)}"


def _reproducing(plan: Plan) -> Iterator[str]:
    settings = dict(plan.settings)
    parts = settings.pop("parts", ())
    if settings.get("criterion") == settings.get("restore"):
        settings.pop("criterion", None)  # this restorer chooses the channels by itself
    if settings.get("budget"):
        settings.pop("ratio", None)  # the ratios that the budget led to
    yield from ("import torch", "import lbyl")
    if plan.source:
        yield "from lbyl.sources import load_source"
    yield ""
    if plan.source:
        yield f"model = load_source({_source(plan.source)!r})  # with the weights that were compressed"
    else:
        yield "model = ...  # the network, with the weights that were compressed"
    if _reads_data(settings):
        yield "batches = ...  # the inputs that the moments were taken from"
    yield f"inputs = ({' '.join(f'{text},' for text in map(_tensor, plan.inputs.split(', ')))})"
    yield "result = lbyl.compress("
    yield "    model,"
    yield "    inputs,"
    for name, value in settings.items():
        yield f"    {name}={_python(value)},"
    if len(parts) == 1:
        yield f"    submodule={parts[0]!r},"
    yield ")"


def _tensor(text: str) -> str:
    """The Python that makes an input of this dtype and shape."""
    dtype, _, sizes = text.partition(" ")
    shape = ", ".join(sizes.split("x")) if sizes != "scalar" else "()"
    if dtype == "float32":
        return f"torch.randn({shape})"
    make = "torch.randn" if "float" in dtype else "torch.zeros"
    return f"{make}({shape}, dtype=torch.{dtype})"


def _python(value: Any) -> str:
    """A setting the way it is written in Python."""
    import lbyl

    if isinstance(value, Mapping) and "name" in value:
        name = f"lbyl.{value['name']}" if value["name"] in lbyl.__all__ else str(value["name"])
        fields = [f"{key}={_python(item)}" for key, item in value.items() if key != "name"]
        return f"{name}({', '.join((['batches'] if value['name'] == 'Data' else []) + fields)})"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(tuple(value) if isinstance(value, list) else value)


def _reads_data(value: Any) -> bool:
    return isinstance(value, Mapping) and (value.get("name") == "Data" or any(map(_reads_data, value.values())))


def _code(lines: Iterator[str]) -> Iterator[str]:
    yield "```python"
    yield from lines
    yield "```"


def _source(source: str) -> str:
    """A card is published: of a factory's file, the name is enough."""
    place, separator, name = source.rpartition(":")
    return f"{PurePath(place).name}{separator}{name}" if place.endswith(".py") else source


def _name(plan: Plan) -> str:
    return _line(plan.source.rpartition(":")[2]) if plan.source else "A network"


def _share(before: int, after: int) -> str:
    return f"{after / before:.1%}" if before else "–"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", r"\|")
