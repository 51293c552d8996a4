"""lbyl: structured pruning of trained networks, restored in closed form. No data, no retraining."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbyl.api import Inspection, Result, compress, inspect
    from lbyl.artifact import load
    from lbyl.budget import Budget
    from lbyl.comparison import Bench, bench
    from lbyl.criteria import L1, L2, Criterion, GeometricMedian, Random
    from lbyl.errors import (
        ArtifactError,
        ExportError,
        InputError,
        LbylError,
        SurgeryError,
        TraceError,
        VerificationError,
    )
    from lbyl.exporting import Exported, export
    from lbyl.moments import Data, Dream, Gaussian, Noise, Photographs, Weights
    from lbyl.plan import Plan
    from lbyl.report import Report
    from lbyl.restorers import LBYL, Coreset, LeastSquares, Merge, Prune, Restorer
    from lbyl.sweeping import Sweep, sweep

__all__ = [
    "L1",
    "L2",
    "LBYL",
    "ArtifactError",
    "Bench",
    "Budget",
    "Coreset",
    "Criterion",
    "Data",
    "Dream",
    "ExportError",
    "Exported",
    "Gaussian",
    "GeometricMedian",
    "InputError",
    "Inspection",
    "LbylError",
    "LeastSquares",
    "Merge",
    "Noise",
    "Photographs",
    "Plan",
    "Prune",
    "Random",
    "Report",
    "Restorer",
    "Result",
    "SurgeryError",
    "Sweep",
    "TraceError",
    "VerificationError",
    "Weights",
    "bench",
    "compress",
    "export",
    "inspect",
    "load",
    "sweep",
]

# Importing torch takes seconds; `lbyl --help` and shell completion should not.
_HOME = {
    "lbyl.api": (
        "Inspection",
        "Result",
        "compress",
        "inspect",
    ),
    "lbyl.artifact": ("load",),
    "lbyl.budget": ("Budget",),
    "lbyl.comparison": ("Bench", "bench"),
    "lbyl.criteria": (
        "L1",
        "L2",
        "Criterion",
        "GeometricMedian",
        "Random",
    ),
    "lbyl.errors": (
        "ArtifactError",
        "ExportError",
        "InputError",
        "LbylError",
        "SurgeryError",
        "TraceError",
        "VerificationError",
    ),
    "lbyl.exporting": ("Exported", "export"),
    "lbyl.moments": (
        "Data",
        "Dream",
        "Gaussian",
        "Noise",
        "Photographs",
        "Weights",
    ),
    "lbyl.plan": ("Plan",),
    "lbyl.report": ("Report",),
    "lbyl.restorers": (
        "LBYL",
        "Coreset",
        "LeastSquares",
        "Merge",
        "Prune",
        "Restorer",
    ),
    "lbyl.sweeping": ("Sweep", "sweep"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lbyl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
