"""Progress reports of long steps, and the time that every stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``."""

P = ParamSpec("P")
T = TypeVar("T")


class _Canceled(BaseException):
    """An exception of a user's ``progress``. It is no `Exception`, and so passes what catches a model's errors.

    Attributes:
        error: the exception.
        by: the function that raised it.
    """

    def __init__(self, error: Exception, by: Progress) -> None:
        super().__init__(str(error))
        self.error, self.by = error, by


def cancelable(function: Callable[P, T]) -> Callable[P, T]:
    """Let an exception of the keyword argument ``progress`` end the function: raising one is how users cancel.

    Elsewhere exceptions of a user's model are caught, because something else may work for that model.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        given: Any = kwargs.get("progress")
        if not callable(given):
            return function(*args, **kwargs)

        def progress(stage: str, done: int, total: int) -> None:
            try:
                given(stage, done, total)
            except Exception as error:
                raise _Canceled(error, progress) from error

        kwargs["progress"] = progress
        try:
            return function(*args, **kwargs)
        except _Canceled as canceled:
            if canceled.by is progress:
                raise canceled.error from None
            raise

    return run


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
