"""Makes single points of a sweep: here, or as tasks of a cluster that send back the files of a point."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from torch import nn

from lbyl.errors import LbylError
from lbyl.io.report.report import Report
from lbyl.moments import Data
from lbyl.pipeline.analysis import Analysis
from lbyl.pipeline.evaluate import Evaluate, Judge
from lbyl.pipeline.prepare import Prepared, unless_refused
from lbyl.pipeline.quality import meet
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.pipeline.sweep.pareto import Point
from lbyl.runtime.cluster import Cluster, check_address, check_reachable, packed
from lbyl.runtime.contexts import own_settings
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forecast import Forecast
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Clock
from lbyl.runtime.recursion import deep_calls
from lbyl.surgery.plan import Remembered, recalled, remember_as

_Any = TypeVar("_Any")


@dataclass(frozen=True)
class Work:
    """What the points of a sweep share.

    Attributes:
        prepared: the network, checked and traced.
        ground: the analysis of each of its parts.
        request: the settings; the budget is that of the point.
        evaluate: the user's function.
        unpruned: the value of this function for the unpruned network.
        known: how the network was cut before, if it was.
    """

    prepared: Prepared
    ground: Mapping[str, Analysis]
    request: CompressionRequest
    evaluate: Evaluate | None
    unpruned: float | None
    known: Remembered | None = None

    def __call__(self, point: Point, judge: Judge, request: CompressionRequest) -> Result | LbylError:
        """The smaller network of a point, or the reason why there is none."""
        asked = replace(request, budget=point.limit)
        return unless_refused(
            lambda: meet(self.prepared, asked, Clock(), self.ground, judge=judge, before=self.unpruned)
        )


@dataclass(frozen=True)
class Made:
    """What a task returns.

    Attributes:
        point: the point, with its values or with the reason why it could not be made.
        files: the content of each file of its folder.
        fault: the error of the user's function on this network, if it failed.
    """

    point: Point
    files: Mapping[str, bytes]
    fault: LbylError | None = None


def made_in(cluster: Cluster, work: Work, points: Sequence[Point]) -> Iterator[Made]:
    """Make points in a cluster, and return each when it is done.

    Raises:
        InputError: the network, its inputs or a setting can't be pickled.
        ClusterError: the cluster can't do the work.
    """
    devices = {tensor.device for tensor in tensors_of(work.prepared.model).values() if tensor.is_cuda}
    shared = packed({"the network, its inputs or a setting": _sent(work)})
    for _, made in cluster.each(_point, shared, points, gpus=len(devices)):
        yield made


def check_cluster(
    address: str, model: nn.Module, inputs: ExampleInputs, request: CompressionRequest, evaluate: Evaluate | None
) -> None:
    """Check before any time is spent that a cluster is there, and that all it needs can be sent.

    Raises:
        InputError: something can't be pickled.
        ClusterError: Ray is not installed, or there is no cluster at this address.
    """
    check_address(address)
    check_reachable(address)
    settings = replace(request, progress=None, restore=_without_data(request.restore))
    with deep_calls(model):
        packed({"the network": model, "example_inputs": inputs, "a setting": settings, "evaluate": evaluate})


def _sent(work: Work) -> Work:
    """The work without what stays here: the function that shows progress, and the user's data, which was measured."""
    prepared = work.prepared
    forecaster = prepared.forecaster
    if forecaster is not None:
        forecaster = replace(forecaster, progress=None)
        # Parts of a network are not forecast one by one, so the restorers' probes are not used.
        forecaster.make_probes([prepared.subjects[0].restorer] if prepared.traced.graph is not None else [])
    subjects = tuple(replace(each, restorer=_without_data(each.restorer)) for each in prepared.subjects)
    return replace(
        work,
        prepared=replace(prepared, subjects=subjects, forecaster=forecaster),
        ground={path: _sent_analysis(found) for path, found in work.ground.items()},
        request=replace(work.request, progress=None, restore=_without_data(work.request.restore)),
        known=recalled(prepared.model),
    )


def _sent_analysis(found: Analysis) -> Analysis:
    probes = found.seen.probes and replace(found.seen.probes, beyond=None)
    # The reference holds the network once more, and takes less time than a point.
    seen = replace(found.seen, probes=probes)
    return replace(found, restorer=_without_data(found.restorer), seen=seen, reference=None)


def _without_data(restorer: _Any) -> _Any:
    """The restorer without the batches of its :class:`lbyl.Data`: probes were made of them already."""
    moments = getattr(restorer, "moments", None)
    if not isinstance(moments, Data) or not is_dataclass(restorer) or isinstance(restorer, type):
        return restorer
    return replace(restorer, moments=replace(moments, source=()))  # pyright: ignore[reportReturnType]


@own_settings()
def _point(shared: Mapping[str, Work], point: Point) -> Made:
    """The task: make one point, save it to a temporary folder, evaluate it, and return all of that."""
    (work,) = shared.values()
    model, judge, started = work.prepared.model, Judge(work.evaluate), perf_counter()
    with deep_calls(model):
        remember_as(model, work.known)
        result = work(point, judge, work.request)
        if isinstance(result, LbylError):
            return Made(replace(point, reason=str(result)), {})
        with tempfile.TemporaryDirectory() as place:
            folder = result.save(Path(place) / point.name)
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
        point = filled(point, result.report, perf_counter() - started)
        try:
            return Made(replace(point, accuracy=judge(result.model, point.asked)), files)
        except LbylError as error:
            return Made(point, files, error)


def filled(point: Point, report: Report, seconds: float | None) -> Point:
    """A point with the values from its report."""
    seen, told = report.assessment, report.forecast or Forecast()
    bounds = {} if told.agreement is None else {"agreement": told.agreement, "low": told.low, "high": told.high}
    return replace(
        point,
        made=True,
        reason="",
        parameters=report.parameters,
        macs=report.macs,
        pruned=seen.pruned if seen else None,
        error=seen.restored if seen else None,
        seconds=seconds,
        **bounds,
    )
