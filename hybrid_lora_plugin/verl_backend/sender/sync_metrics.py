"""Measurements of this process's last weight sync, for the trainer's metrics.

The trainer's process keeps them when its stream has gone out. Where it also holds the sending end it adds what it
learnt there; a rollout engine apart from the trainer raises in its own process when it cannot prove a sync. Either way
a run goes on only after a proven sync, so ``sync_digest_ok`` of a logged step is 1, or 0 where nothing was to be
proven.
"""

from __future__ import annotations

import math
from typing import Any

from hybrid_lora_plugin.sync.wire import OutgoingWeights
from hybrid_lora_plugin.training.arrival import arrival_of, is_lost

#: in a record beside the metrics: by kind of module, the sums that the arrived update is computed from
UPDATE_SUMS = "update_sums"
#: in a record: how far the policy of this rank's rollout engine stands from the trainer's, which only goes together
POLICY = "policy"

_last: dict[str, Any] = {}
#: verl's global step of these, where the stream was told
_step: int | None = None
_warned = False


def keep(outgoing: OutgoingWeights, update_sums: dict[str, list[float]] | None = None) -> None:
    """Remember a stream that has gone out, and what ``Arrival.sums`` says of it."""
    global _step
    if None not in (_step, outgoing.step) and _step != outgoing.step:
        # Of a step whose metrics nobody asked for: the sync before the first one.
        _last.clear()
    _step = outgoing.step
    # One step may sync two sets of engines, and the second sends what the first did.
    changed = max(_last.get("sync_tensors_changed", 0.0), float(outgoing.changed))
    elements = _last.get("sync_elements_changed", 0.0)
    _last.clear()
    _last.update(
        sync_bytes=float(outgoing.bytes),
        sync_seconds=outgoing.seconds,
        sync_tensors=float(len(outgoing.entries)),
        sync_digest_ok=float(outgoing.header.digests),
    )
    if outgoing.header.digests:
        _last["sync_tensors_changed"] = changed
    if outgoing.changes is not None:
        _last["sync_elements_changed"] = max(elements, outgoing.changes.share)
    _last[UPDATE_SUMS] = update_sums or {}


def add(seconds: float, compared: dict[str, float]) -> None:
    """What the sending end knows besides.

    Args:
        seconds: from the first tensor until the engine was proven to hold the last.
        compared: what its server measured on the fixed prompts, {} where they were not compared.
    """
    _last["sync_seconds"] = seconds
    if compared:
        _last[POLICY] = {name: value for name, value in compared.items() if name.startswith("sync_policy_")}
        _last["sync_logprob_difference"] = compared["sync_logprob_difference"]


def last_sync(_worker=None) -> dict[str, Any]:
    """The measurements by metric name without prefix, of the last sync or of those of one step; each is given once.

    Beside them what ``combined`` makes metrics of, as ``UPDATE_SUMS`` and ``POLICY``.
    """
    taken = dict(_last)
    _last.clear()
    return taken


def combined(records: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of one sync from what ``last_sync`` gave in each rank.

    Returns:
        Seconds of the slowest rank, the least that every rank proved, the update that arrived in all that the ranks
        looked at, the policy of the rollout engine that stands furthest from the trainer's; the rest is the same on
        all.
    """
    metrics = {}
    for name in sorted({name for record in records for name in record} - {UPDATE_SUMS, POLICY}):
        values = [record[name] for record in records if name in record]
        metrics[name] = min(values) if name == "sync_digest_ok" else max(values)
    policies = [record[POLICY] for record in records if POLICY in record]
    if policies:
        metrics |= max(policies, key=lambda policy: abs(policy.get("sync_policy_slope", 1.0) - 1))
    for kind, sums in _update_sums(records).items():
        arrived = arrival_of(sums)
        if arrived is not None:
            metrics[f"update_arrived_{kind}"], metrics[f"update_noise_{kind}"] = arrived
    return metrics


def _update_sums(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What ``Arrival.sums`` gave on each rank, added up by kind."""
    of_ranks = [record.get(UPDATE_SUMS, {}) for record in records]
    return {
        kind: [math.fsum(terms) for terms in zip(*(sums[kind] for sums in of_ranks if kind in sums), strict=True)]
        for kind in sorted({kind for sums in of_ranks for kind in sums})
    }


def warn_of_lost_update(records: list[dict[str, Any]]) -> None:
    """Print once in a run that the rollout engine does not get the update, and what helps."""
    global _warned
    lost = {kind: arrival_of(sums)[0] for kind, sums in _update_sums(records).items() if is_lost(sums)}
    if lost and not _warned:
        _warned = True
        kind, value = min(lost.items(), key=lambda item: item[1])
        print(
            f"hybrid_lora: WARNING: update_arrived_{kind} is {value:.2f}: so much of the update is in the rollout "
            "engine's weights, the rest is lost in rounding, and it samples from a policy nearer to the base model "
            "than the one that trains; give hybrid_lora.sync_rounding=stochastic or "
            "actor_rollout_ref.rollout.dtype=float16 [docs/weight-sync.md#rollouts-in-16-bits]",
            flush=True,
        )
