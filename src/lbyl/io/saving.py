"""`save`: a compressed network with the weights that it has now, as a folder that `load` reads."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from lbyl.errors import InputError
from lbyl.io import artifact
from lbyl.io.report.report import Report
from lbyl.io.report.words import evaluation
from lbyl.runtime.checks import check_module
from lbyl.runtime.copying import unwrapped
from lbyl.runtime.forecast import Forecast
from lbyl.surgery.plan import Plan, architecture_of, recalled


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a compressed network, with the weights that it has now, into a new folder.

    For networks that :func:`lbyl.compress` made or :func:`lbyl.load` read and that were trained since. The folder is
    like that of ``result.save``; where the weights have been changed, model card and report say so, and what was
    foretold and measured before is left out.

    Args:
        model: the network, or what wraps it for training (``DataParallel``, ``torch.compile``); it is not changed.
        path: the new folder.

    Raises:
        InputError: the network carries no plan, its layers have been replaced since, or the path exists or can't be
            written.

    Examples:
        >>> import tempfile, torch, lbyl
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> smaller = lbyl.compress(net, torch.randn(4, 8), ratio=0.25).model
        >>> loss = smaller(torch.randn(4, 8)).square().mean()
        >>> loss.backward()
        >>> torch.optim.SGD(smaller.parameters(), lr=0.1).step()
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = lbyl.save(smaller, f"{place}/trained")
        ...     lbyl.load(folder, net)[0].weight.equal(smaller[0].weight)
        True
    """
    check_module(model)
    network = unwrapped(model)
    return artifact.save(path, network, *saved_as(network))


def saved_as(network: nn.Module) -> tuple[Plan, Report]:
    """Plan and report of a compressed network as it is now.

    Raises:
        InputError: it carries no plan, or has other shapes than the plan leads to.
    """
    known, name = recalled(network), type(network).__name__
    if known is None:
        raise InputError(
            f"this {name} carries no plan, for lbyl.compress or lbyl.load did not make it in this process. Load the "
            "saved folder and put the weights into that: net = lbyl.load(folder); "
            "net.load_state_dict(model.state_dict()); lbyl.save(net, path)"
        )
    now = architecture_of(network)
    changed = [key for key in {**known.architecture, **now} if known.architecture.get(key) != now.get(key)]
    if changed:
        was, found = ("x".join(map(str, each.get(changed[0], ()))) or "missing" for each in (known.architecture, now))
        raise InputError(
            f"{changed[0]} is {found} in this {name}, {was} by its plan: a layer was replaced since, and lbyl.load "
            "could not build it. Compress a network that has this layer already, or write a file that needs no plan: "
            'lbyl.export(model, to="model.pt2", inputs=...)'
        )
    return as_trained(network, known.plan, known.report)


def as_trained(network: nn.Module, plan: Plan, report: Report) -> tuple[Plan, Report]:
    """Plan and report, which say so if the network's weights have been changed since these were made."""
    known = recalled(network)
    if known is None or not known.is_changed(network):
        return plan, report
    notes = list(report.notes)
    if report.evaluation:
        notes.append(f"before it was trained: {evaluation(report.evaluation)}")
    if _TRAINED not in notes:
        notes.append(_TRAINED)
    forecast = Forecast(why="the network was trained after it was compressed, and all forecasts were made before")
    report = replace(
        report, forecast=forecast, evaluation=None, assessment=None, held_out_errors={}, notes=tuple(notes)
    )
    return replace(plan, trained=True), report


_TRAINED = "the weights were changed after the network was compressed, by training, say"
