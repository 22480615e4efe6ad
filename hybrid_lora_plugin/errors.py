"""Every error this package raises on purpose, in one hierarchy.

    HybridLoraError
      ConfigurationError      a value the user gave cannot be used: one line, exit status 2 (1 where a worker finds it)
        UsageError              an argument of a command
        AllocationError         an allocation that cannot be made, written, read or used
        ScoringError            measurements from which no ranking can be made
        ProbeError              a probe that cannot give a meaningful answer
        RowError                a row of a data set that is no problem with an answer
      RewardError             a response could not be judged: the run ends, and nothing is scored 0 instead
      WeightSyncError         rollout weights are not provably the trainer's: the run ends

``probing.interrupt.ProbeInterrupted`` is a ``KeyboardInterrupt`` and no error.

An error that stops a verl run names its entry in ``docs/troubleshooting.md`` by ``see``; the message ends with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

TROUBLESHOOTING = "docs/troubleshooting.md"
_REFERENCE = re.compile(rf" \[{re.escape(TROUBLESHOOTING)}#([a-z0-9-]+)\]")


class HybridLoraError(Exception):
    """Base of all.

    Args:
        message: one line that names the field, the value found, the value wanted and the way out.
        see: anchor of the entry in ``docs/troubleshooting.md``; put at the end of the message.
    """

    def __init__(self, message: str, *, see: str | None = None) -> None:
        # The reference is part of the message, because errors travel between processes as text.
        super().__init__(message if see is None else with_reference(message, see))

    @classmethod
    def relayed(cls, text: str, *, otherwise: str) -> HybridLoraError:
        """An error that says what another one said, in whole or in part; the message ends with one reference.

        Args:
            text: one line with the other error's words somewhere in it, and with their reference if they have one.
            otherwise: anchor where ``text`` has no reference, e.g. because the other error is none of this package.
        """
        message, anchor = split_reference(text)
        return cls(message, see=anchor or otherwise)


@contextmanager
def explained(*, otherwise: str) -> Iterator[None]:
    """Let errors of this package that are raised inside refer to the entry ``otherwise``, if they refer to none yet."""
    try:
        yield
    except HybridLoraError as error:
        # The same error goes on: another one around it would print its traceback twice.
        error.args = error.relayed(str(error), otherwise=otherwise).args
        raise


class ConfigurationError(HybridLoraError, ValueError):
    """A value the user gave cannot be used.

    Command lines print the message without a traceback and exit with status 2.
    """


class UsageError(ConfigurationError):
    """An argument that is not an option of the command, or not of its type."""


class AllocationError(ConfigurationError):
    """An allocation that cannot be made, written, read or used with this model."""


class ScoringError(ConfigurationError):
    """Measurements from which no ranking can be made."""


class ProbeError(ConfigurationError):
    """A probe that cannot give a meaningful answer with these data and settings."""


class RowError(ConfigurationError):
    """A row of a data set that is no problem with an answer.

    Attributes:
        reason: why, in a few words that are the same for all such rows, e.g. ``no answer``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, str(self))


class RewardError(HybridLoraError, RuntimeError):
    """A response could not be judged, through no fault of its own: a sandbox or a process that cannot be had.

    It ends the run: a score of 0 instead would teach the policy that its answer was wrong.
    """


class WeightSyncError(HybridLoraError, RuntimeError):
    """Rollout weights are not, or not provably, the trainer's; the message names the tensor and both sides' view.

    It ends the run: an engine in an unknown state is never tried again.
    """


def reason_of(error: BaseException, most: int = 300) -> str:
    """What an error of a library says, as part of one line, at most that many characters of it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " …"


def with_reference(message: str, see: str) -> str:
    """``message`` with a reference to the entry ``see`` of the troubleshooting page behind it."""
    return f"{message} [{TROUBLESHOOTING}#{see}]"


def split_reference(message: str) -> tuple[str, str | None]:
    """A message without its reference, and the anchor of that; the first one where text was put around it."""
    found = _REFERENCE.search(message)
    return (_REFERENCE.sub("", message), found[1]) if found else (message, None)
