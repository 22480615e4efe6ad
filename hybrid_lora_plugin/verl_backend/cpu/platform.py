"""verl's platform for a machine without an accelerator, chosen with ``VERL_PLATFORM=cpu``.

verl 0.9.1 ships platforms for CUDA, ROCm and NPU; ``verl/plugin/platform/platform_base.py`` is the interface.
Ray still schedules verl's workers on a logical ``GPU`` resource, so a run declares as many as it wants ranks:
``+ray_kwargs.ray_init.num_gpus=N``. Importing this module registers the platform and applies the patches it needs.
"""

from __future__ import annotations

import contextlib

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from hybrid_lora_plugin.verl_backend.patches import apply_cpu_patches

apply_cpu_patches()


class CpuDevice(str):
    """``"cpu"`` for ``tensor.to()``, but ``0`` inside ``f"{device_name}:{device_id}"``, which verl also builds.

    An integer 0 would mean CUDA device 0 to ``tensor.to()``.
    """

    def __format__(self, spec: str) -> str:
        return format("0", spec)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The host as verl's device: gloo, no device memory, weight transfer over shared memory."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> CpuDevice:
        return CpuDevice("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict:
        return {"num_gpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self):
        return None
