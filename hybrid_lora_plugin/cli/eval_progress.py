"""What the user sees while responses come and are judged: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class LineProgress:
    """A line every ``interval`` seconds; what takes less says nothing.

    Args:
        text: what is done.
        stream: standard error by default.
        interval: between two lines, s.
    """

    def __init__(self, text: str, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self._text, self._stream, self._interval = text, stream or sys.stderr, interval
        self._first: tuple[float, int] | None = None
        self._shown, self._before = 0.0, 0

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` are through; the first call says how many an earlier run did."""
        now = time.monotonic()
        if self._first is None:
            self._before = done
        # From the first one on that comes now: the engine's start is no measure of its speed.
        if self._first is None or self._first[1] == self._before < done:
            self._first, self._shown = (now, done), now
        began, before = self._first
        if now - self._shown >= self._interval and done > before:
            self._shown = now
            left = (now - began) / (done - before) * (total - done)
            print(f"{self._text} {done:,} of {total:,}, {left:,.0f} s left", file=self._stream, flush=True)

    def close(self) -> None:
        """No more is coming."""


class BarProgress:
    """A bar with the number done and the time left, by rich."""

    def __init__(self, text: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._task = self._bars.add_task(text, total=None)

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` are through."""
        # Not before: whatever is refused first is one line without a bar.
        self._bars.start()
        self._bars.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """No more is coming."""
        self._bars.stop()


def progress_for(text: str) -> LineProgress | BarProgress:
    """A bar if standard error is a terminal and rich is installed, else lines."""
    if sys.stderr.isatty():
        try:
            return BarProgress(text)
        except ImportError:
            pass
    return LineProgress(text)
