"""What the user sees while a probe runs: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Silent progress, and the interface of the others."""

    def note(self, text: str) -> None:
        """Say something once."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage of ``total`` steps of which ``done`` were taken by an earlier run."""

    def advance(self, done: int, loss: float) -> None:
        """``done`` steps of the stage are taken, the last with this loss."""

    def close(self) -> None:
        """No more is coming."""


class LineProgress(Progress):
    """One line every ``interval`` seconds, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, interval: float = 5.0) -> None:
        self._stream = stream or sys.stderr
        self._interval = interval

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def stage(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._first = name, total, done
        self._begun = self._shown = time.monotonic()

    def advance(self, done: int, loss: float) -> None:
        now = time.monotonic()
        if now - self._shown < self._interval and done < self._total and done > self._first + 1:
            return
        self._shown = now
        each = (now - self._begun) / (done - self._first)
        eta = clock(each * (self._total - done))
        self.note(f"{self._name} {done}/{self._total}  loss {loss:.4f}  {each:.2f} s/step  ETA {eta}")


class BarProgress(Progress):
    """A bar with ETA, by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bars.start()

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def stage(self, name: str, total: int, done: int) -> None:
        self._task = self._bars.add_task(name, total=total, completed=done, loss="–")

    def advance(self, done: int, loss: float) -> None:
        self._bars.update(self._task, completed=done, loss=f"{loss:.4f}")

    def close(self) -> None:
        self._bars.stop()


def clock(seconds: float) -> str:
    """``h:mm:ss`` or ``m:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def for_terminal() -> Progress:
    """A bar if standard error is a terminal and rich is installed, else lines."""
    if sys.stderr.isatty():
        try:
            return BarProgress()
        except ImportError:
            pass
    return LineProgress()
