"""A plan as text: memory by phase, the host, syncs, operations, and what all of it takes for granted."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_lora_plugin.plan.changes import Change, change_lines
from hybrid_lora_plugin.plan.compute import seconds
from hybrid_lora_plugin.plan.planner import GIB, PARTS, Plan, chosen_sync
from hybrid_lora_plugin.plan.run import FULL, HYBRID

TRAININGS = {HYBRID: "Hybrid-LoRA", "lora": "LoRA", FULL: "full fine-tuning"}


def plan_text(plan: Plan, changes: Sequence[Change] = (), after: Plan | None = None) -> str:
    """The whole plan.

    Args:
        plan: of the run as it was given.
        changes: that make it fit, with ``after``, the plan with all of them.
    """
    sections = [_head(plan), _memory(plan), _verdict(plan)]
    if not plan.fits:
        sections.append(["What to change, each on top of those before it:", *change_lines(changes, after or plan)])
    sections += [_rollout(plan), _host(plan), _probe(plan), _syncs(plan), _compute(plan), _assumed(plan)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(plan: Plan) -> list[str]:
    run, counts = plan.run, plan.counts
    machines = f"{run.nodes} × {run.gpus_per_node} GPUs" if run.nodes > 1 else f"{run.gpus_per_node} GPUs"
    lines = [f"{plan.name}, {TRAININGS[run.training]}, {machines}, {run.strategy} over {run.shard_ranks} ranks"]
    if run.training == HYBRID:
        drawn = "drawn at random within the budget, as nothing is probed yet" if plan.drawn else "of the allocation"
        lines.append(f"{counts}; {plan.full_modules} of {plan.modules} modules fully tuned, {drawn}")
    else:
        lines.append(str(counts))
    return lines


def _memory(plan: Plan) -> list[str]:
    names = [name for name in PARTS if any(phase.parts.get(name) for phase in plan.phases)]
    wide = max(len(PARTS[name]) for name in names)
    columns = [max(len(phase.name), 8) for phase in plan.phases]
    heads = "  ".join(f"{phase.name:>{width}}" for phase, width in zip(plan.phases, columns, strict=True))
    lines = [f"{'GiB on a GPU, at the fullest':<{wide}}  {heads}"]

    def row(label: str, values: list[float]) -> str:
        cells = (f"{value / GIB:.2f}" if value else "" for value in values)
        return f"{label:<{wide}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, columns, strict=True))

    lines += [row(PARTS[name], [phase.parts.get(name, 0) for phase in plan.phases]) for name in names]
    lines.append(row("together", [phase.total for phase in plan.phases]))
    lines.append(
        f"{'of ' + format(plan.machine.gpu_bytes / GIB, '.1f'):<{wide}}  "
        + "  ".join(
            f"{phase.total / plan.machine.gpu_bytes:>{width}.0%}"
            for phase, width in zip(plan.phases, columns, strict=True)
        )
    )
    moments = ", ".join(f"{phase.name}: {phase.moment}" for phase in plan.phases)
    return [*(line.rstrip() for line in lines), f"The fullest moment of {moments}."]


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        free = plan.machine.gpu_bytes - plan.fullest.total
        return [f"It fits: {free / GIB:.1f} GiB are free at the fullest moment ({plan.fullest.name})."]
    return ["It does not fit:", *(f"  {problem}" for problem in plan.problems)]


def _rollout(plan: Plan) -> list[str]:
    if plan.rollout is None:
        return []
    run, rollout = plan.run, plan.rollout
    length = run.prompt_tokens + run.response_tokens
    engines = run.gpus // run.rollout.tensor_parallel
    return [
        f"Rollout: {engines} engines of {run.rollout.tensor_parallel}; each has room for keys and values of "
        f"{rollout.cached_tokens:,} tokens ({rollout.per_token:,} bytes each on a GPU), {plan.at_once} sequences of "
        f"{length:,} at once."
    ]


def _host(plan: Plan) -> list[str]:
    if not plan.host:
        return ["Host: nothing of the run stays in a machine's memory beside what every process takes."]
    total = sum(plan.host.values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan.host.items())
    return [f"Host: {total / GIB:.1f} GiB of each machine: {parts}."]


def _probe(plan: Plan) -> list[str]:
    return [] if plan.probe is None else [f"Probe: {plan.probe.line(plan.machine.gpu_bytes)}."]


def _syncs(plan: Plan) -> list[str]:
    if not plan.syncs:
        return []
    chosen = chosen_sync(plan.syncs, plan.run).mode
    lines = ["Bytes of a weight sync (*: of this run):"]
    for sync in plan.syncs:
        mark = "*" if sync.mode == chosen else " "
        first = f", the first {sync.first:,}" if sync.first != sync.sent else ""
        assumed = f"; {sync.assumed}" if sync.assumed else ""
        lines.append(f"  {mark} {sync.mode:<18} {sync.sent:>16,}{first}{assumed}")
    return lines


def _compute(plan: Plan) -> list[str]:
    work, machine, run = plan.compute, plan.machine, plan.run

    def time(operations: float) -> str:
        return f"{seconds(operations, run.gpus, machine.teraflops, machine.share):,.0f} s"

    parts = [("update", work.update), ("log-probabilities", work.log_probs), ("reference", work.reference)]
    named = ", ".join(f"{name} {size / 1e15:,.1f} ({time(size)})" for name, size in parts if size)
    lines = [
        f"Operations of a step of {work.tokens:,} tokens, every sequence at its longest, in 10^15: {named}.",
        f"Times at {machine.share:.0%} of {machine.teraflops:g} TFLOP/s on {run.gpus} GPUs, assumed; the trainer "
        f"together {time(work.trainer)}."
        + (" A rollout's time does not follow from operations." if run.rollout else ""),
    ]
    if work.probe:
        share = f", {work.probe_share:.2%} of the run's {work.steps} steps" if work.probe_share is not None else ""
        lines.append(
            f"Probe: {work.probe_tokens:,} tokens, {work.probe / 1e15:,.1f}·10^15 operations: as many as "
            f"{work.probe_in_steps:.2f} steps{share}."
        )
    return lines


def _assumed(plan: Plan) -> list[str]:
    machine = plan.machine
    lines = [
        f"Assumed: {machine.reserve_bytes / GIB:.1f} GiB for contexts, NCCL and gaps of the allocator; every "
        "micro-batch full. See docs/plan.md for how far the plan was from what was measured."
    ]
    return lines + [f"Not planned: {note}" for note in plan.run.notes]
