"""Sharded tensors: what one rank holds, sums over it, and the whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


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


def first_element(tensor: torch.Tensor) -> int:
    """Which element of the whole tensor, row by row, this rank's part begins with; 0 where no rows are sharded."""
    for dimension, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_shard(0):
            ranks = tensor.device_mesh.size(dimension)
            # As torch.chunk cuts it: the last ranks may have fewer rows, or none.
            rows = -(-tensor.shape[0] // ranks)
            first = min(tensor.shape[0], rows * tensor.device_mesh.get_local_rank(dimension))
            return first * tensor.shape[1:].numel()
    return 0


def with_local(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``part`` as this rank's part of a tensor sharded as ``tensor`` is; itself where that is not sharded."""
    if not isinstance(tensor, DTensor):
        return part
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def whole(tensor: torch.Tensor, device) -> torch.Tensor:
    """The full tensor on ``device``; for a DTensor a collective, so every rank must call it in the same order."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to(device, non_blocking=True).full_tensor()
    return tensor.detach().to(device)
