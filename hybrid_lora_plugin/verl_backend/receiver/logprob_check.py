"""``sync_check=logprobs`` at the rollout engine: its log-probabilities of the fixed prompts beside the trainer's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.policy_distance import policy_distance
from hybrid_lora_plugin.verl_backend.fixed_prompts import GROSS

LogProbs = list[list[float]]


@dataclass(frozen=True)
class Base:
    """What the engine computed before its first sync, of the checkpoint that it had loaded itself."""

    tokens: list[list[int]]
    log_probs: LogProbs


def compare(prompt: dict[str, Any], engine: LogProbs, base: Base | None, dtype: str) -> dict[str, float]:
    """Two looks: whether the engines agree as they are, and whether their policies have moved alike.

    Args:
        prompt: ``SyncHeader.fixed_prompt``.
        engine: log-probability of every token but the first of each prompt; fewer where they do not fit the engine.
        base: the engine's of the base model; None where it never held that.
        dtype: of the engine.

    Returns:
        Metrics by name without prefix; those of the policy only where both have moved.

    Raises:
        WeightSyncError: naming the token that differs or has no number, or how far the policies stand apart.
    """
    _require_numbers(engine, dtype)
    difference = _agree(prompt, engine, dtype)
    metrics = {"sync_logprob_difference": difference, "sync_policy_judged": 0.0}
    if base is None or base.tokens != prompt["tokens"]:
        return metrics
    distance = policy_distance(
        *(_flat(values, engine) for values in (prompt["base_log_probs"], prompt["log_probs"], base.log_probs, engine)),
        trainer_rounds=prompt["trainer_rounds"],
    )
    if distance is None:
        return metrics
    limit = prompt["policy_limit"]
    fault = distance.fault(limit)
    if fault:
        raise WeightSyncError(
            f"fixed prompts: {fault}, wanted 1 for the way and 0 for the KL ratio within {limit:g} "
            f"(hybrid_lora.sync_policy_limit); {_cure(dtype, prompt['rounding'])}",
            see="rollout-policy-behind-the-trainers",
        )
    return metrics | {
        "sync_policy_slope": distance.slope,
        "sync_policy_slope_error": distance.slope_error,
        "sync_policy_kl_ratio": distance.kl_ratio,
        "sync_policy_kl_ratio_error": distance.kl_ratio_error,
        "sync_policy_move": distance.move,
        "sync_policy_judged": float(distance.judged(limit)),
    }


def _require_numbers(engine: LogProbs, dtype: str) -> None:
    for row, values in enumerate(engine):
        for token, value in enumerate(values):
            if not math.isfinite(value):
                finer = "actor_rollout_ref.rollout.dtype=bfloat16" if dtype == "float16" else "an earlier checkpoint"
                raise WeightSyncError(
                    f"fixed prompts: the rollout engine computes {value} for token {token + 1} of prompt {row + 1}, in "
                    f"{dtype}; give {finer}",
                    see="fixed-prompt-is-no-number",
                )


def _agree(prompt: dict[str, Any], engine: LogProbs, dtype: str) -> float:
    """Largest difference at the beginning of the first prompt, nats; WeightSyncError where it is above the limit."""
    pairs = list(zip(engine[0], prompt["log_probs"][0], strict=False))[: GROSS - 1]
    differences = [abs(ours - theirs) for ours, theirs in pairs]
    worst = max(range(len(differences)), key=differences.__getitem__)
    if not differences[worst] <= prompt["limit"]:
        ours, theirs = pairs[worst]
        raise WeightSyncError(
            f"fixed prompt: token {worst + 1} has log-probability {ours:.6f} in the rollout engine and {theirs:.6f} in "
            f"the trainer, a difference of {differences[worst]:.2e}, above {prompt['limit']:g}, the limit for {dtype} "
            "(hybrid_lora.sync_logprob_limit)",
            see="fixed-prompt-differs",
        )
    return differences[worst]


def _flat(values: LogProbs, engine: LogProbs) -> list[float]:
    """Of all prompts, as many tokens of each as the engine has."""
    return list(chain.from_iterable(row[: len(ours)] for row, ours in zip(values, engine, strict=True)))


def _cure(dtype: str, rounding: str) -> str:
    if dtype != "float32" and rounding == "nearest":
        return (
            f"rounding weights to nearest in {dtype} loses small updates: give hybrid_lora.sync_rounding=stochastic"
            + (" or actor_rollout_ref.rollout.dtype=float16" if dtype == "bfloat16" else "")
        )
    finer = {"bfloat16": "float16", "float16": "float32"}.get(dtype)
    return f"give actor_rollout_ref.rollout.dtype={finer}" if finer else "the two ends compute differently"
