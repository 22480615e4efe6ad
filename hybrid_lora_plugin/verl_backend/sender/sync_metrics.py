"""Measurements of this process's last weight sync, for the trainer's metrics.

The trainer's process keeps them when its stream has gone out. Where it also holds the sending end it adds what it
learnt there; a rollout engine apart from the trainer raises in its own process when it cannot prove a sync. Either way
a run goes on only after a proven sync, so ``sync_digest_ok`` of a logged step is 1, or 0 where nothing was to be
proven.
"""

from __future__ import annotations

from hybrid_lora_plugin.sync.wire import OutgoingWeights

_last: dict[str, float] = {}


def keep(outgoing: OutgoingWeights) -> None:
    """Remember a stream that has gone out."""
    # One step may sync two sets of engines, and the second sends what the first did.
    changed = max(_last.get("sync_tensors_changed", 0.0), float(outgoing.changed))
    _last.clear()
    _last.update(
        sync_bytes=float(outgoing.bytes),
        sync_seconds=outgoing.seconds,
        sync_tensors=float(len(outgoing.entries)),
        sync_digest_ok=float(outgoing.header.digests),
    )
    if outgoing.header.digests:
        _last["sync_tensors_changed"] = changed


def add(seconds: float, logprob_difference: float | None) -> None:
    """What the sending end knows besides.

    Args:
        seconds: from the first tensor until the engine was proven to hold the last.
        logprob_difference: largest difference of a log-probability of the fixed prompt, nats.
    """
    _last["sync_seconds"] = seconds
    if logprob_difference is not None:
        _last["sync_logprob_difference"] = logprob_difference


def last_sync(_worker=None) -> dict[str, float]:
    """The measurements by metric name without prefix, of the last sync or of those of one step; each is given once."""
    taken = dict(_last)
    _last.clear()
    return taken
