"""What dropped channels leave behind: one small class a restorer.

A weights-only restorer is anything with a ``deliver`` method (:class:`Restorer`); pass an instance to
:func:`lbyl.compress`, or add a file here and its name to ``RESTORERS``.
"""

from __future__ import annotations

from torch import nn

from lbyl.errors import InputError
from lbyl.moments import Dream, Photographs
from lbyl.restorers.base import Delivery, Restorer
from lbyl.restorers.coreset import Coreset
from lbyl.restorers.lbyl import LBYL
from lbyl.restorers.least_squares import LeastSquares
from lbyl.restorers.merge import Merge
from lbyl.restorers.prune import Prune

RESTORERS: dict[str, type[Restorer]] = {"lbyl": LBYL, "prune": Prune, "merge": Merge, "coreset": Coreset}


def resolve_restorer(restore: str | Restorer | LeastSquares) -> Restorer | LeastSquares:
    """A restorer by its lower-case name, or the object itself.

    Raises:
        InputError: an unknown name, or an object without ``deliver``.
    """
    if isinstance(restore, LeastSquares):
        return restore
    if isinstance(restore, str):
        if restore not in RESTORERS:
            raise InputError(f"unknown restorer {restore!r}; choose one of auto, {', '.join(RESTORERS)}")
        return RESTORERS[restore]()
    if isinstance(restore, type) or not isinstance(restore, Restorer):
        raise InputError(f"restore={restore!r} has no deliver(filters, keep, drop, generator) method")
    return restore


def choose_restorer(model: nn.Module) -> tuple[LeastSquares, str]:
    """The best restorer that needs no data of the user's, and why: what ``restore="auto"`` stands for."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if norms:
        why = f"auto: dreamed probes, for {len(norms)} batch norms say what inputs do"
        return LeastSquares(moments=Dream()), f"{why}; with lbyl's own photographs, if inputs are color images"
    why = "auto: no batch norm says what inputs do: lbyl's own photographs, or noise if inputs are no color images"
    return LeastSquares(moments=Photographs()), f"{why}; steadied by the weights' own moments"


__all__ = [
    "LBYL",
    "RESTORERS",
    "Coreset",
    "Delivery",
    "LeastSquares",
    "Merge",
    "Prune",
    "Restorer",
    "choose_restorer",
    "resolve_restorer",
]
