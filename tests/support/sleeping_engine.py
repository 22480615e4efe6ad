"""vLLM's sleep mode on the CPU, where vLLM has none: a real engine that loses and keeps what a sleep does on a GPU.

vLLM's own code decides what a level is: ``Worker.sleep`` and ``wake_up`` of its GPU worker and the backend behind them
run as they are (vLLM 0.28 ``v1/worker/gpu_worker.py``, ``device_allocator/sleep_mode_backend.py``; 0.24 does the same
in one place). Under them lies ``HostMemory`` instead of ``CuMemAllocator``. That one unmaps memory and keeps its
addresses; what it was told to offload it copies to the host first and back when it wakes, and everything else comes
back with whatever the pages then hold. Here the values are overwritten at both ends, so that neither reading nor
writing between sleep and wake-up does any good.

It reaches every process of vLLM by its own way, an entry point of the group ``vllm.general_plugins``, from a folder on
``PYTHONPATH`` that ``plugin_folder`` makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

#: settings of verl under which its rollout engines sleep
SETTINGS = (
    "actor_rollout_ref.rollout.enable_sleep_mode=true",
    "actor_rollout_ref.rollout.free_cache_engine=true",
    # The gigabyte that vLLM reserves on a CPU takes no memory until all of it is overwritten.
    "++actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override=64",
)


def plugin_folder(folder: Path) -> Path:
    """Write the entry point into ``folder`` and return it, for ``PYTHONPATH``; the repository has to be there, too."""
    record = folder / "sleeping_engine-0.dist-info"
    record.mkdir(parents=True, exist_ok=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sleeping-engine\nVersion: 0\n")
    (record / "entry_points.txt").write_text(f"[vllm.general_plugins]\nsleeping_engine = {__name__}:install\n")
    return folder


def install() -> None:
    """Give vLLM's CPU worker the sleep of its GPU worker; vLLM calls this in each of its processes."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    def sleep(self, level: int = 1) -> None:
        with _on_the_host(self):
            Worker.sleep(self, level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        with _on_the_host(self):
            Worker.wake_up(self, tags)

    CPUWorker.sleep, CPUWorker.wake_up = sleep, wake_up
    CpuPlatform.is_sleep_mode_available = lambda self: True


@contextlib.contextmanager
def _on_the_host(worker) -> Iterator[None]:
    """What the GPU worker's code asks an accelerator for comes from the host."""
    if not hasattr(worker, "host_memory"):
        worker.host_memory = HostMemory(worker.model_runner)
    with (
        mock.patch("vllm.device_allocator.get_mem_allocator_instance", lambda: worker.host_memory),
        mock.patch("torch.accelerator.synchronize"),
        mock.patch("torch.accelerator.get_memory_info", lambda: (0, 0)),
        torch.inference_mode(),
    ):
        yield


class HostMemory:
    """``CuMemAllocator`` for one worker of vLLM, whose tensors are on the host.

    Args:
        model_runner: has the model and the key-value caches; vLLM allocates the first under the tag ``weights`` and the
            others under ``kv_cache``.
    """

    def __init__(self, model_runner):
        self._runner = model_runner
        self._generator = torch.Generator().manual_seed(0)
        #: by tag that is asleep, its tensors, and their values where anyone may want them
        self._asleep: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        #: tags that the last sleep was told to offload; None before it
        self.offloaded: tuple[str, ...] | None = None
        #: what the last sleep discarded, which only a test can bring back
        self._discarded: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        if self._asleep:
            raise RuntimeError(f"asleep already: {sorted(self._asleep)}")
        self.offloaded, self._discarded = offload_tags, []
        self._asleep["weights"] = [(tensor, tensor.clone()) for tensor in self._weights()]
        self._asleep["kv_cache"] = [(cache, None) for cache in self._runner.kv_caches if torch.is_tensor(cache)]
        for tag in self._asleep:
            self._overwrite(tag)

    def wake_up(self, tags: list[str] | None = None) -> None:
        for tag in [tag for tag in self._asleep if tags is None or tag in tags]:
            self._overwrite(tag)
            held = self._asleep.pop(tag)
            if tag in self.offloaded:
                for tensor, values in held:
                    tensor.copy_(values)
            elif tag == "weights":
                self._discarded = held

    @torch.inference_mode()
    def bring_back(self) -> None:
        """Undo the last sleep, as far as it discarded weights."""
        for tensor, values in self._discarded:
            tensor.copy_(values)

    def _overwrite(self, tag: str) -> None:
        for tensor, _ in self._asleep[tag]:
            if tensor.is_floating_point():
                # Finite, as what a trainer leaves: kernels multiply masked places of a cache by zero.
                tensor.uniform_(-8, 8, generator=self._generator)
            else:
                tensor.random_(generator=self._generator)

    def _weights(self) -> list[torch.Tensor]:
        """Parameters, buffers, and what else modules hold, slots of adapters among it; each storage once."""
        found: dict[int, torch.Tensor] = {}
        for module in self._runner.model.modules():
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for value in vars(module).values():
                held += [t for t in (value if isinstance(value, (tuple, list)) else [value]) if torch.is_tensor(t)]
            for tensor in held:
                if tensor.numel():
                    found.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return list(found.values())


# -- run in vLLM's workers ------------------------------------------------------------------------------------------


def offloaded(worker) -> tuple[str, ...] | None:
    """Tags that the worker's last sleep kept; None where it never slept."""
    memory = worker.worker.__dict__.get("host_memory")
    return memory and memory.offloaded


def bring_back(worker) -> None:
    """Give the worker what its last sleep discarded."""
    worker.worker.host_memory.bring_back()
