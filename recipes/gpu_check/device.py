"""The one device of a check: which GPU, whether it and its machine suffice, and the environment of its processes.

Only the standard library is imported, so that a machine on which nothing is installed gets an answer, too.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recipes.demo.environment import CPU_ENVIRONMENT, cpu_environment

GIB = 2**30
#: seconds after which a driver that does not answer counts as none
_ANSWER_WITHIN = 120
# In a process of its own: one that has looked at a GPU holds some of its memory.
_LOOK = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = [properties.major, properties.minor]
        found["gpus"].append({"name": properties.name, "capability": capability, "free": free, "total": total})
try:  # built against another torch, it is there and cannot be imported
    import flash_attn
except Exception as error:
    found["no_flash_attention"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("\\n" + json.dumps(found))
"""
#: of the CPU platform; a process on a GPU must not inherit them
_OF_THE_CPU = (
    "VERL_PLATFORM",
    "VERL_ENGINE_DEVICE",
    "VLLM_TARGET_DEVICE",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
)
#: variables of a shell that would take a run elsewhere: another Ray cluster, and an allocator that vLLM's sleep mode
#: refuses (expandable segments)
_OF_THE_SHELL = ("RAY_ADDRESS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: what the GPU's processes need, of what those without a GPU need
_SHARED = ("VLLM_NO_USAGE_STATS", "TOKENIZERS_PARALLELISM", "RAY_USAGE_STATS_ENABLED", "WANDB_MODE", "HF_HUB_OFFLINE")


class NothingToCheck(Exception):
    """Nothing can be checked on this machine; the message is one line that says what is missing."""


@dataclass(frozen=True)
class Device:
    """What is checked.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        name: as the driver or the system names it.
        total, free: bytes of its memory.
        capability: CUDA compute capability; None on a CPU.
        visible: value of ``CUDA_VISIBLE_DEVICES`` that shows only this one; None on a CPU.
        no_flash_attention: why flash-attn cannot be used; None where it can.
        notes: lines for the page, e.g. that there are other GPUs.
    """

    kind: str
    name: str
    total: int
    free: int
    capability: tuple[int, int] | None = None
    visible: str | None = None
    no_flash_attention: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needs:
    """The least that a check needs, bytes. Of a GPU's machine estimated from sizes, not measured."""

    device: int
    host: int
    disk: int


#: The model's and its trainer's 5 GB and as much again for logits and vLLM's 0.4 of the device; eight processes of 1 to
#: 2 GB and a sleeping engine's weights; model, checkpoint and export.
NEEDS = {
    "cuda": Needs(device=14 * GIB, host=16 * GIB, disk=10 * GIB),
    "cpu": Needs(device=0, host=6 * GIB, disk=1 * GIB),
}
#: the first whose tensor cores compute in bfloat16, and which flash-attn supports
LEAST_CAPABILITY = (8, 0)


def look_at_gpus(visible: str | None = None) -> dict:
    """What torch sees, from a process of its own.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES`` there; None is that of this process.

    Raises:
        NothingToCheck: torch is not installed, or it does not answer.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_CPU}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK], env=environment, capture_output=True, text=True, timeout=_ANSWER_WITHIN
        )
    except subprocess.TimeoutExpired:
        raise NothingToCheck(f"torch did not say within {_ANSWER_WITHIN} s which GPUs there are") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise NothingToCheck(
            f"torch cannot be used with {sys.executable} ({reason}); install the extra gpu as the README says"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def choose_gpu(found: Mapping, visible: str | None) -> Device:
    """The GPU with the most free memory.

    Args:
        found: what ``look_at_gpus`` returned.
        visible: ``CUDA_VISIBLE_DEVICES`` of this process; its entries are the numbers that torch counts from 0.

    Raises:
        NothingToCheck: there is none.
    """
    gpus = found["gpus"]
    if not gpus:
        cause = (
            f"torch {found['torch']} is built without CUDA; install the extra gpu as the README says"
            if not found["cuda"]
            else f"torch {found['torch']} (CUDA {found['cuda']}) sees none"
            + (f" with CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "")
        )
        raise NothingToCheck(f"no CUDA GPU here: {cause}")
    index = max(range(len(gpus)), key=lambda number: gpus[number]["free"])
    gpu = gpus[index]
    entries = [entry.strip() for entry in visible.split(",")] if visible else []
    notes = []
    if len(gpus) > 1:
        notes.append(f"{len(gpus)} GPUs are visible; one was used, number {index}, which had the most free memory")
    return Device(
        kind="cuda",
        name=gpu["name"],
        total=gpu["total"],
        free=gpu["free"],
        capability=tuple(gpu["capability"]),
        visible=entries[index] if index < len(entries) else str(index),
        no_flash_attention=found.get("no_flash_attention"),
        notes=tuple(notes),
    )


def the_cpu() -> Device:
    """This machine's processor as the device, for tests of the check itself."""
    total, free = host_memory()
    name = platform.processor() or platform.machine()
    return Device("cpu", f"CPU ({name}, {os.cpu_count()} cores)", total, free)


def require_enough(device: Device, needs: Needs, output: Path) -> None:
    """Refuse a machine on which a run would fail for want of something.

    Args:
        device: to be checked.
        needs: the least.
        output: where everything is written; its folder need not exist.

    Raises:
        NothingToCheck: naming what there is, what is needed, and what to do.
    """
    if device.capability is not None and device.capability < LEAST_CAPABILITY:
        raise NothingToCheck(
            f"{device.name} has compute capability {device.capability[0]}.{device.capability[1]}; bfloat16 and "
            f"flash-attn need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more (Ampere)"
        )
    if device.free < needs.device:
        raise NothingToCheck(
            f"{device.name} has {device.free / GIB:.1f} of {device.total / GIB:.1f} GiB free, {needs.device / GIB:.0f} "
            f"GiB are needed; end what else runs there, or choose another with CUDA_VISIBLE_DEVICES"
        )
    _, available = host_memory()
    if available < needs.host:
        raise NothingToCheck(
            f"{available / GIB:.1f} GiB of host memory are available, {needs.host / GIB:.0f} GiB are needed; end "
            f"other programs, or raise the container's limit"
        )
    folder = next(parent for parent in (output, *output.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needs.disk:
        raise NothingToCheck(
            f"{free / GIB:.1f} GiB of disk are free at {folder}, {needs.disk / GIB:.0f} GiB are needed; give "
            f"--output a folder on another disk"
        )


def host_memory(system: Path = Path("/proc/meminfo"), container: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, available) bytes of this machine, or of the container where that is less.

    Args:
        system: the kernel's figures.
        container: the folder of this container's limits (cgroup version 2).
    """
    fields = dict(line.split(":", 1) for line in system.read_text().splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        limit = int((container / "memory.max").read_text())
        statistics = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
        # The page cache of files is given up under pressure.
        used = int((container / "memory.current").read_text()) - int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return total, available
    return min(total, limit), min(available, limit - used)


def environment_of(device: Device) -> dict[str, str]:
    """The environment of every process of the check.

    On a GPU: only this one is visible, no hub is waited for, and what the shell has set for the CPU platform, for
    another Ray cluster or for an allocator that vLLM's sleep mode refuses is left out.
    """
    if device.kind == "cpu":
        return cpu_environment()
    kept = {name: value for name, value in os.environ.items() if name not in (*_OF_THE_CPU, *_OF_THE_SHELL)}
    shared = {name: CPU_ENVIRONMENT[name] for name in _SHARED}
    return {**kept, **shared, "CUDA_VISIBLE_DEVICES": device.visible}


def notes_of(device: Device) -> list[str]:
    """Lines that say what was left out, replaced or not found."""
    if device.kind == "cpu":
        return list(device.notes)
    notes = [*device.notes]
    notes += [f"{name}={os.environ[name]} of the shell was left out" for name in _OF_THE_SHELL if name in os.environ]
    if device.no_flash_attention:
        notes.append(
            f"flash-attn cannot be used ({device.no_flash_attention}): the trainer's attention is sdpa and rows are "
            f"padded; verl's default, and the costs of it, were not checked"
        )
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        notes.append("no C compiler was found, which Triton needs for torch.compile, in the trainer and in vLLM")
    return notes
