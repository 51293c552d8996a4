"""Sources of second moments: one small class for each."""

from __future__ import annotations

from lbyl.moments.base import ChannelMoments, ClosedFormSource, Probes, ProbeSource
from lbyl.moments.class_dream import ClassDream
from lbyl.moments.data import Data
from lbyl.moments.dream import Dream
from lbyl.moments.gaussian import Gaussian
from lbyl.moments.generated import Generated
from lbyl.moments.noise import Noise
from lbyl.moments.photographs import Photographs
from lbyl.moments.sentences import Sentences
from lbyl.moments.weights import Weights
from lbyl.runtime.progress import Progress

__all__ = [
    "ChannelMoments",
    "ClassDream",
    "ClosedFormSource",
    "Data",
    "Dream",
    "Gaussian",
    "Generated",
    "Noise",
    "Photographs",
    "ProbeSource",
    "Probes",
    "Progress",
    "Sentences",
    "Weights",
]
