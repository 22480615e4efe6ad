"""The minutes of a check, shared among its stages; a stage that fails does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINUTES = 20
#: seconds that a stage is expected to take at most, of the twenty minutes
SHARES = {
    "model": 40,
    "probe": 60,
    "merge": 240,
    "export": 60,
    "sparse_merge": 160,
    "adapter": 160,
    "receiver_merge": 160,
    "verl_lora": 160,
    "bypass": 130,
}
#: where time is left, a stage may take so many times its share
STRETCH = 2

DONE, FAILED, SKIPPED = "done", "failed", "skipped"


@dataclass
class Outcome:
    """What became of a stage.

    Attributes:
        name: of the stage.
        state: ``done``, ``failed`` or ``skipped``.
        seconds: it took; 0 where it was skipped.
        why: the error, or the reason of the skip; several lines where an error comes with the end of a log.
        log: where its output is, if it has any.
    """

    name: str
    state: str
    seconds: float = 0.0
    why: str = ""
    log: Path | None = None


class Budget:
    """Runs stages while there is time, and keeps what became of each.

    A stage is skipped where less than its share is left, and where one that it needs is not done; it is told how many
    seconds it may take at most: twice its share, or what is left.

    Args:
        minutes: of all stages; shares are those of ``SHARES`` in proportion.
        say: shows a line.
        clock: seconds, monotonic.
    """

    def __init__(self, minutes: float, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.minutes, self.outcomes = minutes, {}
        self._say, self._clock = say, clock
        self._end = clock() + minutes * 60

    def share(self, name: str) -> float:
        """Seconds of a stage."""
        return SHARES[name] * self.minutes / MINUTES

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - self._clock()

    def run(
        self,
        name: str,
        doing: str,
        stage: Callable[[float], Any],
        needs: tuple[str, ...] = (),
        log: Path | None = None,
    ) -> Any:
        """Run a stage, or skip it.

        Args:
            name: of ``SHARES``.
            doing: what is shown while it runs.
            stage: called with the seconds that it may take; whatever it raises makes the stage fail.
            needs: stages that have to be done.
            log: where its output goes.

        Returns:
            What the stage returned; None where it was skipped or has failed.
        """
        wanting = [need for need in needs if self.outcomes[need].state != DONE]
        if wanting:
            return self._skip(name, f"needs the stage {wanting[0]}, which is not done")
        share, left = self.share(name), self.left
        if left < share:
            return self._skip(name, f"{max(0.0, left):.0f} s were left of {self.minutes:g} minutes, {share:.0f} needed")
        self._say(f"[{name}] {doing}")
        started = self._clock()
        try:
            result = stage(min(STRETCH * share, left))
        except Exception as error:
            why = str(error) or type(error).__name__
            self.outcomes[name] = Outcome(name, FAILED, self._clock() - started, why, log)
            self._say(f"[{name}] FAILED: {why.splitlines()[0]}")
            return None
        self.outcomes[name] = Outcome(name, DONE, self._clock() - started, log=log)
        return result

    def leave_out(self, name: str, why: str) -> None:
        """Note a stage that was not asked for."""
        self._skip(name, why)

    def _skip(self, name: str, why: str) -> None:
        self.outcomes[name] = Outcome(name, SKIPPED, why=why)
        self._say(f"[{name}] skipped: {why}")
