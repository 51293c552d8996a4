"""Chooses the default criterion."""

from __future__ import annotations

from torch import nn

from lbyl.runtime.batch_norms import norms_cover
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.criteria.energy import Energy
from lbyl.selection.criteria.l2 import L2
from lbyl.selection.criteria.obs import OBS


def choose_criterion(model: nn.Module, probed: bool, lifelike: bool) -> tuple[Criterion | SeeingCriterion, str]:
    """The criterion for ``criterion="auto"``, and a note that says why.

    With batch norms, which make up for means, it is OBS on covariances, with the ridge of least squares. Without
    them, energy is better on few samples. On inputs that tell little, it is L2.

    Args:
        model: the network.
        probed: whether the network is run on probes anyway, so that activations can be measured.
        lifelike: whether these probes are like real inputs. On other probes, the activations of a network without
            norms are less informative than its weights.
    """
    if probed and lifelike and norms_cover(model):
        return OBS(ridge=0.3, centered=True), "auto: channels are chosen by OBS: those that the others make up for best"
    if probed and not norms_cover(model) and (lifelike or _normalizes(model)):
        return Energy(), "auto: channels are chosen by the energy that consumers take from them"
    return L2(), "auto: channels are chosen by the L2 norm of their filters"


def _normalizes(model: nn.Module) -> bool:
    """Whether the network has layer, group or instance norms, or modules with "norm" in their name."""
    return any("norm" in type(module).__name__.lower() for module in model.modules())
