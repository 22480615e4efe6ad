"""What ``hybrid_gsm8k.yaml`` calls: the problems, prompts and rewards of ``hybrid-lora-eval``, for lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hybrid_lora_plugin.evaluation.problems import read_problems
from hybrid_lora_plugin.rewards.scorer import Scorer
from hybrid_lora_plugin.tasks.problem import Problem
from hybrid_lora_plugin.tasks.prompts import user_turn


def splits(file: str | None = None, style: str = "cot", **_: Any) -> dict[str, Any]:
    """The test split: one row a problem.

    Args:
        file: with the problems; None takes them from the hub.
        style: ``cot`` or ``io``.
    """
    import datasets

    rows = [
        {
            "identity": problem.identity,
            "kind": problem.kind,
            "question": problem.question,
            "gold": problem.gold,
            "source": problem.source,
            "style": style,
        }
        for problem in read_problems("gsm8k", [file] if file else [])
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def prompt(row: Mapping[str, str]) -> str:
    """The user's turn; lm-eval puts it through the chat template."""
    problem = Problem(row["source"], row["identity"], row["kind"], row["question"], row["gold"])
    return user_turn(problem, row["style"])


@cache
def _scorer() -> Scorer:
    return Scorer()


def judged(row: Mapping[str, str], responses: Sequence[str]) -> dict[str, float]:
    """Whether the response is right, and whether no answer stands in it; 1.0 or 0.0 each."""
    (response,) = responses
    verdict = _scorer().score(row["kind"], response, row["gold"])
    return {"correct": float(verdict.correct), "unparsed": float(verdict.answer is None)}
