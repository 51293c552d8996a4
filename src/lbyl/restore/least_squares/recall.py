"""What the original network computes in paired passes, kept for further points of a sweep, which compute it again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lbyl.runtime.memory import available_bytes

_MOST, _OF_MEMORY, _OF_AVAILABLE = 2**30, 0.4, 0.25
"""The most bytes that are kept; and their largest shares of what activations may take, and of what is available."""
_SMALL = float("inf")
"""The worth of what is small, and stays when larger things make way."""


@dataclass
class _Kept:
    """Some tensors, and how much work each of their bytes saves."""

    tensors: tuple[Tensor, ...]
    worth: float

    @property
    def size(self) -> int:
        """Bytes."""
        return _bytes(self.tensors)


@dataclass
class Recall:
    """Results of the original network on the same probes, within a bound of memory. Only time depends on it.

    Attributes:
        room: bytes that all may take; with 0, nothing is kept.
        setting: what the results depend on apart from network and probes; see :meth:`begin`.
    """

    room: int = 0
    setting: Hashable = None
    _kept: dict[str, _Kept] = field(default_factory=dict)

    @staticmethod
    def within(memory: int) -> Recall:
        """A store with a share of what activations may take, as far as the machine has memory to spare."""
        return Recall(int(min(_MOST, _OF_MEMORY * memory, _OF_AVAILABLE * available_bytes())))

    @property
    def held(self) -> int:
        """Bytes that are kept now."""
        return sum(each.size for each in self._kept.values())

    def begin(self, setting: Hashable) -> None:
        """Begin a pass. What another setting gave is forgotten, as it may be rounded in another way."""
        if setting != self.setting:
            self._kept.clear()
        self.setting = setting

    def get(self, name: str) -> tuple[Tensor, ...] | None:
        """What was kept under this name, which must not be changed in place; None if nothing was."""
        found = self._kept.get(name)
        return found.tensors if found else None

    def keep(self, name: str, tensors: Sequence[Tensor], worth: float = _SMALL) -> None:
        """Keep copies, if there is room once everything of less worth has made way.

        Args:
            name: what it is called in the next pass.
            tensors: tensors on the CPU; others are not kept.
            worth: the work that each byte saves, in any unit.
        """
        size = _bytes(tensors)
        if not self.room or any(tensor.device.type != "cpu" for tensor in tensors):
            return
        least = sorted((each.worth, other) for other, each in self._kept.items() if each.worth < worth)
        free, gone = self.room - self.held, []
        for _, other in least:
            if free >= size:
                break
            free += self._kept[other].size
            gone.append(other)
        if free < size:
            return
        for other in gone:
            del self._kept[other]
        self._kept[name] = _Kept(tuple(tensor.clone() for tensor in tensors), worth)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
