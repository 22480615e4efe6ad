"""How long a probe went on that was left to find its own length, in words."""

from __future__ import annotations

import dataclasses

from hybrid_lora_plugin.allocation.schema import AutoStop, ProbeRecord, SeedRecord

SETTLED, LIMIT = "settled", "limit"


def stopping_in_words(probe: ProbeRecord | None) -> list[str]:
    """A sentence for each number that was ``auto``; none where both were given."""
    if probe is not None and probe.seeds:
        each = [dataclasses.replace(probe, seeds=None, **_own(one)) for one in probe.seeds]
        return [f"seed {one.seed}: {line}" for one in each for line in stopping_in_words(one)]
    lines = []
    if probe is not None and probe.warmup_auto is not None:
        found = probe.warmup_auto
        last = " and ".join(f"{100 * value:.0f} %" for value in found.checks[-2:]) or "nothing to compare yet"
        lines.append(
            f"warm-up: {probe.warmup_steps} of at most {found.limit} steps, {_reason(found)} (overlap of the last "
            f"choices: {last}; wanted twice in a row: {100 * found.threshold:.0f} %)"
        )
    if probe is not None and probe.partitions_auto is not None:
        found = probe.partitions_auto
        share = f"{100 * found.checks[-1]:.0f} % of the modules decided, " if found.checks else ""
        lines.append(
            f"partitions: {probe.partitions} of at most {found.limit}, {_reason(found)} ({share}"
            f"{100 * found.threshold:.0f} % wanted, twice in a row)"
        )
    return lines


def _own(seed: SeedRecord) -> dict:
    return {spec.name: getattr(seed, spec.name) for spec in dataclasses.fields(seed)}


def _reason(found: AutoStop) -> str:
    return "as the choice was settled" if found.reason == SETTLED else "the limit: the choice was not settled"
