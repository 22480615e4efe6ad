"""What the trainer remembers of a sync, so that the next one need only carry what changed.

Each rank keeps a copy in 16 bits of its rows of every weight that trains: 2·C/R bytes for C parameters of merged and
full modules over R ranks, in host memory where weights live on an accelerator. Ranks compare their own rows with it
and put the list of changed elements together; their values every rank has, since each merges whole weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.element_list import ELEMENT_BYTES, decode, encode
from hybrid_lora_plugin.sync.element_sum import sum_at, sum_of, wrapped

#: syncs in which everything that the rollout engine holds is read back in full once
PARTS = 16


@dataclass
class Destination:
    """What one set of rollout engines was sent last."""

    #: of the last sync, 0 for none
    number: int = 0
    #: of the weights in it
    version: int = 0
    #: syncs so far, which says whose turn it is to be read back in full
    syncs: int = 0
    #: whether the next sync has everything read back
    read_all: bool = False


class SentWeights:
    """This rank's part of what was sent last, and to whom.

    Args:
        group: the ranks that hold one copy of the weights between them; None where each holds a whole one.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None = None):
        several = group is not None and group.size() > 1
        self._group = group if several else None
        self._rank, self._ranks = (group.rank(), group.size()) if several else (0, 1)
        #: [rows, d_in] int16 by name
        self._copies: dict[str, torch.Tensor] = {}
        #: elements of each whole weight
        self._elements: dict[str, int] = {}
        self._version = 0
        self._drawing = False
        self._destinations: dict[str, Destination] = {}

    @property
    def bytes(self) -> int:
        """Bytes this rank keeps."""
        return sum(copy.nbytes for copy in self._copies.values())

    def bytes_for(self, shapes: Iterable[tuple[int, ...]]) -> int:
        """Bytes this rank will keep of weights of these whole shapes, (d_out, d_in) or (d_out,)."""
        rows = ((self.own_rows(shape[0]), math.prod(shape[1:])) for shape in shapes)
        return sum((own.stop - own.start) * columns * torch.int16.itemsize for own, columns in rows)

    def begin(self, number: int, destination: str) -> Changes:
        """The next sync.

        Args:
            number: of it.
            destination: name of the set of rollout engines that it goes to. One that does not hold the weights that
                were sent last, to whomever, gets all of them.
        """
        if self._drawing:
            # The copies hold some of the weights of a sync that was never complete.
            self.forget()
        self._drawing = True
        whom = self._destinations.get(destination, Destination())
        builds = whom.number and whom.version == self._version
        # Known again when all of the stream has been drawn.
        self._destinations.pop(destination, None)
        return Changes(self, number, destination, whom, whom.number if builds else 0)

    def forget(self) -> None:
        """A sync was not proven: the next one to anybody carries everything."""
        self._destinations.clear()

    def read_all_back(self) -> None:
        """Have the next sync to each destination read back in full."""
        for destination in self._destinations.values():
            destination.read_all = True

    # -- for ``Changes`` --------------------------------------------------------------------------------------

    def in_turn(self, part: int) -> set[str]:
        """Names of the weights of which the middle lies in that part of all elements."""
        total, begun, chosen = sum(self._elements.values()), 0, set()
        for name, elements in self._elements.items():
            if (begun + elements // 2) * PARTS // total == part:
                chosen.add(name)
            begun += elements
        return chosen

    def own_rows(self, rows: int) -> slice:
        """This rank's rows of a weight of that many."""
        share = -(-rows // self._ranks)
        return slice(min(rows, share * self._rank), min(rows, share * (self._rank + 1)))

    def compare(self, name: str, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare this rank's rows with the copy, which then holds them.

        Args:
            name: of the weight.
            bits: [d_out, d_in] int16, all of it.

        Returns:
            Row-major indices [n] int64 into the whole weight of this rank's elements that changed, and by how much
            [n] int64. All of them where there was no copy.
        """
        rows = self.own_rows(bits.shape[0])
        mine, copy = bits[rows], self._copies.get(name)
        self._elements[name] = bits.numel()
        if copy is None:
            # In page-locked memory it comes back to the accelerator without waiting.
            self._copies[name] = torch.empty(mine.shape, dtype=torch.int16, pin_memory=bits.is_cuda).copy_(mine)
            return torch.arange(mine.numel(), device=bits.device), mine.reshape(-1).to(torch.int64)
        old, new = copy.to(bits.device, non_blocking=True).reshape(-1), mine.reshape(-1)
        changed = (old != new).nonzero()[:, 0]
        values = new[changed]
        moved = values.to(torch.int64) - old[changed]
        # Last: on the host ``old`` is the copy itself.
        copy.view(-1)[changed.cpu()] = values.cpu()
        return changed + rows.start * bits.shape[1], moved

    def added_up(self, numbers: list[torch.Tensor]) -> list[list[int]]:
        """Scalars int64 of every rank, rank by rank."""
        mine = torch.stack(numbers)
        if self._group is None:
            return [mine.tolist()]
        everyone = [torch.empty_like(mine) for _ in range(self._ranks)]
        torch.distributed.all_gather(everyone, mine, group=self._group)
        return torch.stack(everyone).tolist()

    def gathered(self, indices: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The indices [n] int64 of every rank, in rank order, each of them as many as ``counts`` says."""
        if self._group is None:
            return indices
        # Of one length, which is all that every backend carries.
        padded = indices.new_zeros(max(counts))
        padded[: len(indices)] = indices
        everyone = [torch.empty_like(padded) for _ in range(self._ranks)]
        torch.distributed.all_gather(everyone, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    def ended(self, changes: Changes) -> None:
        """All of a stream has been drawn: who it went to holds what the copies hold."""
        self._drawing = False
        if changes.changed_elements:
            self._version += 1
        whom = changes.whom
        self._destinations[changes.destination] = Destination(changes.number, self._version, whom.syncs + 1)


@dataclass
class Changes:
    """What one sync carries of the weights that train, and the account of it that goes into the manifest."""

    sent: SentWeights
    number: int
    destination: str
    whom: Destination
    #: sync that this one builds on; 0 where it carries everything
    base_number: int
    #: by name of every weight that trains what the receiver has to find; see ``account``
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    changed_elements: int = 0
    elements: int = 0

    def __post_init__(self):
        part = None if self.whom.read_all else self.whom.syncs % PARTS
        #: whether nothing has been sent before, to anybody
        self.first = not self.sent._copies
        #: which of ``PARTS`` is read back in full; None for all of them
        self.part = part
        names = set(self.sent._elements) if part is None else self.sent.in_turn(part) if self.base_number else set()
        self._in_full = names if self.base_number else set()

    def of(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """What travels for a weight that trains.

        Args:
            name: plain name.
            weight: [d_out, d_in] or [d_out], whole, of 16 bits.

        Returns:
            The weight itself, or its changed elements [m, 2] int16, or None where nothing changed.

        Raises:
            WeightSyncError: it has no 16 bits.
        """
        if weight.element_size() != 2:
            raise WeightSyncError(
                f"{name}: is {weight.dtype}, wanted 16 bits: more would nearly all change at every step; give "
                "hybrid_lora.sync=merge".replace("torch.", ""),
                see="setting-does-not-fit-the-sync-mode",
            )
        bits = weight.contiguous().view(torch.int16).reshape(weight.shape[0], -1)
        sent, columns = self.sent, bits.shape[1]
        indices, moved = sent.compare(name, bits)
        rows, zero = sent.own_rows(bits.shape[0]), torch.zeros((), dtype=torch.int64, device=bits.device)
        numbers = [torch.tensor(len(indices), device=bits.device), zero, zero]
        if self.base_number:
            numbers[1] = sum_at(indices // columns, indices % columns, moved)
            if name in self._in_full:
                numbers[2] = sum_of(bits[rows], (rows.start, 0))
        of_ranks = sent.added_up(numbers)
        counts = [count for count, _, _ in of_ranks]
        changed = sum(counts)
        self.changed_elements += changed
        self.elements += weight.numel()
        row = self.rows[name] = {"changed": changed}
        if not self.base_number:
            return weight
        if changed * ELEMENT_BYTES >= weight.nbytes:
            return weight
        if name in self._in_full:
            row["in_full"] = wrapped(sum(of_rank[2] for of_rank in of_ranks))
        if not changed:
            return None
        elements = encode(sent.gathered(indices, counts), bits.view(-1))
        everywhere, values = decode(elements)
        new = sum_at(everywhere // columns, everywhere % columns, values).item()
        row |= {"sent": len(elements), "new": new, "old": wrapped(new - sum(of_rank[1] for of_rank in of_ranks))}
        return elements

    @property
    def account(self) -> dict[str, Any]:
        """For the manifest: what the receiver has to find.

        ``tensors`` has a row for each weight that trains: ``changed`` elements; where a list of elements travels, how
        many of them were ``sent`` and the sum over these before and after (``old``, ``new``); where it is the weight's
        turn, the sum over all of it (``in_full``). ``part`` says whose turn it is, null for everybody's.
        """
        return {"part": self.part, "parts": PARTS, "tensors": self.rows}

    @property
    def changed_tensors(self) -> int:
        return sum(row["changed"] > 0 for row in self.rows.values())

    @property
    def share(self) -> float:
        """Of all elements of what trains, those that differ from what was sent last."""
        return self.changed_elements / max(1, self.elements)

    def ended(self) -> None:
        """All of the stream has been drawn."""
        self.sent.ended(self)

    def refused(self) -> None:
        """The sync was not proven."""
        self.sent.forget()
