"""A trainer and its rollout engine on one device, as ``PPOTrainer._setup`` of verl 0.9.1 pairs them, driven step by
step.

verl's ``ActorRolloutRefWorker`` under FSDP2 and verl's vLLM server; several pairs can live at one time in one Ray, so
that their rounds can take turns. What has to happen inside a pair's processes is a function of this module.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.rollout.stopwatch import Stopwatch, watch_engine, watch_trainer
from tests.support.rollout_harness import compose, start_ray

ROLE = "actor_rollout"


class ColocatedPair:
    """One worker process that trains, one server process that generates, and the sync between them.

    Args:
        number: 0, 1, 2, …, another one for each pair of a process.
        overrides: of ``main_ppo``, complete.
    """

    def __init__(self, number: int, overrides: list[str]):
        start_ray()
        self.number, self._step = number, 0
        # Here: Hydra composes one configuration of a process at a time.
        self._config = compose(overrides)

    def start(self) -> None:
        """Start both processes; those of another pair may start at the same time, in another thread."""
        import ray
        from verl.checkpoint_engine import CheckpointEngineManager
        from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup, ResourcePoolManager
        from verl.single_controller.ray.base import create_colocated_worker_cls
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.engine_workers import ActorRolloutRefWorker
        from verl.workers.rollout.replica import RolloutMode, get_rollout_replica_class

        actor, name = self._config.actor_rollout_ref, f"pair_{self.number}"
        pools = ResourcePoolManager(resource_pool_spec={name: [1]}, mapping={ROLE: name})
        pools.create_resource_pool()
        worker = RayClassWithInitArgs(cls=ray.remote(ActorRolloutRefWorker), config=actor, role=ROLE)
        group = RayWorkerGroup(
            resource_pool=pools.get_resource_pool(ROLE),
            ray_cls_with_init=create_colocated_worker_cls({ROLE: worker}),
            device_name=self._config.trainer.device,
        )
        self.group = group.spawn(prefix_set=[ROLE])[ROLE]
        self.group.init_model()
        self.trainer = self.group.workers[0]
        self.in_trainer(_set_replica, self.number)
        # As init_hybrid does; that one takes replica n's workers from the n-th place of one worker group.
        replica_class = get_rollout_replica_class(actor.rollout.name)
        self.replica = replica_class(self.number, actor.rollout, actor.model, gpus_per_node=1)
        self.replica.rollout_mode, self.replica.workers = RolloutMode.HYBRID, self.group.workers
        asyncio.run(self.replica.launch_servers())
        settings = omega_conf_to_dataclass(actor.rollout.checkpoint_engine)
        settings.backend = "naive"
        self.manager = CheckpointEngineManager(config=settings, actor_wg=self.group, replicas=[self.replica])
        self._processes = {"trainer": self.in_trainer(_process_id), "engine": self.in_engine(_process_id)}

    # -- inside the processes ---------------------------------------------------------------------------------

    def in_trainer(self, function: Callable, *arguments) -> Any:
        """``function(worker, *arguments)`` in the trainer's process."""
        import ray

        return ray.get(self.trainer.__ray_call__.remote(function, *arguments), timeout=600)

    def in_engine(self, function: Callable, *arguments) -> Any:
        """``function(worker, *arguments)``, one of this module's, in the process of vLLM's one worker."""
        import ray

        # Not returned: verl's server forgets what its workers answer.
        with TemporaryDirectory() as folder:
            answer = Path(folder) / "answer"
            call = self.replica._server_handle.collective_rpc.remote(
                _answer_into_file, args=(str(answer), function.__name__, *arguments)
            )
            ray.get(call, timeout=600)
            return pickle.loads(answer.read_bytes())

    # -- what a training step does ----------------------------------------------------------------------------

    def move(self, steps: int = 0) -> None:
        """Change every trained weight by about 1 %, or by so many steps of an optimizer at the paper's rates."""
        self.in_trainer(_move) if not steps else self.in_trainer(_step, steps)

    def sync(self) -> float:
        """One sync; returns the seconds that the trainer's loop waits for it."""
        self._step += 1
        begun = time.perf_counter()
        self.manager.update_weights(self._step)
        return time.perf_counter() - begun

    def generate(self, prompts: list[list[int]], tokens: int) -> float:
        """Generate exactly ``tokens`` for each prompt, all at once; returns generated tokens per second."""
        import ray

        server, begun = self.replica._server_handle, time.perf_counter()
        asked = [
            server.generate.remote(
                prompt, {"max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}, os.urandom(8).hex()
            )
            for prompt in prompts
        ]  # fmt: skip
        count = sum(len(output.token_ids) for output in ray.get(asked, timeout=600))
        if count != tokens * len(prompts):
            raise RuntimeError(f"{count} tokens generated, wanted {tokens * len(prompts)}")
        return count / (time.perf_counter() - begun)

    # -- measurements -----------------------------------------------------------------------------------------

    def sync_memory(self) -> dict[str, dict[str, int]]:
        """One sync; what ``trainer`` and ``engine`` held more at its peak than before, in bytes.

        ``peak`` is the growth of the peak resident size as the kernel kept it. ``anonymous`` (memory proper),
        ``shared`` (the transfer buffer) and ``file`` (the memory-mapped checkpoint) were sampled every millisecond.
        """
        for call in (self.in_trainer, self.in_engine):
            call(_trim)
        before = {name: _status(pid) for name, pid in self._processes.items()}
        most = {name: dict(fields) for name, fields in before.items()}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                for name, pid in self._processes.items():
                    for field, value in _status(pid).items():
                        most[name][field] = max(most[name][field], value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.sync()
        finally:
            done.set()
            watcher.join()
        after = {name: _status(pid) for name, pid in self._processes.items()}
        return {
            name: {"peak": after[name]["VmHWM"] - start["VmRSS"]}
            | {label: most[name][field] - start[field] for label, field in _KINDS.items()}
            for name, start in before.items()
        }

    def sync_profile(self) -> dict[str, dict[str, float]]:
        """One sync; seconds in ``trainer`` and ``engine`` by what was done, less what was done inside it.

        Labels in parentheses are whole times.
        """
        sides = {"trainer": self.in_trainer, "engine": self.in_engine}
        for side, call in sides.items():
            call(_start_profile, side)
        total = self.sync()
        profile = {side: call(_stop_profile) for side, call in sides.items()}
        profile["trainer"]["(the whole sync)"] = total
        return profile


# -- run in the processes: the first argument is Ray's actor, or vLLM's worker ---------------------------------------


def _answer_into_file(worker, path: str, function: str, *arguments) -> None:
    Path(path).write_bytes(pickle.dumps(globals()[function](worker, *arguments)))


def _worker(actor):
    return actor.worker_dict[ROLE]


def _set_replica(actor, number: int) -> None:
    rollout = _worker(actor).rollout
    rollout.zmq_handle = rollout.zmq_handle.replace(f"replica-{rollout.replica_rank}-", f"replica-{number}-")
    rollout.replica_rank = number


@torch.no_grad()
def _move(actor) -> None:
    module = _worker(actor).actor.engine.module
    up = module._moved_up = not getattr(module, "_moved_up", False)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if ".lora_B." in name and not local.any():
                local.normal_(std=0.02)
            local.mul_(1.01 if up else 1 / 1.01)


@torch.no_grad()
def _step(actor, steps: int) -> None:
    """Adam's steps have about the size of the learning rate; here their signs are random."""
    for name, parameter in _worker(actor).actor.engine.module.named_parameters():
        if parameter.requires_grad:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            rate = 2.5e-5 if ".lora_" in name else 1e-6
            for _ in range(steps):
                local.add_(torch.randn_like(local).sign_(), alpha=rate)


def set_hybrid(actor, field: str, value: Any) -> None:
    """Set a field of the run's ``hybrid_lora`` node, e.g. ``sync`` or ``sync_check``, for the syncs to come."""
    setattr(_worker(actor).actor.engine.hybrid, field, value)


def count_sent(actor) -> None:
    """From now on count what goes through verl's sender, which is also the plugin's base class."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    send = BucketedWeightSender.async_send_weights

    async def counted(self, weights):
        from verl.workers.rollout.utils import ensure_async_iterator

        sent = BucketedWeightSender._benchmark_sent = {"bytes": 0, "tensors": 0}

        async def passing():
            async for name, tensor in ensure_async_iterator(weights):
                sent["bytes"] += tensor.nbytes
                sent["tensors"] += 1
                yield name, tensor

        await send(self, passing())

    BucketedWeightSender.async_send_weights = counted


def last_sent(actor) -> dict[str, int]:
    """Bytes and tensors of the last sync, header and manifest included."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    return BucketedWeightSender._benchmark_sent


def last_metrics(actor) -> dict[str, float]:
    """The plugin's own measurements of the last sync."""
    from hybrid_lora_plugin.verl_backend.sender.sync_metrics import last_sync

    return last_sync()


def counts(actor) -> dict[str, int]:
    """Parameters of the model in training: frozen, full, lora."""
    from hybrid_lora_plugin.training.apply import parts_of

    counted = parts_of(_worker(actor).actor.engine.module).counts
    return {"frozen": counted.frozen, "full": counted.full, "lora": counted.lora}


# -- memory ---------------------------------------------------------------------------------------------------

_KINDS = {"anonymous": "RssAnon", "shared": "RssShmem", "file": "RssFile"}


def _process_id(actor) -> int:
    return os.getpid()


def _trim(actor) -> None:
    """Give freed memory back, so that a peak is not hidden in it, and start a new peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(process: int) -> dict[str, int]:
    """Resident sizes of a process in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    wanted = {"VmHWM", "VmRSS", *_KINDS.values()}
    return {
        key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines) if key in wanted
    }


# -- where the time goes --------------------------------------------------------------------------------------

_running: list[Stopwatch] = []


def _start_profile(actor, side: str) -> None:
    _running.append(watch_trainer() if side == "trainer" else watch_engine())


def _stop_profile(actor) -> dict[str, float]:
    return _running.pop().stop()
