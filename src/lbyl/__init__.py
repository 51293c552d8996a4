"""lbyl: structured pruning of trained networks, restored in closed form. No data, no retraining."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbyl.api import Inspection, Result, compress, inspect
    from lbyl.artifact import load
    from lbyl.criteria import L1, L2, Criterion, GeometricMedian, Random
    from lbyl.errors import ArtifactError, InputError, LbylError, SurgeryError, TraceError, VerificationError
    from lbyl.moments import Data, Dream, Gaussian, Noise, Weights
    from lbyl.plan import Plan
    from lbyl.report import Report
    from lbyl.restorers import LBYL, Coreset, LeastSquares, Merge, Prune, Restorer

__all__ = [
    "L1",
    "L2",
    "LBYL",
    "ArtifactError",
    "Coreset",
    "Criterion",
    "Data",
    "Dream",
    "Gaussian",
    "GeometricMedian",
    "InputError",
    "Inspection",
    "LbylError",
    "LeastSquares",
    "Merge",
    "Noise",
    "Plan",
    "Prune",
    "Random",
    "Report",
    "Restorer",
    "Result",
    "SurgeryError",
    "TraceError",
    "VerificationError",
    "Weights",
    "compress",
    "inspect",
    "load",
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
    "lbyl.criteria": (
        "L1",
        "L2",
        "Criterion",
        "GeometricMedian",
        "Random",
    ),
    "lbyl.errors": (
        "ArtifactError",
        "InputError",
        "LbylError",
        "SurgeryError",
        "TraceError",
        "VerificationError",
    ),
    "lbyl.moments": (
        "Data",
        "Dream",
        "Gaussian",
        "Noise",
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
