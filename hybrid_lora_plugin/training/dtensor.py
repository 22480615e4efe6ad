"""What one rank holds of sharded tensors, and sums over it."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds: a DTensor's local shard, or the tensor itself; shares storage."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sum_of_squares(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Sum of the squares of what this rank holds of the tensors, a float32 scalar where they are; None counts as zero.

    Summed over the ranks that share one copy it is the square of the L2 norm.
    """
    shards = [local_tensor(tensor).detach() for tensor in tensors if tensor is not None]
    if not shards:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(shards)).float().square().sum()
