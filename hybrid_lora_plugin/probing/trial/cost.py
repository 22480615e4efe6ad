"""What a trial costs, in words: at most, before anything is read, and as it is, before a candidate is trained."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.data.batches import ProbeData
from hybrid_lora_plugin.probing.trial.options import settled
from hybrid_lora_plugin.probing.trial.portfolio import Contender, Entry
from hybrid_lora_plugin.probing.trial.schedule import Cost, Round, cost_of, rounds_of


def most_in_words(
    config: ProbeCommandConfig,
    entries: Sequence[Entry],
    probes: Sequence[tuple[str, Sequence[Entry]]],
    candidates: Sequence[Candidate],
) -> list[str]:
    """The most that a trial can cost, known before its candidates are."""
    trial, size = config.trial, settled(config).batch_size
    rounds = rounds_of(len(entries), trial.steps, trial.rounds, trial.keep)
    cost = cost_of(rounds, trial.lora, True)
    names = ", ".join(entry.name for entry in entries)
    lines = [
        f"trial: {len(entries)} candidates ({names}){' and LoRA of the same size' if trial.lora else ''}, "
        f"{_rounds(rounds)}: at most {cost.steps:,} optimizer steps of {size} rows = {cost.steps * size:,} rows"
        f"{_share(config, cost.steps)}, and {cost.evaluations} looks at {trial.held_out_rows} held-out rows"
    ]
    if probes:
        lines.append(
            f"trial: their modules come from {len(probes)} probe{'s' if len(probes) > 1 else ''} "
            f"({', '.join(leader for leader, _ in probes)}), whose cost comes before it: see docs/probe.md"
        )
    else:
        lines.append("trial: no candidate needs a probe")
    return lines


def cost_in_words(
    config: ProbeCommandConfig,
    contenders: Sequence[Contender],
    lora: Contender | None,
    rounds: Sequence[Round],
    cost: Cost,
    kept_bytes: int | None,
    data: ProbeData,
    candidates: Sequence[Candidate],
) -> list[str]:
    """What it will cost, with the candidates known; ``kept_bytes`` is None where survivors begin anew."""
    settings = settled(config)
    size = settings.batch_size
    # Of the first batches: what a row of this data has.
    looked = [data.trial_batch(step) for step in range(min(4, rounds[-1].steps))]
    tokens = sum(int(one.attention_mask.sum()) for one in looked) / sum(one.rows for one in looked)
    lines = []
    for one in contenders:
        shared = f", shared by {', '.join(one.also)}" if one.also else ""
        lines.append(
            f"candidate {one.name}: {len(one.modules)} of {len(candidates)} modules fully tuned, "
            f"{one.trainable_parameters(candidates):,} trainable parameters{shared}"
        )
    if lora is not None:
        lines.append(
            f"control lora: rank {lora.rank} on all modules, {lora.trainable_parameters(candidates):,} trainable "
            "parameters; it is never chosen"
        )
    lines.append(
        f"trial: {len(contenders)} candidates, {_rounds(rounds)}: {cost.steps:,} optimizer steps of {size} rows = "
        f"{cost.steps * size:,} rows, about {cost.steps * size * tokens:,.0f} tokens{_share(config, cost.steps)}; "
        f"{cost.evaluations} looks at {config.trial.held_out_rows} held-out rows; the model is loaded {cost.loads} "
        "times"
    )
    lines.append(
        f"trial: rates {settings.full_lr:g} (full modules) and {settings.lora_lr:g} (LoRA), constant; AdamW with betas "
        f"{settings.betas[0]:g} and {settings.betas[1]:g}, weight decay {settings.weight_decay:g}, gradients cut to "
        f"{settings.clip_grad:g}"
    )
    if dropout := getattr(config.lora, "dropout", 0.0):
        lines.append(f"trial: the run's dropout of {dropout:g} on adapters is left out")
    if kept_bytes is None:
        lines.append(
            f"trial: candidates begin anew in each round, since their states would take more than "
            f"trial.max_state_gb={config.trial.max_state_gb:g}"
        )
    else:
        lines.append(
            f"trial: survivors go on from their state; at most {cost.kept} states are on disk, {_size(kept_bytes)}"
        )
    return lines


def _rounds(rounds: Sequence[Round]) -> str:
    if not rounds:
        return "no round"
    steps = ", ".join(str(one.steps) for one in rounds)
    left = ", ".join(str(one.candidates) for one in rounds)
    many = f"{len(rounds)} rounds" if len(rounds) > 1 else "1 round"
    return f"{many} to {steps} steps with {left} of them"


def _share(config: ProbeCommandConfig, steps: int) -> str:
    run = config.trial.run_steps
    if not run:
        return ""
    size, probe = settled(config).batch_size, config.probe.objective
    of = "of the run" if probe == "sft" else "of the run's"
    return f" ({100 * steps / run:.0f} % as many steps as the {run:,} {of}; these have {size} rows)"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
