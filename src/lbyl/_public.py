"""The list of lbyl's public names. `lbyl.NAME` is imported from here at its first use.

The imports below are read as text, and each one is run only when its name is used: importing torch takes seconds, and
``lbyl --help`` should not. Type checkers treat them as ordinary imports.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lbyl.budget.budget import Budget as Budget
    from lbyl.errors import ArtifactError as ArtifactError
    from lbyl.errors import BudgetError as BudgetError
    from lbyl.errors import ClusterError as ClusterError
    from lbyl.errors import ExportError as ExportError
    from lbyl.errors import InputError as InputError
    from lbyl.errors import LbylError as LbylError
    from lbyl.errors import RestorationError as RestorationError
    from lbyl.errors import SurgeryError as SurgeryError
    from lbyl.errors import TraceError as TraceError
    from lbyl.errors import VerificationError as VerificationError
    from lbyl.io.artifact import load as load
    from lbyl.io.export.export import Exported as Exported
    from lbyl.io.export.export import export as export
    from lbyl.io.report.report import Report as Report
    from lbyl.io.saving import save as save
    from lbyl.io.sources import load_source as load_source
    from lbyl.moments.class_dream import ClassDream as ClassDream
    from lbyl.moments.data import Data as Data
    from lbyl.moments.dream import Dream as Dream
    from lbyl.moments.gaussian import Gaussian as Gaussian
    from lbyl.moments.generated import Generated as Generated
    from lbyl.moments.noise import Noise as Noise
    from lbyl.moments.photographs import Photographs as Photographs
    from lbyl.moments.sentences import Sentences as Sentences
    from lbyl.moments.weights import Weights as Weights
    from lbyl.pipeline.calibration import calibration_batches as calibration_batches
    from lbyl.pipeline.compare import Comparison as Comparison
    from lbyl.pipeline.compare import compare as compare
    from lbyl.pipeline.compress import compress as compress
    from lbyl.pipeline.inspection import Inspection as Inspection
    from lbyl.pipeline.inspection import inspect as inspect
    from lbyl.pipeline.layerwise.folder import CompressedFolder as CompressedFolder
    from lbyl.pipeline.layerwise.folder import compress_folder as compress_folder
    from lbyl.pipeline.layerwise.in_place import compress_in_place as compress_in_place
    from lbyl.pipeline.result import Result as Result
    from lbyl.pipeline.sweep.sweep import Sweep as Sweep
    from lbyl.pipeline.sweep.sweep import sweep as sweep
    from lbyl.restore.base import Restoration as Restoration
    from lbyl.restore.base import RestorationProblem as RestorationProblem
    from lbyl.restore.base import Restorer as Restorer
    from lbyl.restore.closed_form import ClosedFormRestorer as ClosedFormRestorer
    from lbyl.restore.coreset import Coreset as Coreset
    from lbyl.restore.lbyl import LBYL as LBYL
    from lbyl.restore.least_squares.restorer import LeastSquares as LeastSquares
    from lbyl.restore.merge import Merge as Merge
    from lbyl.restore.prune import Prune as Prune
    from lbyl.runtime.bench import Bench as Bench
    from lbyl.runtime.bench import bench as bench
    from lbyl.runtime.registry import register as register
    from lbyl.selection.criteria.base import Criterion as Criterion
    from lbyl.selection.criteria.base import SeeingCriterion as SeeingCriterion
    from lbyl.selection.criteria.energy import Energy as Energy
    from lbyl.selection.criteria.geometric_median import GeometricMedian as GeometricMedian
    from lbyl.selection.criteria.l1 import L1 as L1
    from lbyl.selection.criteria.l2 import L2 as L2
    from lbyl.selection.criteria.obs import OBS as OBS
    from lbyl.selection.criteria.random import Random as Random
    from lbyl.selection.filters import Filters as Filters
    from lbyl.selection.view import ChannelView as ChannelView
    from lbyl.surgery.masking import Delivery as Delivery
    from lbyl.surgery.plan import Plan as Plan


def _read() -> dict[str, str]:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = (node for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


HOME = _read()
"""The module of each public name."""

FAMILIES: dict[str, dict[str, str]] = {
    "criterion": {
        "l2": "L2",
        "l1": "L1",
        "gm": "GeometricMedian",
        "energy": "Energy",
        "obs": "OBS",
        "random": "Random",
    },
    "restorer": {"lbyl": "LBYL", "merge": "Merge", "coreset": "Coreset", "prune": "Prune"},
    "moments": {
        "weights": "Weights",
        "gaussian": "Gaussian",
        "noise": "Noise",
        "photographs": "Photographs",
        "dream": "Dream",
        "classdream": "ClassDream",
        "generated": "Generated",
        "sentences": "Sentences",
        "data": "Data",
    },
    "format": {
        "onnx": "lbyl.io.export.onnx:OnnxFormat",
        "pt2": "lbyl.io.export.pt2:Pt2Format",
        "gguf": "lbyl.io.export.gguf:GgufFormat",
    },
}
"""The short names of the members of each family, for arguments and the command line.

A member is a public name, or ``module:name`` if it has no public name.
"""
