"""The result of a compression."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lbyl.errors import InputError
from lbyl.io import artifact
from lbyl.io.report.report import Report
from lbyl.io.saving import as_trained
from lbyl.runtime.checks import named_kind
from lbyl.runtime.inputs import ExampleInputs
from lbyl.surgery.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lbyl.runtime.bench import Bench

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | ExampleInputs


@dataclass(frozen=True)
class Result:
    """A compressed network, with its plan and its report.

    Attributes:
        model: the new, physically smaller network; the one that was passed in is untouched.
        plan: the cuts and the settings.
        report: a row for each group, totals, notes, and the groups that were not pruned.
    """

    model: nn.Module
    plan: Plan
    report: Report

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights, ``lbyl.json``, a model card and a report into a new folder, whole or not at all.

        ``report.html`` is the report for people, ``report.json`` the one for machines. If the network was trained
        meanwhile, both say so; see :func:`lbyl.save`.

        Raises:
            InputError: the path exists or can't be written.
        """
        return artifact.save(path, self.model, *as_trained(self.model, self.plan, self.report))

    def timed(self, bench: Bench) -> Result:
        """The result, with the latency that :func:`lbyl.bench` measured in its report."""
        from lbyl.runtime.bench import Bench

        if not isinstance(bench, Bench):
            raise InputError(f"bench is {named_kind(bench)}; pass what lbyl.bench returned")
        return replace(self, report=replace(self.report, latency=bench.timing()))

    def plot(self) -> Figure:
        """Widths and errors of the groups as a Matplotlib figure; see :func:`lbyl.io.report.page.plot`."""
        from lbyl.io.report.page import plot

        return plot(self.report)

    def _repr_html_(self) -> str:
        from lbyl.io.report.page import result_html

        return result_html(self.plan, self.report)
