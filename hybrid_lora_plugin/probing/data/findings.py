"""What a user is told about the rows: each kind of finding once, with its first example and how often it was met."""

from __future__ import annotations

_SHOWN = 60


class Findings:
    """Counts of findings in the order in which they were first met."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, text: str) -> None:
        """Count a finding; of each kind only the first text is kept."""
        self._texts.setdefault(kind, text)
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def lines(self) -> list[str]:
        """One line for each kind."""
        return [f"{count_of(self._counts[kind], 'row')}: {text}" for kind, text in self._texts.items()]


def count_of(count: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def start_of(text: str) -> str:
    """The beginning of a text, quoted."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def end_of(text: str) -> str:
    """The end of a text, quoted."""
    return repr(text if len(text) <= _SHOWN else f"…{text[-_SHOWN:]}")
