"""The process that parses and compares expressions: ``python -m hybrid_lora_plugin.rewards.math_worker``.

A process of its own, because an expression can be built to take for ever, to fill the memory or to overflow the stack,
and because math-verify limits time by a signal that only a main thread gets. It reads one JSON object a line from its
input and writes one a line to its output; nothing that it reads is ever executed or unpickled.

    {"gold": "...", "answer": "..."}  ->  {"equal": true | false}
    {"gold": "..."}                   ->  {"parsed": true | false}
    either                            ->  {"timed_out": true} | {"failed": "MemoryError"}

Two limits hold from within: a timer over CPU time ends what Python code does, and the kernel's limit on CPU time ends
the process where no Python code runs, as inside one huge power, even when the parent is gone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import select
import signal
import sys
from functools import lru_cache
from typing import Any

#: Seconds after which an idle process looks whether its parent is still there.
_PARENT_CHECK_S = 2.0
#: CPU seconds between the timer and the kernel's limit.
_GRACE_S = 2


class TimeIsUp(BaseException):
    """The timer over CPU time; no ``Exception``, because the libraries catch all of those."""


def _time_is_up(number: int, frame: Any) -> None:
    raise TimeIsUp


@lru_cache(maxsize=64)
def _parsed(text: str) -> tuple[Any, ...]:
    """What a box with this content says, with decimals as the fractions that they are."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        f"\\boxed{{{text}}}",
        # The box alone: whatever stands in it must not be searched for a better match.
        [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return tuple(_exact(expression) for expression in found)


def _exact(expression: Any) -> Any:
    """Decimals as fractions, or π would equal its first seven digits."""
    from sympy import Float, Rational

    try:
        return expression.xreplace({number: Rational(str(number)) for number in expression.atoms(Float)})
    except Exception:
        return expression


def answer(request: dict[str, str]) -> dict[str, Any]:
    """The reply to one request."""
    from math_verify import verify

    gold = list(_parsed(request["gold"]))
    if "answer" not in request:
        # What is not even equal to itself can be matched by nothing.
        return {"parsed": bool(gold) and bool(verify(gold, gold, timeout_seconds=None))}
    if not gold:
        return {"failed": "the gold was not parsed"}
    found = list(_parsed(request["answer"]))
    return {"equal": bool(found) and bool(verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None))}


def _limited(request: dict[str, str], seconds: float) -> dict[str, Any]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    end = int(used.ru_utime + used.ru_stime + seconds) + 1 + _GRACE_S
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            return answer(request)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except TimeIsUp:
        return {"timed_out": True}
    except (Exception, RecursionError, MemoryError) as error:
        return {"failed": type(error).__name__}
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    """Answer requests until the input ends or the parent is gone."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--parent", type=int, required=True)
    arguments.add_argument("--seconds", type=float, required=True)
    arguments.add_argument("--bytes", type=int, required=True)
    given = arguments.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (given.bytes, given.bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The terminal's Ctrl-C is for the parent, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _time_is_up)
    # Replies go to a copy of the output, so that nothing a library prints is taken for one.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    logging.disable(logging.CRITICAL)
    # The first comparison loads the parser's tables; it is not on the clock of anyone's answer.
    answer({"gold": "\\frac{1}{2}", "answer": "0.5"})
    answer({"gold": "[0, \\infty)", "answer": "x \\geq 0"})
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    waiting = b""
    while True:
        line, found, rest = waiting.partition(b"\n")
        if found:
            waiting = rest
            reply = _limited(json.loads(line), given.seconds)
            try:
                print(json.dumps(reply), file=replies, flush=True)
            except BrokenPipeError:
                return
            continue
        if select.select([0], [], [], _PARENT_CHECK_S)[0]:
            received = os.read(0, 65536)
            if not received:
                return
            waiting += received
        # Another child of the parent may hold its end of the pipe, so the input need not end when the parent does.
        elif os.getppid() != given.parent:
            return


if __name__ == "__main__":
    sys.exit(main())
