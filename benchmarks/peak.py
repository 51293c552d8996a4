"""How large this process has been."""

from __future__ import annotations

from pathlib import Path

import psutil


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
