"""Versions, attention kernels and devices: what a user is asked for first when something does not work."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from typing import Any

from hybrid_lora_plugin.verl_backend.contracts import RAN_WITH, READ_IN
from hybrid_lora_plugin.verl_backend.contracts.by_source import Sources
from hybrid_lora_plugin.verl_backend.contracts.versions import DISTRIBUTIONS

#: what the plugin's tests run with, besides the libraries of the table
TESTED_PYTHON = "3.11"
#: kernel by the name that ``attn_implementation`` has for it, its distributions, and who uses it
KERNELS = (
    ("sdpa", ("torch",), "trainer: torch's own, on every device"),
    ("flash_attention_2", ("flash-attn",), "trainer: verl's default"),
    ("flash_attention_3", ("flash-attn-3",), "trainer: Hopper GPUs"),
    ("flashinfer", ("flashinfer-python",), "rollout: vLLM takes it where it is there"),
)
#: what a process needs in which nothing but the CPU computes; what the user has set wins
CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    # verl's FSDP engines are registered for "cuda" and "npu" only.
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def versions(sources: Sources) -> list[dict[str, Any]]:
    """Each library's distribution and version (None: not there).

    Beside them those that all tests run with, that runs were tried with as well, and that were only read.
    """
    read = _pinned_for_gpus()
    python = platform.python_version()
    found: list[dict[str, Any]] = [
        {"name": "python", "version": python, "tested": TESTED_PYTHON, "ran": None, "read": None}
    ]
    for library, text in READ_IN.items():
        known = sources.distribution(library)
        name = known.name if known is not None else DISTRIBUTIONS.get(library, (library,))[0]
        version = known.version if known is not None else None
        if version is None and sources.has(library):
            version = "unknown"
        known_in = {"tested": text.split()[-1], "ran": RAN_WITH.get(library), "read": read.get(library)}
        found.append({"name": name, "version": version} | known_in)
    return found


def _pinned_for_gpus() -> dict[str, str]:
    """Versions that the extra ``gpu`` pins, which have been read and not run by the tests (docs/verl-notes.md)."""
    try:
        lines = importlib.metadata.requires("hybrid-lora-plugin") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    pins = (re.match(r"([\w-]+)==([\w.]+) *; *extra == .gpu.", line) for line in lines)
    return {pin[1]: pin[2] for pin in pins if pin}


def attention_kernels() -> list[dict[str, Any]]:
    """Each attention kernel, the version of what brings it (None: not installed) and who uses it."""
    return [
        {"name": name, "version": _first_version(distributions), "used_by": used_by}
        for name, distributions, used_by in KERNELS
    ]


def _first_version(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def devices() -> list[dict[str, Any]]:
    """The accelerators that torch sees, or the host where it sees none; imports torch."""
    import torch

    found = []
    for kind in ("cuda", "npu", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            for index in range(module.device_count()):
                properties = module.get_device_properties(index)
                found.append({"kind": kind, "name": module.get_device_name(index), "bytes": properties.total_memory})
    host = {"kind": "cpu", "name": platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return found or [host]


def unusable_kernels(kernels: list[dict[str, Any]]) -> dict[str, str]:
    """Why a kernel that is installed cannot be imported, by name: built against another torch, for one."""
    modules = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    said = {}
    for kernel in kernels:
        if kernel["version"] is not None and kernel["name"] in modules:
            try:
                importlib.import_module(modules[kernel["name"]])
            except Exception as error:
                said[kernel["name"]] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return said
