"""Sync mode ``sparse_merge``: the rollout engine holds the bits of ``merge``, and only changed elements travel.

The first sync of a run is that of ``merge``. Every later one carries, of each weight that trains, a list of the
elements that differ from what was sent last, and the receiver writes them into its own weights, packed and sharded as
they are. A list only means something on top of the weights it was made for: the header says which sync that was, and a
receiver that has not proven just that one refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.sync.element_list import decode
from hybrid_lora_plugin.sync.element_sum import sum_at, sum_of, wrapped
from hybrid_lora_plugin.sync.merge import MergeReceiver, merged_weights
from hybrid_lora_plugin.sync.mode_base import RolloutModel, SyncMode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.sent_weights import SentWeights
from hybrid_lora_plugin.sync.wire import SyncHeader
from hybrid_lora_plugin.training.apply import parts_of


class SparseMergeReceiver(MergeReceiver):
    """Loads whole weights, and writes lists of elements where they belong."""

    def __init__(self, header: SyncHeader, rollout: RolloutModel):
        super().__init__(header, rollout)
        self._whole: set[str] = set()
        #: by name of a list, how many elements it had, and the sums of those here before and after
        self._lists: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}

    def take(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        whole = []
        for name, tensor in weights:
            if self.header.base_number and tensor.dtype == torch.int16:
                self._lists[name] = (len(tensor), *self._write(name, tensor))
            else:
                whole.append((name, tensor))
        if whole:
            self._whole |= {name for name, _ in whole}
            super().take(whole)

    def _write(self, name: str, elements: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a list [m, 2] int16; returns the sums over this worker's part of it before and after."""
        if elements.dim() != 2 or elements.shape[1] != 2:
            raise WeightSyncError(
                f"{name}: received as a list of elements with shape {tuple(elements.shape)}, wanted two columns",
                see="tensor-of-another-shape-or-dtype",
            )
        live = self.rollout.live(name)
        indices, values = decode(elements.to(live.view.device))
        if len(indices) and int(indices[-1]) >= torch.Size(live.shape).numel():
            raise WeightSyncError(
                f"{name}: received a value for element {int(indices[-1])}, beyond the last of {live.shape}",
                see="sync-with-parts-missing-or-repeated",
            )
        rows, columns, here = live.locate(indices)
        if here is not None:
            values = values[here]
        bits, place = live.bits, (rows + live.corner[0], columns + live.corner[1])
        before = sum_at(*place, bits[rows, columns])
        bits[rows, columns] = values
        held = bits[rows, columns]
        if self.header.digests and not torch.equal(held, values):
            raise WeightSyncError(
                f"{name}: arrived whole, but the rollout engine's model holds other values",
                see="engine-holds-other-weights",
            )
        return before, sum_at(*place, held)

    def conclude(self, account: dict[str, Any]) -> dict[str, Any]:
        rows = account.get("tensors", {})
        for name, row in rows.items():
            self._check_received(name, row)
        if not self.header.base_number:
            self.rollout.begin_building(self.header.run, frozenset(rows), sorted(self._whole - rows.keys()))
            return {}
        wrong = sorted(({*rows} ^ self.rollout.trained) | ((self._whole | self._lists.keys()) - rows.keys()))
        if wrong:
            raise WeightSyncError(
                f"{wrong[0]}: one of the weights that train in this sync or in the whole one before, and not in both",
                see="sync-with-parts-missing-or-repeated",
            )
        if not self.header.digests:
            return {}
        part, parts = account["part"], account["parts"]
        self.rollout.read_back_unsent(slice(None) if part is None else slice(part, None, parts))
        return {
            "parts": {name: self._part(name, row) for name, row in rows.items() if {"sent", "in_full"} & row.keys()}
        }

    def _check_received(self, name: str, row: dict[str, int]) -> None:
        listed = self._lists[name][0] if name in self._lists else None
        whole = not self.header.base_number or (row["changed"] and "sent" not in row)
        if listed != row.get("sent") or (whole and name not in self._whole):
            received = "nothing of it" if listed is None else f"a list of {listed}"
            raise WeightSyncError(
                f"{name}: {row['changed']} elements changed, {row.get('sent', 'all')} were to be sent, received "
                f"{received}",
                see="sync-with-parts-missing-or-repeated",
            )

    def _part(self, name: str, row: dict[str, int]) -> list[int | None]:
        """This worker's part of a weight: offset, extent, that of the whole, and its ``old``, ``new``, ``in_full``."""
        live = self.rollout.live(name)
        old = new = in_full = None
        if name in self._lists:
            _, old, new = (value if isinstance(value, int) else value.item() for value in self._lists[name])
        if "in_full" in row:
            in_full = sum_of(live.bits, live.corner).item()
        return [live.offset, *live.extent, old, new, in_full]


class SparseMergeSync(SyncMode):
    """At most 4 bytes for an element that changed, at most 2·C for C parameters of what trains; 2·N at first."""

    name, receiver = "sparse_merge", SparseMergeReceiver
    builds_on_last = True

    def payload_bytes(self, counts: ParameterCounts, dtype: torch.dtype) -> int:
        return (counts.frozen + counts.full) * dtype.itemsize

    def sent_weights(self, group=None) -> SentWeights:
        return SentWeights(group)

    @torch.no_grad()
    def outgoing(self, model: torch.nn.Module, plan: SyncPlan) -> Iterator[tuple[str, torch.Tensor]]:
        changes = plan.changes or SentWeights().begin(1, "")
        parts = parts_of(model)
        trains = {plain_name(name) for name in parts.trained} | {f"{module}.weight" for module in parts.lora_modules}
        for name, weight in merged_weights(model, plan, trained_only=bool(changes.base_number)):
            travels = changes.of(name, weight) if name in trains else weight
            del weight
            if travels is not None:
                yield name, travels
        changes.ended()

    def check_reports(self, header: SyncHeader, account: dict[str, Any], reports: list[dict[str, Any]]) -> None:
        if not header.digests or not header.base_number:
            return
        for name, row in account.get("tensors", {}).items():
            if {"sent", "in_full"} & row.keys():
                _check_parts(name, row, [report.get("parts", {}).get(name) for report in reports], header)


def _check_parts(name: str, row: dict[str, int], parts: list[list | None], header: SyncHeader) -> None:
    """Compare what all workers hold of one weight with the account of it."""
    by_offset: dict[int, list] = {}
    for part in parts:
        if part is None or by_offset.setdefault(part[0], part) != part:
            raise WeightSyncError(
                f"{name}: workers of one rollout engine that hold the same part of it hold different values",
                see="engine-changed-between-syncs",
            )
    distinct = list(by_offset.values())
    if sum(part[1] for part in distinct) != distinct[0][2]:
        raise WeightSyncError(
            f"{name}: the workers' parts have {sum(part[1] for part in distinct)} of {distinct[0][2]} rows or columns",
            see="weight-in-an-unknown-layout",
        )
    said = {
        "old": f"held other values than sync {header.base_number} brought where elements changed",
        "new": "holds other values than were sent where elements changed",
        "in_full": "holds other values than the trainer has sent; read back in full",
    }
    for place, what in enumerate(said, 3):
        if what in row and wrapped(sum(part[place] for part in distinct)) != row[what]:
            raise WeightSyncError(
                f"{name}: the rollout engine {said[what]}; its weights changed without a sync",
                see="engine-changed-between-syncs",
            )


def require_base(header: SyncHeader, holds: tuple[str, int] | None) -> None:
    """Refuse a sync that does not build on what the engine holds.

    Args:
        header: of the sync.
        holds: run and number of the last sync that this engine proved; None where there is none, or another failed
            since.

    Raises:
        WeightSyncError: naming both syncs.
    """
    if not header.base_number or holds == (header.run, header.base_number):
        return
    found = "no sync is proven here" if holds is None else f"the last one proven here is sync {holds[1]} of {holds[0]}"
    raise WeightSyncError(
        f"sync {header.number} of run {header.run} has only what changed since sync {header.base_number}, and {found}; "
        "a rollout engine that joins a run, or lost a sync of it, needs hybrid_lora.sync=merge",
        see="sync-builds-on-another",
    )
