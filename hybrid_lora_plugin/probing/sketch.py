"""A few thousand numbers for a gradient matrix, from which products of gradients and signs of entries are read.

A count sketch (Charikar, Chen, Farach-Colton 2002): each entry goes with a random sign into one of k buckets. It is
linear, so micro-batches and ranks add up, and the product of two sketches is in expectation that of the matrices, with
a variance of at most 2 ‖G‖² ‖H‖² / k. A matrix with k entries or fewer is its own sketch, and its products are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lora_plugin.seeding import generator

#: Buckets of a sketch, and entries that are sampled. A prime that divides no d_in, so that an outlier column of a
#: matrix goes into as many buckets as it has entries.
WIDTH = 8191


class GradientSketch:
    """Sketch and sampled entries of ``G = δᵀ x [d_out, d_in]``, of which no more than one is formed at a time.

    The sign of entry (i, j) is that of its row times that of its column, its bucket ``(i d_in + j) mod k``.

    Attributes:
        sampled: how many of the matrix's own entries are in the sample; where they are fewer than ``width``, all.
    """

    def __init__(self, shape: tuple[int, int], width: int, seed: int, index: int, device: torch.device) -> None:
        """For a matrix.

        Args:
            shape: d_out, d_in.
            width: k, of the sketch and of the sample.
            seed: ``probe.seed``.
            index: number of the module; each has signs and a sample of its own.
            device: where gradients come from.
        """
        self._width, entries = width, shape[0] * shape[1]
        rng = generator(seed, "sketch", index)
        self._rows, self._columns = (
            (2 * torch.randint(2, (size,), generator=rng, dtype=torch.int8) - 1).to(device) for size in shape
        )
        self.sampled = min(entries, width)
        # Drawn with replacement: of millions hardly any is drawn twice.
        drawn = torch.arange(entries) if entries <= width else torch.randint(entries, (width,), generator=rng)
        self._sample = drawn.to(device)
        self._signs = self._rows[self._sample // shape[1]] * self._columns[self._sample % shape[1]]

    def add_(self, sketch: Tensor, sample: Tensor | None, delta: Tensor, x: Tensor) -> None:
        """Add those of ``δᵀ x`` to ``sketch [k]`` and, if given, to ``sample [k]``, of which the first are filled.

        Args:
            sketch, sample: changed in place.
            delta: ``[tokens, d_out]``.
            x: ``[tokens, d_in]``.
        """
        signed = ((delta * self._rows).T @ (x * self._columns)).flatten()
        if sample is not None:
            sample[: self.sampled] += signed[self._sample] * self._signs
        whole = len(signed) // self._width * self._width
        sketch += signed[:whole].view(-1, self._width).sum(dim=0)
        sketch[: len(signed) - whole] += signed[whole:]
