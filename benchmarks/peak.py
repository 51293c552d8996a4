"""How large this process has been, how large tensors are, and processes of their own to measure in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def alone(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script as a fresh process, and read what it prints last."""
    done = subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


class PeakMemory:
    """Peak resident memory of this process since `start`, where the system tells; else None."""

    def start(self) -> None:
        self.before = psutil.Process().memory_info().rss
        try:
            # Linux: 5 sets the high-water mark back to what is resident now.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.known = True
        except OSError:
            self.known = False

    def mebibytes(self) -> float | None:
        """How far the peak rose above the start."""
        if not self.known:
            return None
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return round((int(line.split()[1]) * 1024 - self.before) / 2**20, 1)
        return None
