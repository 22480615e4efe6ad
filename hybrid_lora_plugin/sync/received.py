"""What came out of the stream of a weight sync, and its comparison with what was sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.wire import MANIFEST, Entry, SyncHeader, read_manifest


class ReceivedWeights:
    """The receiver's record of one sync; ``finish`` compares it with the manifest.

    Args:
        header: as it came in the stream.
        run, number: of the sync that was announced beside the stream; None where nobody announced one.
        last: run and number of the sync before, None for the first one.

    Raises:
        WeightSyncError: it is another run's, another one than announced, or one that came before.
    """

    def __init__(
        self,
        header: SyncHeader,
        run: str | None = None,
        number: int | None = None,
        last: tuple[str, int] | None = None,
    ):
        if run is not None and header.run != run:
            raise WeightSyncError(
                f"received a sync of run {header.run}, wanted run {run}: another training run sends to this engine",
                see="sync-of-another-run",
            )
        if number is not None and header.number != number:
            raise WeightSyncError(
                f"received sync {header.number}, wanted sync {number}: the weights are stale", see="stale-weights"
            )
        if last is not None and header.run == last[0] and header.number <= last[1]:
            raise WeightSyncError(
                f"received sync {header.number} again, the last one was sync {last[1]}: the weights are stale",
                see="stale-weights",
            )
        self.header = header
        self.entries: dict[str, Entry | None] = {}
        self._read_back: set[str] = set()
        self._manifest: dict[str, Any] | None = None
        self._sent: list[Entry] = []

    def take(self, name: str, tensor: torch.Tensor) -> Entry | None:
        """Record a tensor; returns its entry, or None for the manifest.

        Raises:
            WeightSyncError: it came twice, or after the manifest.
        """
        pending = self.take_soon(name, tensor)
        return None if pending is None else self.settle(name, pending)

    def settle(self, name: str, pending: Callable[[], Entry]) -> Entry:
        """Wait for what ``take_soon`` began, before the tensor's bytes go."""
        self.entries[name] = pending()
        return self.entries[name]

    def take_soon(self, name: str, tensor: torch.Tensor, read_back: bool = False) -> Callable[[], Entry] | None:
        """As ``take``, with the digest computed meanwhile; to be settled.

        Args:
            read_back: these very bytes will be hashed where they are used, so not here: ``prove`` is told.

        Raises:
            WeightSyncError: it came twice, or after the manifest.
        """
        if self._manifest is not None:
            raise WeightSyncError(
                f"{name}: came after the manifest, which is the last tensor of a sync",
                see="sync-with-parts-missing-or-repeated",
            )
        if name == MANIFEST:
            self._manifest, self._sent = read_manifest(tensor)
            return None
        if name in self.entries:
            raise WeightSyncError(f"{name}: received twice in one sync", see="sync-with-parts-missing-or-repeated")
        self.entries[name] = None  # its place in the order
        if read_back:
            self._read_back.add(name)
        return Entry.soon(name, tensor, self.header.digests and not read_back)

    @property
    def account(self) -> dict[str, Any]:
        """What the manifest says besides of the weights that were sent; {} in most modes."""
        return (self._manifest or {}).get("account", {})

    def finish(self, step: int | None = None) -> list[Entry]:
        """Compare everything received with the manifest; digests of what is read back only in ``prove``.

        Args:
            step: verl's global step that was announced beside the stream.

        Returns:
            What was received, in order.

        Raises:
            WeightSyncError: naming the first tensor that is missing, unexpected, out of place or different.
        """
        manifest = self._manifest
        if manifest is None:
            last = next(reversed(self.entries), "nothing")
            raise WeightSyncError(
                f"the sync ended after {last!r} without its manifest: {len(self.entries)} tensors came, the rest is "
                "missing",
                see="sync-with-parts-missing-or-repeated",
            )
        if (manifest["run"], manifest["number"]) != (self.header.run, self.header.number):
            raise WeightSyncError(
                f"header and manifest are of different syncs: {self.header.run} {self.header.number} and "
                f"{manifest['run']} {manifest['number']}",
                see="stale-weights",
            )
        if None not in (step, manifest["step"]) and manifest["step"] != step:
            raise WeightSyncError(
                f"the weights are of step {manifest['step']}, wanted step {step}: they are stale", see="stale-weights"
            )
        sent = [replace(entry, digest="") if entry.name in self._read_back else entry for entry in self._sent]
        compare_entries(sent, list(self.entries.values()), "sent", "received", see="tensors-changed-on-the-way")
        return list(self.entries.values())

    def prove(self, read_back: dict[str, str]) -> list[Entry]:
        """Compare all digests with the manifest.

        Args:
            read_back: digest by name of every tensor that was taken to be read back, from where it is used.

        Returns:
            What was received, in order.

        Raises:
            WeightSyncError: naming the first tensor that differs, or was not read back.
        """
        for name in self._read_back:
            self.entries[name] = replace(self.entries[name], digest=read_back.get(name, ""))
        entries = list(self.entries.values())
        compare_entries(self._sent, entries, "sent", "in the rollout engine's model", see="engine-holds-other-weights")
        return entries


def compare_entries(wanted: list[Entry], seen: list[Entry], sent: str, received: str, *, see: str) -> None:
    """Refuse lists that differ in content or order.

    Args:
        wanted, seen: both ends' tensors.
        sent, received: what happened to them at either end, for the message.
        see: entry of the troubleshooting page; what a difference means depends on the two ends.

    Raises:
        WeightSyncError: naming the first tensor that differs.
    """
    if wanted == seen:
        return
    by_name = {entry.name: entry for entry in seen}
    for entry in wanted:
        other = by_name.get(entry.name)
        if other is None:
            raise WeightSyncError(f"{entry.name}: was {sent}, but not {received}", see=see)
        for what in ("shape", "dtype", "digest"):
            ours, theirs = getattr(entry, what), getattr(other, what)
            if ours != theirs:
                raise WeightSyncError(f"{entry.name}: {sent} with {what} {ours}, {received} with {theirs}", see=see)
    names = {entry.name for entry in wanted}
    for entry in seen:
        if entry.name not in names:
            raise WeightSyncError(f"{entry.name}: was {received}, but never {sent}", see=see)
    for ours, theirs in zip_longest(wanted, seen):
        if ours is None or theirs is None:
            raise WeightSyncError(f"{(ours or theirs).name}: {sent if ours else received} twice", see=see)
        if ours.name != theirs.name:
            raise WeightSyncError(f"{theirs.name}: {received} in the place of {ours.name}", see=see)
