"""Whether an expression is the gold: by its text where that decides, else by math-verify in a process of its own."""

from __future__ import annotations

import os
import threading
import weakref

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.rewards import expression_text as text
from hybrid_lora_plugin.rewards.math_process import Ended, MathProcess
from hybrid_lora_plugin.rewards.verdict import Verdict
from hybrid_lora_plugin.tasks import answers


class MathChecker:
    """Compares expressions, from any thread and after a fork; its processes start when they are needed.

    Args:
        seconds: CPU seconds of one comparison.
        memory_bytes: address space of a process.
        processes: how many compare at a time; callers beyond wait.
    """

    def __init__(self, seconds: float, memory_bytes: int, processes: int = 1) -> None:
        self._seconds, self._memory_bytes, self._processes = seconds, memory_bytes, processes
        self._reset()
        _CHECKERS.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.Semaphore(self._processes)
        self._idle: list[MathProcess] = []
        self._owner = os.getpid()

    def start(self) -> None:
        """Start one process.

        Raises:
            RewardError: it does not start.
        """
        with self._free:
            self._give_back(self._take())

    def close(self) -> None:
        """End the processes that compare nothing right now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.kill()

    def verdict(self, response: str, gold: str) -> Verdict:
        """Judge a response by its last box.

        Raises:
            ConfigurationError: a gold that cannot be parsed.
            RewardError: no process could be had.
        """
        answer = answers.boxed(response)
        return Verdict(False, None, note="no box") if answer is None else self.compare(gold, answer)

    def compare(self, gold: str, answer: str) -> Verdict:
        """Judge the content of a box; errors as of ``verdict``."""
        known = _by_text(gold, answer)
        if isinstance(known, str):
            return Verdict(not known, answer, note=known)
        timed_out = False
        for wanted, found in known:
            reply = self._ask({"gold": wanted, "answer": found})
            if reply.get("equal"):
                return Verdict(True, answer)
            if reply.get("failed") == "the gold was not parsed":
                raise ConfigurationError(
                    f"gold: {gold!r} cannot be parsed; leave this problem out", see="gold-not-usable"
                )
            timed_out = timed_out or bool(reply.get("timed_out"))
        return Verdict(False, answer, timed_out=timed_out, note="time" if timed_out else "not equal")

    def gold_is_checkable(self, gold: str) -> bool:
        """Whether an answer equal to this gold would be found equal.

        Raises:
            RewardError: no process could be had.
        """
        if len(gold) > text.MOST_CHARACTERS or not text.plain(gold):
            return False
        if text.words(gold) or text.based(gold):
            return True
        return bool(self._ask({"gold": _without_notation(gold)}).get("parsed"))

    def _ask(self, request: dict[str, str]) -> dict[str, object]:
        for _ in range(2):
            with self._free:
                process = self._take()
                try:
                    reply = process.ask(request)
                except Ended as ended:
                    # By the clock it may have been the machine, or the kernel may have needed the memory: once more.
                    # By CPU time it was the expression.
                    timed_out = ended.timed_out
                    if timed_out and not ended.killed:
                        break
                except BaseException:
                    process.kill()
                    raise
                else:
                    self._give_back(process)
                    return reply
        return {"timed_out": True} if timed_out else {"failed": "the process ended"}

    def _take(self) -> MathProcess:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return MathProcess(self._seconds, self._memory_bytes)

    def _give_back(self, process: MathProcess) -> None:
        with self._lock:
            self._idle.append(process)

    def forget_processes(self) -> None:
        """In a fork: the processes, and locks that other threads held, are the parent's."""
        idle = self._idle
        self._reset()
        for process in idle:
            process.forget()


#: For a fork; each is reset there before anything else runs.
_CHECKERS: weakref.WeakSet[MathChecker] = weakref.WeakSet()


def _after_fork() -> None:
    for checker in list(_CHECKERS):
        checker.forget_processes()


os.register_at_fork(after_in_child=_after_fork)


def _without_notation(expression: str) -> str:
    return text.without_percent(text.without_unit(expression)[0])[0]


def _by_text(gold: str, answer: str) -> str | list[tuple[str, str]]:
    """What the texts decide: "" for right, words for wrong, or the pairs of which one must be equal."""
    if len(answer) > text.MOST_CHARACTERS:
        return "too long"
    plain_gold, plain_answer = text.plain(gold), text.plain(answer)
    if plain_gold.replace(" ", "") == plain_answer.replace(" ", ""):
        return ""
    if (wanted := text.words(gold)) is not None:
        found = text.words(answer)
        # A letter or a word may also stand bare.
        return "" if wanted == (found or plain_answer.strip("() ").casefold()) else "other words"
    if text.based(gold) or text.based(answer):
        return "" if text.based(gold) == text.based(answer) else "another number, or another base"
    wanted, unit = text.without_unit(gold)
    found, other_unit = text.without_unit(answer)
    if unit and other_unit and unit != other_unit:
        return "another unit"
    if not found:
        return "no expression"
    if why := text.misread(found, wanted):
        return why
    bare_wanted, wanted_percent = text.without_percent(wanted)
    bare_found, found_percent = text.without_percent(found)
    if bare_wanted.replace(" ", "") == bare_found.replace(" ", ""):
        return ""
    pairs = [(bare_wanted, bare_found)]
    if wanted_percent != found_percent:
        # A hundredth and its percentage are one number.
        hundredth = "\\frac{%s}{100}"
        pairs.append((hundredth % bare_wanted, bare_found) if wanted_percent else (bare_wanted, hundredth % bare_found))
    return pairs
