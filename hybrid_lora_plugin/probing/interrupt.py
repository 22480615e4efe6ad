"""Stopping at the next step boundary instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType


class ProbeInterrupted(KeyboardInterrupt):
    """The probe stopped on request after saving its state.

    Attributes:
        folder: the saved state; the same command continues from it.
        signum: the signal that asked for it.
    """

    def __init__(self, folder: Path, signum: int) -> None:
        super().__init__(f"interrupted; state kept in {folder}")
        self.folder, self.signum = folder, signum


class StopRequest:
    """While entered, SIGINT and SIGTERM set ``signum`` instead of ending the process.

    A second SIGINT interrupts at once, for a step that takes too long. Outside the main thread, where
    Python lets no one handle signals, it does nothing.
    """

    signum: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
