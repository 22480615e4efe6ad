"""Where a plain weight lies in a rollout engine's worker, which may hold a part of it, packed with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: elements of a weight that stand for it where reading all of it at every step would cost more than the sync
SAMPLES = 256


@dataclass(frozen=True)
class LiveWeight:
    """Where a plain weight lies in this worker's model."""

    #: [n, …] this worker's part, sharing storage with the model
    view: torch.Tensor
    #: shape of the whole weight, over all workers
    shape: tuple[int, ...]
    #: dimension that is sharded, None where every worker holds all of it
    dimension: int | None
    #: first row or column of this worker's part
    offset: int
    #: what the engine's loader makes of the plain values, on the engine's device; None where it keeps them
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This worker's part of a whole tensor, as the engine holds it, and where ``whole`` is."""
        part = whole
        if self.dimension is not None:
            part = whole.narrow(self.dimension, self.offset, self.view.shape[self.dimension])
        if self.transform is None:
            return part
        # Where the engine has done it: a last bit may differ from device to device.
        return self.transform(part.to(self.view.device)).to(whole.device)

    def sample(self) -> torch.Tensor:
        """[≤ SAMPLES] elements spread evenly over this worker's part, sharing its storage."""
        flat = self.view.reshape(-1)
        return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]

    @property
    def bits(self) -> torch.Tensor:
        """[n, k] int16 this worker's part of a weight of 16 bits, a bias as one column; shares storage."""
        bits = self.view.view(torch.int16)
        return bits[:, None] if bits.dim() == 1 else bits

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column of the whole weight at which this worker's part begins."""
        return (self.offset if self.dimension == 0 else 0, self.offset if self.dimension == 1 else 0)

    @property
    def extent(self) -> tuple[int, int]:
        """Rows or columns of this worker's part, and of the whole, in the dimension that is sharded."""
        dimension = self.dimension or 0
        return self.view.shape[dimension], self.shape[dimension]

    def locate(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Which elements of the whole weight this worker holds, and where.

        Args:
            indices: [n] int64 row-major indices into the whole weight.

        Returns:
            Rows and columns [m] int64 in ``bits``, and [n] bool which of the indices they are; None for all of them.
        """
        columns = self.shape[1] if len(self.shape) > 1 else 1
        rows, columns = indices // columns, indices % columns
        if self.dimension is None:
            return rows, columns, None
        sharded = (rows if self.dimension == 0 else columns).sub_(self.offset)
        here = (sharded >= 0) & (sharded < self.view.shape[self.dimension])
        return rows[here], columns[here], here
