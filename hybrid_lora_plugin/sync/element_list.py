"""The elements of a weight that changed, as they travel: the gap since the last one and the value, 16 bits each.

A list is [m, 2] int16. The first column is the number of elements passed over, 0 to 65,535, the second the new value's
bits. Where more are passed over, an unchanged element in between is sent once more with the value it has.
"""

from __future__ import annotations

import torch

#: steps from one element of a list to the next are 1 to this
LONGEST = 1 << 16
#: bytes of one element of a list
ELEMENT_BYTES = 4


def encode(indices: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The list of some elements.

    Args:
        indices: [n] int64 row-major indices into the weight, ascending and different.
        bits: [N] int16 all elements of the weight.

    Returns:
        [m, 2] int16 with m ≥ n: elements in between are added where two lie too far apart.
    """
    before = torch.cat([indices.new_full((1,), -1), indices[:-1]]) if indices.numel() else indices
    between = (indices - before - 1).div(LONGEST, rounding_mode="floor")
    if between.any():
        # Each element as often as there are to be steps towards it; the last of these is the element itself.
        steps = between + 1
        last = steps.cumsum(0)
        which = torch.repeat_interleave(torch.arange(len(steps), device=steps.device), steps)
        place = torch.arange(int(last[-1]), device=steps.device) - (last - steps)[which]
        all_indices = before[which] + (place + 1) * LONGEST
        all_indices[last - 1] = indices
        indices = all_indices
        before = torch.cat([indices.new_full((1,), -1), indices[:-1]])
    passed = indices - before - 1
    # Two's complement, so that 16 bits hold it.
    passed = torch.where(passed >= LONGEST // 2, passed - LONGEST, passed).to(torch.int16)
    return torch.stack([passed, bits[indices]], dim=1)


def decode(elements: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [m] int64 and bits [m] int16 of a list [m, 2] int16."""
    steps = (elements[:, 0].to(torch.int64) & (LONGEST - 1)) + 1
    return steps.cumsum(0) - 1, elements[:, 1].contiguous()
