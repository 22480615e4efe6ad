"""What the user sees while weights are written: a bar on a terminal, now and then a line elsewhere."""

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
        self._begun = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """``done`` bytes of ``total`` are through."""
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            left = (now - self._begun) / done * (total - done)
            said = f"{self._text} {done / total:.0%} of {total / 1e9:,.1f} GB, {left:,.0f} s left"
            print(said, file=self._stream, flush=True)

    def close(self) -> None:
        """No more is coming."""


class BarProgress:
    """A bar with size, speed and time left, by rich."""

    def __init__(self, text: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._task = self._bars.add_task(text, total=None)

    def __call__(self, done: int, total: int) -> None:
        """``done`` bytes of ``total`` are through."""
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
