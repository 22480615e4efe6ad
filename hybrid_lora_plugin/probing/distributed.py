"""The processes of one probe: what each must do alike, what the first does for all, and the frozen base sharded over
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.errors import ConfigurationError, ProbeError

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

    def give_(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with that of rank 0, in place."""
        if self.size > 1:
            distributed.broadcast(
                tensor, distributed.get_global_rank(self._group or distributed.group.WORLD, 0), self._group
            )
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
            RuntimeError: on every rank, in one line, if it raises anything else.
        """
        if self.size == 1:
            return make()
        box: list = [None, None]
        if self.first:
            box = list(_outcome(make, self.rank))
        distributed.broadcast_object_list(box, src=0, group=self._group, device=self.device)
        if box[1] is not None:
            if not self.first:
                box[1].reported_by_first_rank = True
            raise box[1]
        return box[0]

    def on_each(self, make: Callable[[], Result]) -> Result:
        """What ``make`` returns here, once it has returned on every rank.

        Raises:
            ConfigurationError, RuntimeError: on every rank, the error of the first rank that has one, in one line.
        """
        if self.size == 1:
            return make()
        result, error = _outcome(make, self.rank)
        errors: list = [None] * self.size
        distributed.all_gather_object(errors, error, group=self._group)
        for failure in errors:
            if failure is not None:
                raise failure
        return result


def _outcome(make: Callable[[], Result], rank: int) -> tuple[Result | None, Exception | None]:
    """What ``make`` returns, or an error that can travel to other ranks."""
    try:
        return make(), None
    except ConfigurationError as error:
        return None, error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return None, RuntimeError(f"hybrid_lora: on rank {rank}: {type(error).__name__}: {reason}")


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


def device_bytes(device: torch.device) -> int:
    """Memory of a device; of the CPU that of the machine."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.get_device_module(device).mem_get_info(device)[1]


def place(
    model: nn.Module,
    candidates: Sequence[Candidate],
    replicated: Sequence[nn.Parameter],
    ranks: Ranks,
    around: Callable[[nn.Module], AbstractContextManager[None]] = lambda module: nullcontext(),
) -> None:
    """Bring a model that was loaded on the CPU to the ranks' devices, sharded if there are several.

    One FSDP2 unit per decoder layer and one for the rest. The probe's parameters are replicated: they and their Adam
    moments are small, and every rank then takes the same step without a collective of its own.

    Args:
        model: with the probe attached; changed in place.
        candidates: tell where the decoder layers are.
        replicated: the probe's parameters, equal on every rank.
        ranks: who shares the model.
        around: entered while a module is sharded, one after the other, the whole model last.
    """
    if ranks.size == 1:
        model.to(ranks.device)
        return
    for parameter in replicated:
        parameter.data = parameter.data.to(ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    ignored = set(replicated)
    for module in (*decoder_layers(model, candidates), model):
        with around(module):
            fully_shard(module, mesh=mesh, ignored_params=ignored)


def decoder_layers(model: nn.Module, candidates: Sequence[Candidate]) -> list[nn.Module]:
    """The layers that the candidates are in, in the model's order."""
    names = dict.fromkeys(
        candidate.name.partition(f".layers.{candidate.layer}.")[0] + f".layers.{candidate.layer}"
        for candidate in candidates
    )
    return [model.get_submodule(name) for name in names]
