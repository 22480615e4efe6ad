"""How much of an update is in the rounded weights that a rollout engine gets.

With ``d`` the exact update of an element and ``r`` its rounded weight less its original one, ``arrived`` is
``⟨r, d⟩ / ‖d‖²``, 1.0 where all of the update is there, and ``noise`` is ``‖r − d‖ / ‖d‖``. Both come from a block
of every tensor, another one at each sync: what is left out costs nothing, and millions of elements remain.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hybrid_lora_plugin.training.dtensor import first_element, local_tensor

#: elements of one tensor that are looked at in one sync
SAMPLED = 1 << 16
#: below this much of the update, a user has to know
ENOUGH = 0.9


@dataclass(frozen=True)
class TrainedPiece:
    """What this rank holds of a full module's weight or bias.

    Attributes:
        held: what has its trained values, float32: whole rows, in a DTensor under FSDP2, or flat under FSDP1. Read as
            late as possible, as FSDP1 moves the values of a parameter.
        original: the same elements as they were before training.
        first: which element of the whole tensor, counted row by row, is the first of them.
        part: which elements of ``held`` they are.
    """

    held: torch.Tensor
    original: torch.Tensor
    first: int
    part: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def of(cls, tensor: torch.Tensor, original: torch.Tensor) -> TrainedPiece:
        """Of a whole tensor [d_out, …], or of a DTensor with this rank's rows of it."""
        return cls(tensor, original, first_element(tensor))


class Arrival:
    """The sums of one sync.

    Args:
        number: of the sync, which chooses the rows.
        sampled: most elements of one tensor that are looked at; None is all of them.
    """

    def __init__(self, number: int = 0, sampled: int | None = SAMPLED):
        self._number = number
        self._sampled = sampled
        self._sums: dict[str, torch.Tensor] = {}

    def rows(self, shape: torch.Size) -> slice:
        """The rows to look at of a tensor of [d_out, …]."""
        if self._sampled is None:
            return slice(0, shape[0])
        return self._block(shape[0], max(1, self._sampled // max(1, shape[1:].numel())))

    def _block(self, of: int, most: int) -> slice:
        count = min(of, most)
        first = self._number * count % (of - count + 1)
        return slice(first, first + count)

    def add(self, kind: str, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count some elements.

        Args:
            kind: ``lora`` or ``full``.
            exact: the exact update of each.
            rounded: of the same shape, the update that the rounded weights make.
        """
        exact, rounded = exact.float().reshape(-1), rounded.float().reshape(-1)
        # The last one counts the elements.
        count = exact.new_tensor(exact.numel())
        sums = torch.stack([rounded.dot(exact), exact.dot(exact), rounded.dot(rounded), count]).double()
        self._sums[kind] = self._sums[kind] + sums if kind in self._sums else sums

    def add_full(self, piece: TrainedPiece, rounded: torch.Tensor) -> None:
        """Count some elements of a full module's weight or bias.

        Args:
            piece: of it, on this rank; without elements it counts nothing.
            rounded: [d_out, …] all of it, as the rollout engine gets it.
        """
        exact = local_tensor(piece.held).detach().reshape(-1)[piece.part]
        if not exact.numel():
            return
        block = slice(0, exact.numel()) if self._sampled is None else self._block(exact.numel(), self._sampled)
        exact, start = (held.reshape(-1)[block].to(rounded.device) for held in (exact, piece.original))
        there = rounded.reshape(-1)[piece.first + block.start : piece.first + block.stop]
        self.add("full", exact - start.float(), there.float() - start.to(rounded.dtype).float())

    def sums(self) -> dict[str, list[float]]:
        """By kind ⟨r, d⟩, ‖d‖², ‖r‖² and the number of elements; those of several ranks may be added."""
        return {kind: sums.tolist() for kind, sums in self._sums.items()}


def arrival_of(sums: list[float]) -> tuple[float, float] | None:
    """(arrived, noise) from ``Arrival.sums``; None where nothing was updated."""
    product, exact, rounded, _ = sums
    if not exact:
        return None
    return product / exact, (max(0.0, rounded - 2 * product + exact) / exact) ** 0.5


def is_lost(sums: list[float]) -> bool:
    """Whether too little of an update arrived, beyond what rounding without a bias would do by chance.

    The mean over n elements of a noise of that size has a standard error of about noise / √n, which is large where
    few elements have moved by little: a small model's first step is no reason for a warning.
    """
    arrived = arrival_of(sums)
    return arrived is not None and arrived[0] + 4 * arrived[1] / sums[3] ** 0.5 < ENOUGH
