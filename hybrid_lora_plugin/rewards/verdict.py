"""What is said of one response."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The judgement of one response against one gold answer.

    Attributes:
        correct: the answer is right. False wherever any of the others says why.
        answer: what was taken for the answer; None where nothing stands where the answer has to stand.
        timed_out: comparing or running it took longer than allowed. Counted apart from wrong answers.
        note: in a few words, why it is not right; empty where it is.
    """

    correct: bool
    answer: str | None
    timed_out: bool = False
    note: str = ""
