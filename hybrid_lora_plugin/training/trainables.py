"""What training changed, and nothing else, as safetensors and JSON beside a checkpoint.

    hybrid_lora/
      trainables.safetensors   fp32: full weights under their plain names; LoRA factors as
                               `<module>.lora_A.weight` [r, d_in] and `<module>.lora_B.weight` [d_out, r]
      trainables.json          base model, rank, alpha, global step
      allocation.json          the allocation the run trained under

The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hybrid_lora_plugin.config import ConfigurationError

FOLDER = "hybrid_lora"
TENSORS, DESCRIPTION, ALLOCATION = "trainables.safetensors", "trainables.json", "allocation.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TrainablesDescription:
    """The JSON beside the tensors: what they belong to."""

    base_model: str
    rank: int
    alpha: int
    global_step: int
    schema_version: int = SCHEMA_VERSION

    @property
    def scaling(self) -> float:
        """alpha / rank, PEFT's LoRA scaling."""
        return self.alpha / self.rank


def save_trainables(
    folder: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    description: TrainablesDescription,
    allocation_json: str,
) -> Path:
    """Write ``<folder>/hybrid_lora``; an older one there is replaced only once the new one is complete.

    Args:
        folder: checkpoint folder of the actor.
        tensors: fp32 CPU tensors by the names above.
        description: what they belong to.
        allocation_json: text of the allocation file to keep beside them.
    """
    target = Path(folder) / FOLDER
    partial = target.with_name(FOLDER + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
    (partial / DESCRIPTION).write_text(json.dumps(asdict(description), indent=2) + "\n")
    (partial / ALLOCATION).write_text(allocation_json)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return target


def load_trainables(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], TrainablesDescription, Path]:
    """Read what ``save_trainables`` wrote.

    Args:
        folder: the ``hybrid_lora`` folder, the actor's checkpoint folder, or a ``global_step_N`` folder.

    Returns:
        The tensors, the description, and the path of the allocation file.

    Raises:
        ConfigurationError: nothing there, or not readable.
    """
    folder = Path(folder)
    tried = [folder, folder / FOLDER, folder / "actor" / FOLDER]
    found = next((path for path in tried if (path / TENSORS).is_file()), None)
    if found is None:
        raise ConfigurationError(
            f"checkpoint: {str(folder)!r} holds no {FOLDER}/{TENSORS}; give a global_step_N folder that a run with "
            "+hybrid_lora=enabled saved"
        )
    try:
        raw = json.loads((found / DESCRIPTION).read_text())
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {raw.get('schema_version')!r}, wanted {SCHEMA_VERSION}")
        description = TrainablesDescription(**{f.name: raw[f.name] for f in fields(TrainablesDescription)})
        return load_file(found / TENSORS), description, found / ALLOCATION
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigurationError(
            f"checkpoint: {str(found)!r} cannot be read ({error}); use another checkpoint"
        ) from error
