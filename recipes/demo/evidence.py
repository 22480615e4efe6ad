"""What the demo claims, checked on what the run left behind. Nothing here is assumed: a missing figure is a failure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from recipes.demo.verl_run import Step

PROBS_DIFF = "training/rollout_probs_diff_max"
#: by the type that vLLM computes in, |p_vllm − p_trainer| of the sampled tokens and how large it may be with the same
#: weights on both sides; the trainer computes in fp32. In 16 bits weights and activations are rounded, and one token of
#: hundreds that is about as likely as another may differ by 0.2 (seen in bfloat16), so that the largest says little:
#: the mean was 0.0015 to 0.0036 in 14 steps. ``check_arrived`` says more. float16 was not measured.
WITNESSES = {
    "float32": (PROBS_DIFF, 1e-4),
    "bfloat16": ("training/rollout_probs_diff_mean", 0.01),
    "float16": ("training/rollout_probs_diff_mean", 0.002),
}
#: share of the validation prompts that the exported model must answer as vLLM did: two computations in 16 bits round
#: activations differently, and decide differently where two tokens are about equally likely (255 of 256 were the same)
SAME_ANSWERS = {"float32": 1.0, "bfloat16": 0.97, "float16": 0.97}
#: nats; a smaller KL may be the rounding of log-probabilities in bfloat16 (0 to 3.8e-5 was seen after two steps of a
#: tiny model at the paper's rates)
TOLD_FROM = 1e-4
#: of the update, how much must be in vLLM's weights where these have 16 bits
ARRIVED = (0.9, 1.1)


@dataclass(frozen=True)
class Check:
    """One claim: whether it holds, and the figures it was judged by."""

    claim: str
    holds: bool
    seen: str


def accuracy_of(step: Step) -> float | None:
    """Validation accuracy of a step, if it was validated."""
    keys = [key for key in step.metrics if key.startswith("val-core/") and key.endswith("/acc/mean@1")]
    return step.metrics[keys[0]] if keys else None


def reward_of(step: Step) -> float | None:
    """Mean reward of a step's rollouts."""
    return step.metrics.get("critic/score/mean")


def check_steps(steps: list[Step], asked: int) -> Check:
    """Every step asked for was taken, once, in order."""
    taken = [step.number for step in steps if PROBS_DIFF in step.metrics]
    return Check(f"{asked} training steps ran", taken == list(range(1, asked + 1)), f"{len(taken)} steps")


def check_rollout_weights(steps: list[Step], asked: int, dtype: str = "float32", of: str = "rollouts") -> Check:
    """At every step vLLM, in ``dtype``, gave the sampled tokens the probabilities that the trainer gives them."""
    name, limit = WITNESSES[dtype]
    by_step = {step.number: step.metrics.get(name, math.nan) for step in steps if step.number > 0}
    values = [by_step.get(number, math.nan) for number in range(1, asked + 1)]
    holds = bool(values) and all(value <= limit for value in values)
    return Check(
        f"{of} were sampled with the trained weights: {name} ≤ {limit:g} at every step",
        holds,
        f"maximum {max(values, default=math.nan):.2e} over {len(values)} steps",
    )


def check_arrived(steps: list[Step], asked: int) -> Check:
    """After every step all of the update was in vLLM's weights, for rollouts in 16 bits."""
    by_step = {step.number: step.metrics for step in steps}
    values = [
        by_step.get(number, {}).get(f"hybrid_lora/update_arrived_{kind}", math.nan)
        for number in range(1, asked + 1)
        for kind in ("lora", "full")
    ]
    least, most = ARRIVED
    return Check(
        f"the update arrived in weights of 16 bits: {least:g} to {most:g} of it in vLLM's after every step",
        bool(values) and all(least <= value <= most for value in values),
        f"{min(values, default=math.nan):.3f} to {max(values, default=math.nan):.3f}",
    )


def check_proven(steps: list[Step], asked: int) -> Check:
    """After every step the rollout engine was proven to hold what the trainer sent."""
    by_step = {step.number: step.metrics for step in steps}
    proven = [by_step.get(number, {}).get("hybrid_lora/sync_digest_ok") for number in range(1, asked + 1)]
    last = by_step.get(asked, {})
    return Check(
        "every weight sync was proven: digests at both ends and in the engine's model agree",
        bool(proven) and all(value == 1.0 for value in proven),
        f"{sum(value == 1.0 for value in proven)} of {asked} steps; in the last one "
        f"{last.get('hybrid_lora/sync_tensors', math.nan):.0f} tensors, "
        f"{last.get('hybrid_lora/sync_bytes', math.nan) / 1e6:.2f} MB, "
        f"{last.get('hybrid_lora/sync_seconds', math.nan):.2f} s",
    )


def check_reference(steps: list[Step]) -> Check:
    """KL to the reference starts at 0 and grows: the reference stays where the actor came from."""
    values = [step.metrics["actor/kl_loss"] for step in steps if "actor/kl_loss" in step.metrics]
    holds = len(values) > 1 and values[-1] > values[0]
    seen = f"actor/kl_loss {values[0]:.1e} at the first step, {values[-1]:.1e} at the last" if values else "no KL"
    if values and not holds and max(values) < TOLD_FROM:
        seen += "; the actor has not moved by more than rounding hides: take more steps, or larger learning rates"
    return Check("the reference policy stays the base model while the actor moves away", holds, seen)


def check_accuracy(steps: list[Step], least_gain: float) -> Check:
    """Greedy validation accuracy rose by at least ``least_gain``."""
    values = [value for value in map(accuracy_of, steps) if value is not None]
    before, after = (values[0], values[-1]) if len(values) > 1 else (math.nan, math.nan)
    return Check(
        f"validation accuracy rose by at least {least_gain:.2f}",
        after - before >= least_gain,
        f"{before:.3f} → {after:.3f}",
    )


def check_export(exported: Path, validation: Path, generations: Path, dtype: str = "float32") -> Check:
    """The exported folder, loaded by transformers, answers the validation prompts as vLLM did after the last step.

    Args:
        exported: Hugging Face folder.
        validation: validation.parquet with the chat prompts.
        generations: verl's dump of the last validation (JSONL with ``input`` and ``output`` texts).
        dtype: that vLLM computed in, and that the folder's weights have.
    """
    import pandas
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").eval()
    prompts = [list(prompt) for prompt in pandas.read_parquet(validation)["prompt"]]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(**encoded, do_sample=False, max_new_tokens=16)

    def plain(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    width = encoded["input_ids"].shape[1]
    ours = {plain(row[:width]): plain(row[width:]) for row in output}
    theirs = {row["input"]: row["output"] for row in map(json.loads, generations.read_text().splitlines())}
    same = sum(ours.get(prompt) == answer for prompt, answer in theirs.items())
    least, found = SAME_ANSWERS[dtype], str(model.dtype).removeprefix("torch.")
    holds = found == dtype and len(ours) == len(theirs) == len(prompts) and same >= least * len(theirs)
    return Check(
        f"the exported model, in {dtype}, answers greedily as vLLM did after the last step"
        + ("" if least == 1 else f", {least:.0%} of the prompts or more"),
        holds,
        f"in {found}, {same} of {len(theirs)} equal",
    )
