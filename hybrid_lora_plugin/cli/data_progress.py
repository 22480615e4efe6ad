"""What the user sees while data are prepared: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from hybrid_lora_plugin.preparation.runner import Watch


class LineWatch(Watch):
    """A line every ``interval`` seconds; what takes less says nothing.

    Args:
        stream: standard error by default.
        interval: between two lines, s.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self._stream, self._interval, self._text = stream or sys.stderr, interval, ""
        self._shown = time.monotonic()

    def stage(self, text: str) -> None:
        """See ``Watch``."""
        self._text = text

    def rows(self, read: int, kept: int, share: float | None) -> None:
        """See ``Watch``."""
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            of_part = "" if share is None else f", {share:.0%} of this part"
            print(f"{self._text}: {read:,} rows read, {kept:,} kept{of_part}", file=self._stream, flush=True)


class BarWatch(Watch):
    """A bar with rows read and kept, by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._task = self._bars.add_task("", total=None)
        self._text = ""

    def stage(self, text: str) -> None:
        """See ``Watch``."""
        self._text = text
        self._bars.update(self._task, description=text, total=None)

    def rows(self, read: int, kept: int, share: float | None) -> None:
        """See ``Watch``."""
        # Not before: whatever is refused first is one line without a bar.
        self._bars.start()
        told = f"{self._text}: {read:,} rows read, {kept:,} kept"
        self._bars.update(self._task, description=told, total=None if share is None else 1.0, completed=share or 0.0)

    def close(self) -> None:
        """See ``Watch``."""
        self._bars.stop()


def watch_for() -> Watch:
    """A bar if standard error is a terminal and rich is installed, else lines."""
    if sys.stderr.isatty():
        try:
            return BarWatch()
        except ImportError:
            pass
    return LineWatch()
