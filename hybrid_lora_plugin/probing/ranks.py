"""The processes of one probe: what each must do alike, and what the first does for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

from hybrid_lora_plugin.config import ConfigurationError
from hybrid_lora_plugin.probing.errors import ProbeError

Result = TypeVar("Result")


class Ranks:
    """One process, or all processes of a process group.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        device: where this process computes.
    """

    def __init__(self, device: torch.device, group: distributed.ProcessGroup | None = None) -> None:
        """Of the default group if ``torch.distributed`` is initialised, else alone."""
        self._group = group
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank(group) if together else 0
        self.size = distributed.get_world_size(group) if together else 1
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this process reads, writes and reports for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor, group=self._group)
        return tensor

    def sum_gradients_(self, gradients: list[Tensor]) -> None:
        """Add up many tensors of one dtype over all ranks, in place and in one collective."""
        if self.size == 1 or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat, group=self._group)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def sum_to(self, tensor: Tensor, owner: int) -> None:
        """Add up a tensor over all ranks into that of rank ``owner``; elsewhere it is undefined afterwards."""
        if self.size > 1:
            distributed.reduce(tensor, distributed.get_global_rank(self._group or distributed.group.WORLD, owner))

    def largest(self, value: int) -> int:
        """The largest of the values that the ranks give."""
        if self.size == 1:
            return value
        values = torch.tensor([value], device=self.device)
        distributed.all_reduce(values, op=distributed.ReduceOp.MAX, group=self._group)
        return int(values)

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What ``make`` returns on rank 0, given to every rank.

        Raises:
            ConfigurationError: on every rank, if it raises one on rank 0; nobody is left waiting. Elsewhere it carries
                ``reported_by_first_rank``, so that one mistake is not printed by every process.
        """
        if self.size == 1:
            return make()
        box: list = [None, None]
        if self.first:
            try:
                box[0] = make()
            except ConfigurationError as error:
                box[1] = error
        distributed.broadcast_object_list(box, src=0, group=self._group, device=self.device)
        if box[1] is not None:
            if not self.first:
                box[1].reported_by_first_rank = True
            raise box[1]
        return box[0]


def start() -> Ranks:
    """The ranks of a command: those of ``torchrun``, or this process alone.

    Raises:
        ProbeError: ``torchrun`` gave no GPU of its own to a local rank.
    """
    accelerator = torch.cuda.is_available()
    device = torch.device("cuda" if accelerator else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(device)
    if accelerator:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ProbeError(
                f"LOCAL_RANK: {local} has no GPU, there are {torch.cuda.device_count()}; start torchrun with "
                f"--nproc-per-node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if accelerator else "gloo")
    return Ranks(device)


def finish(ranks: Ranks) -> None:
    """End what ``start`` began."""
    if ranks.size > 1:
        distributed.destroy_process_group()
