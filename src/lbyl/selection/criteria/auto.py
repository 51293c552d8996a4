"""Chooses the default criterion."""

from __future__ import annotations

from torch import nn

from lbyl.runtime.batch_norms import norms_cover
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.criteria.energy import Energy
from lbyl.selection.criteria.l2 import L2
from lbyl.selection.criteria.obs import OBS


def choose_criterion(
    model: nn.Module, probed: bool, lifelike: bool, texts: bool
) -> tuple[Criterion | SeeingCriterion, str]:
    """The criterion for ``criterion="auto"``, and a note that says so.

    It is OBS wherever activations tell more than weights: on inputs like real ones, and in networks whose layer, group
    or instance norms keep activations on probes similar to those on inputs. For texts it is energy, and elsewhere L2.

    Args:
        model: the network.
        probed: whether the network is run on probes anyway, so that activations can be measured.
        lifelike: whether these probes are like real inputs.
        texts: whether inputs are tokens. They are too few for the thousands of neurons of a language model.
    """
    if not probed or not (lifelike or (_normalizes(model) and not norms_cover(model))):
        return L2(), "auto: channels are chosen by the L2 norm of their filters"
    if texts:
        return Energy(), "auto: channels are chosen by the energy that consumers take from them"
    return OBS(), "auto: channels are chosen by OBS: those that the others replace best"


def _normalizes(model: nn.Module) -> bool:
    """Whether the network has layer, group or instance norms, or modules with "norm" in their name."""
    return any("norm" in type(module).__name__.lower() for module in model.modules())
