"""A checkpoint engine over gloo, for rollout engines apart from the trainer on a machine without accelerators.

verl 0.9.1's own ones need CUDA, an NPU or RDMA. This one does what its NCCL engine does, with the same calls in the
same
order, and one tensor at a time: rank 0 of the trainer broadcasts, the other trainer ranks walk their generator.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.checkpoint_engine.base import CheckpointEngine

WAIT = timedelta(seconds=120)


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    def __init__(self, bucket_size: int, is_master: bool = False):
        self.is_master, self.group, self.rank, self.round = is_master, None, -1, 0
        if is_master:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            self.store = TCPStore("127.0.0.1", self.port, is_master=True, wait_for_workers=False, timeout=WAIT)

    def prepare(self):
        return self.port if self.is_master else None

    @classmethod
    def build_topology(cls, actor_wg_world_size, rollout_world_size, metadata):
        world = 1 + rollout_world_size
        actors = {"rank": [0] + [-1] * (actor_wg_world_size - 1), "world_size": [world] * actor_wg_world_size}
        rollouts = {"rank": list(range(1, world)), "world_size": [world] * rollout_world_size}
        port = metadata[0]
        return (
            actors | {"port": [port] * actor_wg_world_size},
            rollouts | {"port": [port] * rollout_world_size},
        )

    def init_process_group(self, rank: int, world_size: int, port: int):
        self.rank, self.round = rank, self.round + 1
        if rank < 0:
            return
        if not self.is_master and self.round == 1:
            self.store = TCPStore("127.0.0.1", port, is_master=False, timeout=WAIT)
        self.group = ProcessGroupGloo(PrefixStore(f"round{self.round}", self.store), rank, world_size, WAIT)

    def finalize(self):
        self.group = None

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self.group.broadcast([tensor], torch.distributed.BroadcastOptions()).wait()
        return tensor

    async def send_weights(self, weights, global_steps=None):
        for index, (name, tensor) in enumerate(weights):
            if self.rank < 0:
                continue
            self.store.set(f"{self.round}/{index}", repr((name, str(tensor.dtype), tuple(tensor.shape))))
            self._broadcast(tensor.contiguous().reshape(-1).view(torch.uint8).clone())
        if self.rank == 0:
            self.store.set(f"{self.round}/{index + 1}", "end")

    async def receive_weights(self, global_steps=None):
        import ast

        index = 0
        while (text := self.store.get(f"{self.round}/{index}").decode()) != "end":
            name, dtype, shape = ast.literal_eval(text)
            dtype = getattr(torch, dtype.removeprefix("torch."))
            size = dtype.itemsize * torch.Size(shape).numel()
            yield name, self._broadcast(torch.empty(size, dtype=torch.uint8)).view(dtype).view(shape)
            index += 1
