"""The channel graph: which channels belong together, and which layers read them."""

from lbyl.graph.trace import trace
from lbyl.graph.types import NOT_OURS, Average, Consumer, Depthwise, Graph, Group, Norm, Producer, Size, Slot, Step

__all__ = [
    "NOT_OURS",
    "Average",
    "Consumer",
    "Depthwise",
    "Graph",
    "Group",
    "Norm",
    "Producer",
    "Size",
    "Slot",
    "Step",
    "trace",
]
