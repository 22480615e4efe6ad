"""Where the time of a weight sync goes: a stopwatch on the functions of both sides, verl's and the plugin's."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import zmq


class Stopwatch:
    """Wraps functions and adds up the seconds in each, less those of wrapped functions that it calls."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._thread = threading.local()
        self._undo: list[tuple[Any, str, Any, bool]] = []

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Wrap ``owner.name``, a plain or an async function, which is found at each call."""
        function = getattr(owner, name)
        self._undo.append((owner, name, function, name in vars(owner)))
        if asyncio.iscoroutinefunction(function):

            @functools.wraps(function)
            async def timed(*arguments, **options):
                # Other tasks may run in between: counted whole, and not taken from whoever called it.
                begun = time.perf_counter()
                try:
                    return await function(*arguments, **options)
                finally:
                    self.seconds[label] += time.perf_counter() - begun
        else:

            @functools.wraps(function)
            def timed(*arguments, **options):
                with self._timed(label):
                    return function(*arguments, **options)

        setattr(owner, name, timed)

    @contextmanager
    def _timed(self, label: str) -> Iterator[None]:
        inside = self._thread.__dict__.setdefault("inside", [])
        begun = time.perf_counter()
        inside.append(0.0)
        try:
            yield
        finally:
            taken = time.perf_counter() - begun
            self.seconds[label] += taken - inside.pop()
            if inside:
                inside[-1] += taken

    def stop(self) -> dict[str, float]:
        """Take the wrappers off; returns the seconds."""
        for owner, name, function, own in reversed(self._undo):
            setattr(owner, name, function) if own else delattr(owner, name)
        return dict(self.seconds)


def watch_trainer() -> Stopwatch:
    """A stopwatch on the sending side, verl's and the plugin's."""
    from verl.utils import fsdp_utils
    from verl.workers.engine_workers import ActorRolloutRefWorker
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
    from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

    from hybrid_lora_plugin.sync import base_weights, digest, hybrid_weights
    from hybrid_lora_plugin.verl_backend import transport
    from hybrid_lora_plugin.verl_backend.engine import HybridLoraEngine
    from hybrid_lora_plugin.verl_backend.sender import server_adapter

    watch = Stopwatch()
    watch.watch(hybrid_weights, "whole", "gather")
    watch.watch(hybrid_weights, "merge_weight", "merge")
    watch.watch(torch.distributed.tensor.DTensor, "full_tensor", "gather")
    watch.watch(fsdp_utils, "backup_base_model_weights", "verl: back up base weights")
    watch.watch(fsdp_utils, "fsdp_merge_unmerge", "verl: merge in place")
    watch.watch(fsdp_utils, "restore_base_model_weights", "verl: restore base weights")
    watch.watch(digest, "digest_of", "digest")
    watch.watch(base_weights, "digest_of", "digest of the base")
    watch.watch(torch.nn.Module, "state_dict", "state_dict")
    watch.watch(torch.Tensor, "copy_", "copy into the buffer")
    watch.watch(torch.Tensor, "to", "cast")
    watch.watch(BucketedWeightSender, "_init_buffer", "make the buffer")
    watch.watch(BucketedWeightSender, "_cleanup", "drop the buffer")
    watch.watch(zmq.Socket, "recv", "wait for the receiver")
    watch.watch(transport.LimitedSocket, "recv", "wait for the receiver")
    watch.watch(server_adapter, "compare_entries", "compare the report")
    watch.watch(HybridLoraEngine, "get_per_tensor_param", "prepare the stream, the rest")
    # Whole times: between them lie the calls to the server.
    watch.watch(ActorRolloutRefWorker, "update_weights", "(in the worker)")
    watch.watch(ServerAdapter, "update_weights", "(in the server adapter)")
    watch.watch(server_adapter.HybridLoraServerAdapter, "update_weights", "(in the server adapter)")
    watch.watch(server_adapter.HybridLoraServerAdapter, "_send", "(until the report is compared)")
    watch.watch(BucketedWeightSender, "async_send_weights", "(of that, sending)")
    return watch


def watch_engine() -> Stopwatch:
    """A stopwatch on the receiving side, verl's and the plugin's."""
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
    from vllm.model_executor.model_loader import utils as loader

    from hybrid_lora_plugin.sync import base_weights, digest, receiver_merge
    from hybrid_lora_plugin.sync.base_weights import CheckpointWeights
    from hybrid_lora_plugin.verl_backend import transport
    from hybrid_lora_plugin.verl_backend.receiver import vllm_model, worker

    watch = Stopwatch()
    watch.watch(vLLMColocateWorkerExtension, "update_weights_from_ipc", "verl: receive")
    watch.watch(worker.HybridLoraWorkerExtension, "receive_hybrid_weights", "receive, the rest")
    watch.watch(zmq.Socket, "recv", "wait for the trainer")
    watch.watch(transport.LimitedSocket, "recv", "wait for the trainer")
    watch.watch(digest, "digest_of", "digest")
    watch.watch(base_weights, "digest_of", "digest of the base")
    watch.watch(vllm_model.VllmRolloutModel, "_verify_adapter", "compare the adapter")
    watch.watch(vllm_model.VllmRolloutModel, "begin", "look where weights are")
    watch.watch(vllm_model.VllmRolloutModel, "verify", "read back, the rest")
    watch.watch(vllm_model.VllmRolloutModel, "replace_adapter", "replace the adapter")
    watch.watch(receiver_merge, "merge_weight", "merge")
    watch.watch(CheckpointWeights, "__getitem__", "read the base")
    watch.watch(CheckpointWeights, "shape", "shapes of the base")
    watch.watch(vllm_model, "find_live_weight", "find the live weights")
    watch.watch(vllm_model.VllmRolloutModel, "live", "find the live weights")
    watch.watch(torch.Tensor, "clone", "copy")
    watch.watch(torch, "equal", "compare live values")
    watch.watch(worker.Reception, "take", "take a bucket, the rest")
    watch.watch(worker.Reception, "finish", "finish, the rest")
    watch.watch(worker.Reception, "_check_complete", "check completeness")
    watch.watch(transport.LimitedReceiver, "_init_buffer", "map the buffer")
    watch.watch(transport.LimitedReceiver, "_cleanup", "drop the buffer")
    watch.watch(vLLMColocateWorkerExtension, "_update_weights", "vLLM loads")
    watch.watch(loader, "process_weights_after_loading", "process after loading")
    return watch
