"""The allocation on disk, without what people read of it.

    allocation.json              what was decided; all that training needs
    sensitivities.safetensors    everything measured, [T, M] or [M] float64, module names as metadata

It holds no time stamps: the same seed, data and versions give the same bytes. Read strictly: what is not understood is
an error that names the field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid_lora_plugin.allocation import schema_v1
from hybrid_lora_plugin.allocation.measurement_file import write_measurements
from hybrid_lora_plugin.allocation.schema import PROBE_AGAIN, SCHEMA_VERSION, Allocation
from hybrid_lora_plugin.allocation.strict_json import build, read_json
from hybrid_lora_plugin.allocation.validate import validate_allocation
from hybrid_lora_plugin.errors import AllocationError

ALLOCATION_FILE = "allocation.json"


def allocation_text(allocation: Allocation) -> str:
    """The text of ``allocation.json``."""
    payload = {"schema_version": allocation.schema_version} | asdict(allocation)
    for name in ("probe", "stability", "agreement", "trial"):
        if payload[name] is None:
            del payload[name]
    if allocation.probe is not None:
        # What came later than the first files: a probe without it is written as it was then.
        payload["probe"] = _without_none(payload["probe"])
        if allocation.probe.seeds is not None:
            payload["probe"]["seeds"] = [_without_none(seed) for seed in payload["probe"]["seeds"]]
    if allocation.trial is not None:
        trial = payload["trial"] = _without_none(payload["trial"])
        trial["candidates"] = [_without_none(one) for one in trial["candidates"]]
        if "lora" in trial:
            trial["lora"] = _without_none(trial["lora"])
    return json.dumps(payload, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _without_none(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}


def write_allocation(folder: Path, allocation: Allocation, measurements: Mapping[str, Tensor]) -> None:
    """Write both files into a folder that exists.

    Raises:
        AllocationError: the allocation contradicts itself, or the measurements do not fit it.
    """
    validate_allocation(allocation, ALLOCATION_FILE)
    (folder / ALLOCATION_FILE).write_text(allocation_text(allocation), encoding="utf-8")
    write_measurements(folder, allocation, measurements)


def refuse_existing(folder: str | Path) -> None:
    """Raise ``AllocationError`` if an artifact cannot be put at ``folder`` without overwriting something."""
    folder = Path(folder)
    try:
        has_allocation = (folder / ALLOCATION_FILE).exists()
        is_in_use = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise AllocationError(f"output_dir: {folder} cannot be used ({error.strerror}); give another folder") from error
    if has_allocation:
        raise AllocationError(f"output_dir: {folder} holds an allocation already; give another folder or delete it")
    if is_in_use:
        raise AllocationError(f"output_dir: {folder} exists and is not an empty folder; give a new folder")


def load_allocation(path: str | Path, option: str = "hybrid_lora.allocation") -> Allocation:
    """Read and check an allocation.

    Args:
        path: the artifact's folder, or its ``allocation.json``.
        option: that gave the path, for messages.

    Raises:
        AllocationError: missing, not JSON, unknown version, an unknown, missing, mistyped or contradictory field.
    """
    return parse_allocation(file := allocation_file(path), read_json(file, option))


def allocation_file(path: str | Path) -> Path:
    """The ``allocation.json`` that a path stands for: itself, or the one in that folder."""
    path = Path(path)
    return path / ALLOCATION_FILE if path.is_dir() else path


def parse_allocation(file: str | Path, payload: Any) -> Allocation:
    """The checked allocation in the parsed JSON of ``file``, of any schema version; raises as ``load_allocation``."""
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if version == 1 and not isinstance(version, bool):
        payload = schema_v1.upgrade(payload, str(file))
    elif version != SCHEMA_VERSION:
        raise AllocationError(
            f"{file}: schema_version: {version!r}, {SCHEMA_VERSION} or 1 is wanted; {PROBE_AGAIN}, or install the "
            f"version of hybrid_lora_plugin that wrote it"
        )
    allocation = build(Allocation, payload, file=str(file))
    validate_allocation(allocation, str(file))
    return allocation
