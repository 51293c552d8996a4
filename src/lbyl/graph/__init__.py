"""The channel graph: which channels belong together, and who reads them."""

from lbyl.graph.trace import trace
from lbyl.graph.types import NOT_OURS, Average, Depthwise, Graph, Group, Norm, Producer, Reader, Size, Slot, Step

__all__ = [
    "NOT_OURS",
    "Average",
    "Depthwise",
    "Graph",
    "Group",
    "Norm",
    "Producer",
    "Reader",
    "Size",
    "Slot",
    "Step",
    "trace",
]
