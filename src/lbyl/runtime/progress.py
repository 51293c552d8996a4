"""Progress reports of long steps, and the time that every stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``."""

T = TypeVar("T")


def counted(items: Sequence[T], progress: Progress | None, stage: str) -> Iterator[T]:
    """The items one by one; each is reported once the next one is asked for."""
    for done, item in enumerate(items, 1):
        yield item
        if progress:
            progress(stage, done, len(items))


@dataclass
class Clock:
    """Wall-clock seconds by stage; time spent again in a stage is added."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent within the context to a stage."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
