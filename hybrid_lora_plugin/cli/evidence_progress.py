"""What the user sees while arms are compared: a bar with the time left on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from hybrid_lora_plugin.evidence.stages import Watch
from hybrid_lora_plugin.probing.progress import clock


class LineWatch(Watch):
    """A line every ``interval`` seconds while a stage goes on.

    Args:
        stream: standard error by default.
        interval: between two lines, s.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self._stream, self._interval = stream or sys.stderr, interval
        self._text, self._total, self._done = "", 0, 0
        self._begun = self._shown = time.monotonic()

    def say(self, line: str) -> None:
        """See ``Watch``."""
        print(line, flush=True)

    def stage(self, text: str, total: int) -> None:
        """See ``Watch``."""
        self._text, self._total, self._done = text, total, 0
        self._begun = self._shown = time.monotonic()

    def advance(self, parts: int) -> None:
        """See ``Watch``."""
        self._done += parts
        now = time.monotonic()
        if now - self._shown >= self._interval or self._done == self._total:
            self._shown = now
            each = max(now - self._begun, 1e-6) / self._done
            said = f"{self._text}: {self._done:,} of {self._total:,}, {rate(each)}"
            said += f", ETA {clock(each * (self._total - self._done))}"
            print(said, file=self._stream, flush=True)


def rate(each: float) -> str:
    """How fast parts come that take ``each`` seconds."""
    return f"{1 / each:,.1f} a second" if each < 1 else f"{each:,.1f} s each"


class BarWatch(Watch):
    """A bar with parts done, their rate and time left, by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class RateColumn(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(rate(1 / task.speed) if task.speed else "")

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn()
        self._bars = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True))
        self._task = None

    def say(self, line: str) -> None:
        """See ``Watch``."""
        # While a bar is live, rich puts what is printed above it.
        print(line, flush=True)

    def stage(self, text: str, total: int) -> None:
        """See ``Watch``."""
        if self._task is not None:
            self._bars.stop_task(self._task)
        # Not before: whatever is refused first is one line without a bar.
        self._bars.start()
        self._task = self._bars.add_task(text, total=total)

    def advance(self, parts: int) -> None:
        """See ``Watch``."""
        self._bars.advance(self._task, parts)

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
