"""What all tests share: one thread each, here and in the processes that they start.

Threads of two test processes on two cores wait for each other at the end of every operation. One thread a process
keeps the time of a test what it is, however busy the machine.
"""

from __future__ import annotations

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that are marked "posix" on Windows."""
    if os.name != "posix":
        for item in items:
            if item.get_closest_marker("posix"):
                item.add_marker(pytest.mark.skip(reason="needs a POSIX system"))


def pytest_collection_finish() -> None:
    """Leave what was imported to itself: looking through it for garbage would take a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
