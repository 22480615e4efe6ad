"""Judging responses, in training and in evaluation alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.rewards.code_gold import CodeGold
from hybrid_lora_plugin.rewards.math import MathChecker
from hybrid_lora_plugin.rewards.sandbox import ProgramLimits, Sandbox
from hybrid_lora_plugin.rewards.verdict import Verdict
from hybrid_lora_plugin.tasks import answers
from hybrid_lora_plugin.tasks.problem import KINDS, LETTERS


@dataclass(frozen=True)
class ScoringLimits:
    """What judging one response may take.

    Attributes:
        math_seconds: CPU seconds to compare one expression with the gold; by the clock three times that.
        math_bytes: address space of a process that compares.
        math_processes: how many compare at a time.
        code_seconds: CPU seconds of a program for all tests of a problem; by the clock at most three times that.
        code_bytes: address space of the program.
        code_processes: processes and threads that the program may have at a time, its own included.
        code_disk_bytes: what the program may write to its only folder.
        code_output_bytes: one result of the program.
        code_at_a_time: how many programs run at a time.
    """

    math_seconds: float = 5.0
    math_bytes: int = 4 << 30
    math_processes: int = 1
    code_seconds: float = 15.0
    code_bytes: int = 1 << 30
    code_processes: int = 4
    code_disk_bytes: int = 16 << 20
    code_output_bytes: int = 16 << 20
    code_at_a_time: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole = isinstance(getattr(ScoringLimits, name), int)
            usable = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not (usable and 0 < value < math.inf):
                raise ConfigurationError(f"{name}: {value!r}; wanted {'a whole' if whole else 'a'} number above 0")


class Scorer:
    """Judges responses; a context manager that ends its processes.

    Safe to use from several threads, and after a fork: a forked process starts processes of its own.

    Args:
        limits: what judging one response may take.
        unsandboxed_code: run programs that a model wrote with this user's rights, in no sandbox; said loudly.
    """

    def __init__(self, limits: ScoringLimits | None = None, *, unsandboxed_code: bool = False) -> None:
        self.limits = limits or ScoringLimits()
        of = self.limits
        self._expressions = MathChecker(of.math_seconds, of.math_bytes, of.math_processes)
        self._sandbox = Sandbox(
            ProgramLimits(of.code_seconds, of.code_bytes, of.code_processes, of.code_disk_bytes, of.code_output_bytes),
            of.code_at_a_time,
            bare=unsandboxed_code,
        )

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a later ``score`` starts them again."""
        self._expressions.close()

    def prepare(self, kinds: Iterable[str]) -> None:
        """Start what judging these kinds needs and try it, before the first response.

        Raises:
            RewardError: something needed is missing, with the ways out.
        """
        wanted = set(kinds)
        if "math" in wanted:
            self._expressions.start()
        if "code" in wanted:
            self._sandbox.check()

    def score(self, kind: str, response: str, gold: str, options_count: int | None = None) -> Verdict:
        """Judge one response.

        Args:
            kind: one of ``tasks.problem.KINDS``.
            response: the whole response, reasoning included.
            gold: the gold answer, in the form that ``tasks.problem.Problem`` documents.
            options_count: of ``letter``: how many options there are, if known.

        Raises:
            ConfigurationError: a kind that does not exist, or a gold that no answer could match.
            RewardError: the response could not be judged. Never scored instead.
        """
        judge = {
            "math": self._expressions.verdict,
            "integer": self._integer,
            "letter": lambda response, gold: self._letter(response, gold, options_count),
            "code": self._code,
        }.get(kind)
        if judge is None:
            raise ConfigurationError(f"kind: {kind!r}; wanted one of {', '.join(KINDS)}")
        return judge(response, gold)

    def is_checkable(self, kind: str, gold: str, options_count: int | None = None) -> bool:
        """Whether a right answer to this gold would be found right; data preparation drops a row where it is not.

        Args:
            kind, gold, options_count: as of ``score``.

        Raises:
            RewardError: it could not be found out.
        """
        if kind == "integer":
            return answers.whole_number(gold) is not None
        if kind == "letter":
            return len(gold) == 1 and gold in LETTERS[: options_count or len(LETTERS)]
        if kind == "math":
            return self._expressions.gold_is_checkable(gold)
        if kind != "code":
            raise ConfigurationError(f"kind: {kind!r}; wanted one of {', '.join(KINDS)}")
        try:
            CodeGold.read(gold)
        except ConfigurationError:
            return False
        return True

    def _integer(self, response: str, gold: str) -> Verdict:
        wanted = answers.whole_number(gold)
        if wanted is None:
            raise ConfigurationError(f"gold: {gold!r} is no whole number")
        answer = answers.boxed(response)
        if answer is None:
            return Verdict(False, None, note="no box")
        found = answers.whole_number(answer)
        return _compared(found == wanted, answer, "another number" if found is not None else "no whole number")

    def _letter(self, response: str, gold: str, options_count: int | None) -> Verdict:
        if not self.is_checkable("letter", gold, options_count):
            raise ConfigurationError(f"gold: {gold!r} is no letter of an option")
        answer = answers.letter(response, options_count)
        return (
            Verdict(False, None, note="no letter") if answer is None else _compared(answer == gold, answer, "another")
        )

    def _code(self, response: str, gold: str) -> Verdict:
        tests = CodeGold.read(gold)
        program = answers.program(response)
        if program is None:
            return Verdict(False, None, note="no program")
        outcome = self._sandbox.run(program, tests)
        return Verdict(outcome.passed, program, timed_out=outcome.timed_out, note=outcome.note)


def _compared(correct: bool, answer: str, otherwise: str) -> Verdict:
    return Verdict(correct, answer, note="" if correct else otherwise)
