"""What the user sees while a probe runs: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


class Progress:
    """Silent progress, and the interface of the others."""

    def note(self, text: str) -> None:
        """Say something once."""

    def reading(self, rows: int, share: float) -> None:
        """``rows`` rows are read and checked, ``share`` of all files, from 0 to 1."""

    def tokenising(self, done: int, total: int) -> None:
        """``done`` of ``total`` rows are tokenised."""

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
        self._said: float | None = None  # when rows were last reported, or first could have been

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def reading(self, rows: int, share: float) -> None:
        self._sometimes(lambda: f"reading rows: {rows:,}, {100 * share:.0f} %")

    def tokenising(self, done: int, total: int) -> None:
        self._sometimes(lambda: f"tokenising rows: {done:,} of {total:,}")

    def _sometimes(self, text: Callable[[], str]) -> None:
        """Say what takes longer than the interval, and that only once in it: a mistake is one line."""
        now = time.monotonic()
        self._said = now if self._said is None else self._said
        if now - self._said >= self._interval:
            self._said = now
            self.note(text())

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
        self._rows: Any = None
        self._drawn = time.monotonic()

    def reading(self, rows: int, share: float) -> None:
        self._count_rows(f"reading rows: {rows:,}", share, 1.0)

    def tokenising(self, done: int, total: int) -> None:
        self._count_rows(f"tokenising rows: {done:,}", done, total)

    def _count_rows(self, text: str, done: float, total: float) -> None:
        if time.monotonic() - self._drawn < 0.1:
            return
        self._drawn = time.monotonic()
        if self._rows is None:
            self._rows = self._bars.add_task(text, total=total, loss="–")
        self._bars.update(self._rows, description=text, completed=done, total=total)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def stage(self, name: str, total: int, done: int) -> None:
        if self._rows is not None:
            self._bars.remove_task(self._rows)
            self._rows = None
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
