"""All that a probe measured, in one file: any criterion, normalisation or budget can be read off it later.

Column m of every tensor is module m of the allocation beside it; the names are kept as metadata, so that a file
put beside another allocation is noticed. No measurement, no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.errors import AllocationError

MEASUREMENTS_FILE = "sensitivities.safetensors"


def check_measurements(measurements: Mapping[str, Tensor], modules: int) -> None:
    """Raise ``AllocationError`` unless every tensor is ``[T, M]`` or ``[M]`` with M = ``modules``."""
    for name, tensor in measurements.items():
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != modules:
            raise AllocationError(
                f"{name}: shape {list(tensor.shape)}; give [T, {modules}] or [{modules}], a column a module"
            )


def write_measurements(folder: Path, allocation: Allocation, measurements: Mapping[str, Tensor]) -> None:
    """Write the measurements as float64, or nothing when there are none; equal tensors give equal bytes.

    Raises:
        AllocationError: as ``check_measurements``.
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_measurements(measurements, len(allocation.modules))
    if not measurements:
        return
    # Cloned: safetensors refuses tensors that share memory, and rows of one tensor do.
    tensors = {
        name: measurements[name].detach().to("cpu", torch.float64).contiguous().clone() for name in sorted(measurements)
    }
    # One metadata key only: the order of several is not fixed, and with it the bytes.
    names = json.dumps([module.name for module in allocation.modules])
    try:
        save_file(tensors, folder / MEASUREMENTS_FILE, metadata={"modules": names})
    except SafetensorError as error:
        # A full disk, which the library tells in an error of its own.
        raise OSError(str(error)) from error


def load_measurements(folder: str | Path, allocation: Allocation) -> dict[str, Tensor]:
    """The measurements of an artifact by name, each ``[T, M]`` or ``[M]``, in the order of ``allocation.modules``.

    Args:
        folder: the artifact's folder.
        allocation: what ``load_allocation`` read there.

    Returns:
        The tensors; none when the artifact has no such file, as after a criterion without a probe.

    Raises:
        AllocationError: the file is unreadable or about other modules.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / MEASUREMENTS_FILE
    if not file.exists():
        return {}
    way_out = "probe again with hybrid-lora-probe"
    try:
        with safe_open(file, framework="pt") as stored:
            names = json.loads((stored.metadata() or {}).get("modules", "[]"))
            tensors = {name: stored.get_tensor(name) for name in sorted(stored.keys())}
    except (OSError, SafetensorError, ValueError) as error:
        raise AllocationError(f"{file}: cannot be read ({error}); {way_out}") from error
    if names != [module.name for module in allocation.modules]:
        raise AllocationError(f"{file}: does not list the modules of allocation.json; {way_out}")
    check_measurements(tensors, len(names))
    return tensors
