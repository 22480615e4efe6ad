"""What has to hold in the runs, judged by what verl and the plugin logged. A figure that is missing is a failure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from hybrid_lora_plugin.allocation import Allocation
from hybrid_lora_plugin.training.arrival import SAMPLED
from recipes.demo.evidence import Check, check_proven, check_reference
from recipes.demo.verl_run import Step
from recipes.gpu_check.runs import RUNS, Run

PROBS_DIFF_MEAN, PROBS_DIFF_MAX = "training/rollout_probs_diff_mean", "training/rollout_probs_diff_max"
CORRELATION = "training/rollout_actor_probs_pearson_corr"
#: the share of an update that arrived may be off 1 by so much, beside what rounding without a bias does by chance
ARRIVED_WITHIN = 0.1
#: how much further apart trainer and rollout engine may be after an update than with the base weights
APART_AT_MOST = 2.0
LEAST_CORRELATION = 0.95
#: of the first tokens; in bfloat16 two engines choose differently where two tokens are nearly as likely
LEAST_SAME = 0.8


def kinds_of(allocation: Allocation) -> dict[str, tuple[str, ...]]:
    """Module names by kind, ``lora`` and ``full``; a kind without modules is left out."""
    kinds = {"lora": allocation.lora_names, "full": allocation.full_names}
    return {kind: tuple(names) for kind, names in kinds.items() if names}


def elements_seen(allocation: Allocation, run: Run) -> dict[str, int]:
    """By kind, at least so many elements the arrived update of one sync was computed from.

    ``training/arrival.py`` looks at up to ``SAMPLED`` of every tensor, and in ``receiver_merge`` at one LoRA module in
    each sync.
    """
    sizes = {module.name: module.parameters for module in allocation.modules}
    seen = {}
    for kind, names in kinds_of(allocation).items():
        # Whole rows: half of SAMPLED is less than any block of a wider tensor.
        each = [min(sizes[name], SAMPLED // 2) for name in names]
        seen[kind] = min(each) if kind == "lora" and run.sync == "receiver_merge" else sum(each)
    return seen


def is_whole(share: float, noise: float, elements: int) -> bool:
    """Whether a share of an update is 1, but for what rounding without a bias does by chance.

    ``elements`` with that noise have a mean with a standard error of ``noise / √elements``. False for no number.
    """
    return abs(share - 1) <= ARRIVED_WITHIN + 4 * noise / math.sqrt(elements)


def check_steps(run: Run, steps: Sequence[Step], asked: int) -> Check:
    """Every step asked for was logged, once, in order."""
    taken = [step.number for step in steps if step.number > 0]
    return Check(f"{run.title}: {asked} training steps ran", taken == list(range(1, asked + 1)), f"{len(taken)} steps")


def check_updates(run: Run, steps: Sequence[Step]) -> Check:
    """Every step had a gradient and advantages that differ: a run that trains nothing proves nothing."""
    norms = [step.metrics.get("actor/grad_norm", math.nan) for step in steps if step.number > 0]
    spreads = [
        step.metrics.get("critic/advantages/max", math.nan) - step.metrics.get("critic/advantages/min", math.nan)
        for step in steps
        if step.number > 0
    ]
    holds = bool(norms) and all(math.isfinite(norm) and norm > 0 for norm in norms) and all(s > 0 for s in spreads)
    seen = f"norm {min(norms):.2g} to {max(norms):.2g}" if norms else "no step"
    return Check(f"{run.title}: every step had a finite gradient above 0, and advantages that differ", holds, seen)


def check_arrived(run: Run, steps: Sequence[Step], allocation: Allocation) -> Check:
    """At every step the whole update was in the rollout engine's weights."""
    values, failures = [], []
    seen = elements_seen(allocation, run)
    for step in steps:
        for kind, elements in seen.items() if step.number > 0 else ():
            arrived = step.metrics.get(f"hybrid_lora/update_arrived_{kind}", math.nan)
            noise = step.metrics.get(f"hybrid_lora/update_noise_{kind}", math.nan)
            values.append((kind, arrived))
            if not is_whole(arrived, noise, elements):
                failures.append(f"step {step.number} {kind} {arrived:.3f}")
    ranges = []
    for kind in seen:
        mine = [arrived for name, arrived in values if name == kind]
        ranges += [f"{kind} {min(mine):.3f} to {max(mine):.3f}"] if mine else []
    return Check(
        f"{run.title}: the update arrived in the rollout engine's weights, 1 ± {ARRIVED_WITHIN:g} beyond chance",
        bool(values) and not failures,
        ", ".join(ranges or ["not measured"]) + (f"; off: {', '.join(failures)}" if failures else ""),
    )


def check_rollouts(run: Run, steps: Sequence[Step]) -> Check:
    """The rollout engine gives its tokens the trainer's probabilities, as well as it did with the base weights.

    In bfloat16 two engines differ by themselves. The first step samples from the base weights on both sides, so it says
    by how much on this device.
    """
    apart = [step.metrics.get(PROBS_DIFF_MEAN, math.nan) for step in steps if step.number > 0]
    correlated = [step.metrics.get(CORRELATION, math.nan) for step in steps if step.number > 0]
    first = apart[0] if apart else math.nan
    holds = (
        len(apart) > 1
        and all(value <= APART_AT_MOST * first for value in apart)
        and all(value >= LEAST_CORRELATION for value in correlated)
    )
    return Check(
        f"{run.title}: {PROBS_DIFF_MEAN} stays within {APART_AT_MOST:g} times the first step's, whose weights are the "
        f"base model's on both sides, and the correlation above {LEAST_CORRELATION:g}",
        holds,
        f"{first:.2g} at first, at most {max(apart, default=math.nan):.2g}; correlation at least "
        f"{min(correlated, default=math.nan):.4f}",
    )


def check_kept(kept: dict[str, float], dtype: str, steps: Sequence[Step], allocation: Allocation) -> Check:
    """An export in the rollout engine's type holds the whole update, as far as chance lets it be told.

    Args:
        kept: by kind, the share of the update that is in the exported weights.
        dtype: of the exported weights.
        steps: of the run that was exported; the noise of its last sync is that of the export.
        allocation: that it trained under.
    """
    last = steps[-1].metrics if steps else {}
    failures = [
        kind
        for kind, elements in elements_seen(allocation, RUNS["merge"]).items()
        if not is_whole(kept.get(kind, math.nan), last.get(f"hybrid_lora/update_noise_{kind}", math.nan), elements)
    ]
    seen = ", ".join(f"{kind} {share:.3f}" for kind, share in kept.items()) or "no update"
    return Check(
        f"export: the whole update is in the exported weights, 1 ± {ARRIVED_WITHIN:g} beyond chance",
        bool(kept) and not failures,
        f"{seen}, in {dtype}",
    )


def check_answers(same: int, number: int) -> Check:
    """transformers, with the exported model, begins its greedy answers as vLLM did after the last step."""
    return Check(
        f"export: loaded by transformers, its first greedy token is vLLM's in {LEAST_SAME:.0%} of the prompts or more",
        number > 0 and same >= LEAST_SAME * number,
        f"{same} of {number}",
    )


def checks_of(run: Run, steps: Sequence[Step], asked: int, allocation: Allocation | None) -> list[Check]:
    """Every check of one run."""
    checks = [check_steps(run, steps, asked), check_updates(run, steps)]
    if run.sync:
        proven = check_proven(list(steps), asked)
        checks += [
            Check(f"{run.title}: {proven.claim}", proven.holds, proven.seen),
            check_arrived(run, steps, allocation),
        ]
    if not run.bypass:
        checks.append(check_rollouts(run, steps))
    if run.saves:
        reference = check_reference(list(steps))
        checks.append(Check(f"{run.title}: {reference.claim}", reference.holds, reference.seen))
    return checks


def compare_export(exported: Path, validation: Path, generations: Path) -> tuple[int, int]:
    """(equal, all): prompts to which the exported model's first greedy token is the beginning of vLLM's answer.

    Args:
        exported: Hugging Face folder.
        validation: validation.parquet with the chat prompts.
        generations: verl's dump of the last validation (JSONL with ``input`` and ``output`` texts).
    """
    import pandas
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported, padding_side="left")
    # In float32: what differs is then vLLM's rounding alone.
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    prompts = [list(prompt) for prompt in pandas.read_parquet(validation)["prompt"]]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        chosen = model(**encoded, logits_to_keep=1).logits[:, -1].argmax(-1)

    def plain(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    ours = {plain(ids): plain([token]) for ids, token in zip(encoded["input_ids"], chosen, strict=True)}
    theirs = {row["input"]: row["output"] for row in map(json.loads, generations.read_text().splitlines())}
    # An empty text is the end of the answer, or the marker of a turn: any answer begins with it.
    same = sum(prompt in ours and answer.startswith(ours[prompt]) for prompt, answer in theirs.items())
    return same, len(prompts)
