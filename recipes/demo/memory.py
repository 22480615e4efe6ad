"""Peak memory of this process and everything it started."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil


class PeakMemory:
    """Samples the proportional set size (shared pages divided among their users) of the whole process tree.

    Attributes:
        peak: bytes, the largest sum seen; None where the system does not tell (PSS is a Linux figure).
    """

    def __init__(self, every: float = 2.0):
        self.peak: int | None = None
        self._every, self._stop = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            total = 0
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                total += _proportional_set_size(process.pid)
            if total:
                self.peak = max(self.peak or 0, total)


def _proportional_set_size(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        pass  # the process has ended, or this is not Linux
    return 0
