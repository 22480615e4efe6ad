"""Measurements of this process's last weight sync, for the trainer's metrics."""

from __future__ import annotations

from hybrid_lora_plugin.sync.wire import OutgoingWeights

_last: dict[str, float] = {}


def keep(
    outgoing: OutgoingWeights | None,
    *,
    bytes: int,
    tensors: int,
    seconds: float,
    checked: bool,
    probe_difference: float | None = None,
) -> None:
    """Remember one sync that was proven: one that was not has raised.

    Args:
        outgoing: the stream, where this process is the trainer's; tells how many tensors changed.
        bytes, tensors: sent, header and manifest counted in the bytes.
        seconds: until the engine was proven to have them.
        checked: whether digests were compared.
        probe_difference: largest difference of a log-probability of the fixed prompt.
    """
    _last.clear()
    _last.update(sync_bytes=float(bytes), sync_seconds=seconds, sync_tensors=float(tensors))
    _last["sync_digest_ok"] = 1.0 if checked else 0.0
    if outgoing is not None and checked:
        _last["sync_tensors_changed"] = float(outgoing.changed)
    if probe_difference is not None:
        _last["sync_probe_difference"] = probe_difference


def last_sync(_worker=None) -> dict[str, float]:
    """The measurements by metric name without prefix; empty before the first sync."""
    return dict(_last)
