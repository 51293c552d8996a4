"""A network whose analysis is kept in a folder, for several sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lbyl.errors import LbylError
from lbyl.pipeline.analysis import Analysis, Cuttable, analyze, find_cuttable
from lbyl.pipeline.prepare import Prepared, first_that_restores, prepare, unless_refused
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.sweep.cache import FolderCache
from lbyl.runtime.forecast import Forecast
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Clock


@dataclass
class Network:
    """The network, which is traced and analyzed at first use; a finished sweep needs neither."""

    model: nn.Module
    inputs: ExampleInputs
    request: CompressionRequest
    submodule: str | None
    clock: Clock = field(default_factory=Clock)

    @cached_property
    def prepared(self) -> Prepared:
        """The checked and traced network."""
        return prepare(self.model, self.inputs, self.request, self.submodule, self.clock)

    @cached_property
    def cuttable(self) -> dict[str, Cuttable]:
        """The groups that can be cut, for each part; parts without such groups are left out if others have some."""
        found: dict[str, Cuttable] = {}
        refusals: list[LbylError] = []
        with self.clock("verify"):
            for subject in self.prepared.subjects:
                cuttable = unless_refused(lambda subject=subject: find_cuttable(subject, self.request))
                if isinstance(cuttable, Cuttable):
                    found[subject.path] = cuttable
                else:
                    refusals.append(cuttable)
        if refusals and (self.request.strict or not found):
            raise refusals[0]
        return found

    def ground(self, folder: Path, fingerprint: Mapping[str, Any], several: bool = False) -> dict[str, Analysis]:
        """The analysis of each part, from its folder in this one if it is stored there, and else stored.

        Args:
            folder: the folder of all parts.
            fingerprint: everything that the analysis depends on.
            several: whether the network will be restored for more than one budget.
        """
        key = json.dumps(dict(fingerprint), sort_keys=True)
        ground: dict[str, Analysis] = {}
        for number, subject in enumerate(self.prepared.subjects):
            place, private = folder / str(number), subject.restorer.keeps_inputs_private
            cache = FolderCache(place, subject.graph, subject.inputs, private, key)
            if not cache.begun and subject.path not in self.cuttable:
                continue
            cache.cuttable(lambda path=subject.path: self.cuttable[path])
            ground[subject.path] = first_that_restores(
                subject, self.request, lambda s, c=cache: analyze(s, self.request, None, self.clock, c, several)
            )[1]
        return ground

    def forecasts(self, folder: Path, fingerprint: Mapping[str, Any]) -> Callable[[nn.Module], Forecast]:
        """What forecasts for smaller networks, as `compress` does; the request asks for forecasts."""
        forecaster, probes = self.prepared.forecaster, None
        assert forecaster is not None
        if self.prepared.traced.graph is not None and forecaster.asks_for_probes(self.prepared.subjects[0].restorer):
            analysis = self.ground(folder, fingerprint)[""]
            if forecaster.asks_for_probes(analysis.restorer):
                probes = analysis.seen.probes
        return lambda smaller: forecaster(smaller, probes)
