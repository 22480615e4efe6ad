"""How the trainer's float32 values become a rollout engine's weights of 16 bits, the same bits wherever it is done.

One optimizer step moves a weight by far less than a unit in the last place of bfloat16. Rounded to nearest, nearly all
of the update is lost and the rollout engine samples from a policy close to the base model, while every digest agrees.
Rounded stochastically, up with a probability of the distance to the lower neighbour, the update arrives in the mean.

The random threshold of an element is fixed for a run: an integer hash of (seed, name of the tensor, row, column). So
every device and both ends of a sync come to the same bits, a shard to those of its part, and a resumed run to those of
its first life; and from one sync to the next only those elements change whose value crossed its threshold.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from hybrid_lora_plugin.errors import WeightSyncError

#: elements that are rounded at once, so that what is needed besides the result is a few megabytes: on a processor that
#: stays in its caches and starting the ten operations of a piece is little beside them; on an accelerator it takes more
CHUNK, ACCELERATOR_CHUNK = 1 << 19, 1 << 22
#: types of 16 bits, and how many bits of a float32 each lacks
_SIXTEEN = {torch.bfloat16: 16, torch.float16: 13}


@dataclass(frozen=True)
class Rounding:
    """How values are rounded to a type of 16 bits.

    Attributes:
        mode: ``stochastic`` or ``nearest``; other types are rounded to nearest in both.
        seed: chooses the thresholds of ``stochastic``.
    """

    mode: str = "nearest"
    seed: int = 0

    def is_stochastic(self, dtype: torch.dtype) -> bool:
        """Whether values become ``dtype`` by thresholds."""
        return self.mode == "stochastic" and dtype in _SIXTEEN

    def for_tensor(
        self, name: str, dtype: torch.dtype, shape: torch.Size, device, first_column: int = 0
    ) -> ChunkRounding:
        """The rounding of one tensor.

        Args:
            name: plain name of the weight or bias, a part of its thresholds' hash.
            dtype: of the result.
            shape: (d_out, d_in) or (d_out,) of the whole tensor, or of what of it ends where a part does.
            device: of the values.
            first_column: which column of the whole tensor the values begin with.
        """
        if self.is_stochastic(dtype):
            return _Dithered(self.seed, name, dtype, shape, device, first_column)
        return ChunkRounding()


NEAREST = Rounding()


@torch.no_grad()
def on_grid(values: torch.Tensor, original: torch.Tensor, dtype: torch.dtype, out=None) -> torch.Tensor:
    """``W − (W0 − nearest(W0))`` in float32: a trained weight as it were, had it begun as a rollout engine loads it.

    Rounded by thresholds as it is, a weight from a float32 checkpoint would be moved by up to a step of ``dtype`` where
    training left it alone. From here it is rounded as a merged one is: W0 to nearest, the update by thresholds. Where
    W0 is of ``dtype`` the bracket is zero and the result W, bit for bit; where W is W0 it is what nearest makes of W0.

    Args:
        values: float32, any part of a weight.
        original: of the same shape and place, any floating type.
        dtype: of the rollout engine.
        out: takes the result; may be ``values``.
    """
    rest = original.float() - original.to(dtype)
    return torch.sub(values, rest, out=rest if out is None else out)


@torch.no_grad()
def round_weight(
    name: str,
    values: torch.Tensor,
    dtype: torch.dtype,
    rounding: Rounding,
    base: torch.Tensor | None = None,
    *,
    spent: bool = False,
    corner: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """A weight in the rollout engine's type: ``values``, or ``base + values`` in float32, rounded once.

    Args:
        name: plain name, for the thresholds and for messages.
        values: [d_out, d_in] or [d_out] float32; not changed, unless ``spent``.
        dtype: to round to.
        rounding: how.
        base: of the same shape, any floating type; rounded stochastically, it is brought to ``dtype`` first.
        spent: nobody needs ``values`` any more, so the work is done in them.
        corner: row and column of the whole tensor with which ``values`` begin.

    Raises:
        WeightSyncError: an element is too large for ``dtype``, or no number. To nearest in bfloat16 only ``values``
            without a base are looked at: of a merged weight, its factors tell at less cost (``require_numbers``).
    """
    checked = dtype == torch.float16 or rounding.is_stochastic(dtype)
    if not checked and base is None:
        if dtype == torch.bfloat16 != values.dtype:
            require_numbers(name, values)
        return values.to(dtype)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    columns = values.shape[1] if values.dim() > 1 else 1
    matrix, result = values.reshape(-1, columns), out.view(-1, columns)
    base = None if base is None else base.reshape(-1, columns)
    rows = max(1, (CHUNK if values.device.type == "cpu" else ACCELERATOR_CHUNK) // columns)
    scratch = matrix if spent else torch.empty((min(rows, len(matrix)), columns), device=values.device)
    end = torch.Size((corner[0] + len(matrix), corner[1] + columns))
    of_tensor = rounding.for_tensor(name, dtype, end, values.device, corner[1])
    largest = []
    for first in range(0, len(matrix), rows):
        part = slice(first, min(first + rows, len(matrix)))
        exact = scratch[part] if spent else scratch[: part.stop - first]
        if base is None:
            exact.copy_(matrix[part])
        else:
            start = base[part].to(dtype) if rounding.is_stochastic(dtype) else base[part]
            torch.add(matrix[part], start, out=exact)
        if checked:
            largest.extend(exact.aminmax())
        of_tensor.round(exact, corner[0] + first, result[part])
    if checked:
        _check_fits(name, torch.stack(largest), dtype)
    return out


def require_numbers(name: str, *tensors: torch.Tensor) -> None:
    """Raise WeightSyncError, calling it ``name``, where one of the tensors holds an infinity or no number."""
    # A sum of weights stays far from float32's end, and one such element carries over to it; extremes take longer.
    if not math.isfinite(sum(tensor.sum(dtype=torch.float32) for tensor in tensors)):
        raise _no_number(name)


def _no_number(name: str) -> WeightSyncError:
    return WeightSyncError(
        f"{name}: holds a value that is no number; the training run has diverged, continue from an earlier checkpoint",
        see="weight-is-no-number",
    )


def _check_fits(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    largest = values.abs().max().item()
    limit = torch.finfo(dtype).max
    if largest <= limit:
        return
    if largest > limit:
        raise WeightSyncError(
            f"{name}: its largest weight, {largest:g}, does not fit into {dtype}, which ends at {limit:g}; give "
            "actor_rollout_ref.rollout.dtype=bfloat16".replace("torch.", ""),
            see="weight-too-large-for-the-rollout-type",
        )
    raise _no_number(name)


class ChunkRounding:
    """To nearest: what ``copy_`` does."""

    def round(self, values: torch.Tensor, first_row: int, out: torch.Tensor) -> None:
        """Round some rows.

        Args:
            values: [rows, d_in] float32; destroyed.
            first_row: which row of the whole tensor ``values`` begins with.
            out: [rows, d_in] in the type to round to.
        """
        out.copy_(values)


class _Dithered(ChunkRounding):
    """A threshold is added to the bits that the type does not have, and they are cut off.

    A float32's pattern is sign and magnitude, so a carry makes the magnitude larger, for both signs, and a value of the
    type, which has none of those bits, stays as it is. float16 has a fixed step of 2**-24 below 2**-14, finer than
    anywhere above: there the rest is to nearest.

    The threshold is the upper bits of ``R_row · C_column`` mod 2**32, with two random odd factors: uniform, of two
    elements pairwise nearly independent, and it costs one product.
    """

    def __init__(self, seed: int, name: str, dtype: torch.dtype, shape: torch.Size, device, first_column: int = 0):
        #: bits of a float32 that the type lacks
        self._bits = _SIXTEEN[dtype]
        columns = shape[1] if len(shape) > 1 else 1
        self._row = _odd_factors(f"{seed}/{name}/row", shape[0]).to(device)
        self._column = _odd_factors(f"{seed}/{name}/column", columns)[first_column:].to(device)
        self._scratch: torch.Tensor | None = None

    def round(self, values: torch.Tensor, first_row: int, out: torch.Tensor) -> None:
        if self._scratch is None or self._scratch.shape[0] < values.shape[0]:
            self._scratch = torch.empty(values.shape, dtype=torch.int32, device=values.device)
        rows, lacking = self._row[first_row : first_row + values.shape[0], None], (1 << self._bits) - 1
        products = torch.mul(rows, self._column, out=self._scratch[: values.shape[0]])
        thresholds = products.bitwise_right_shift_(32 - self._bits).bitwise_and_(lacking)
        values.view(torch.int32).add_(thresholds).bitwise_and_(~lacking)
        out.copy_(values)


@functools.lru_cache(maxsize=4096)
def _odd_factors(stream: str, count: int) -> torch.Tensor:
    """[count] odd int32: SplitMix64, begun where the stream's name says, its upper half."""
    # unsigned 64-bit integers wrap around
    state = np.arange(1, count + 1, dtype=np.uint64)
    state *= np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(xxhash.xxh3_64_intdigest(stream.encode()))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return torch.from_numpy(((state >> np.uint64(32)) | np.uint64(1)).astype(np.uint32).view(np.int32))
