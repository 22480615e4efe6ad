"""What a run changed, as the difference to its base model: a folder that is small and gives the trained bits back.

    delta.safetensors   LoRA factors as in a checkpoint, fp32; of each weight and bias of a full module the packed
                        difference of its bits to the base model's, uint8 (``bit_difference``)
    delta.json          the base model and a digest of each of its weights; type of the full modules' weights
    trainables.json     the checkpoint's description
    allocation.json     the allocation the run trained under
    base_weights.json   the checkpoint's digests of the base model, which tell another one before any is read whole

A delta in the rollout engine's type holds the full modules' weights as the engine got them and gives those alone; one
in float32 holds what was trained, and every export can be made from it as from the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.names import wire_factor
from hybrid_lora_plugin.training.base_model import BaseModel
from hybrid_lora_plugin.training.bit_difference import pack, unpack
from hybrid_lora_plugin.training.checkpoint import ALLOCATION, DESCRIPTION, load_description
from hybrid_lora_plugin.training.recorded_base import BASE_WEIGHTS
from hybrid_lora_plugin.training.tensor_file import TensorEntry, TensorFile
from hybrid_lora_plugin.training.trained import TOKENIZER_CONFIG, Trained

DELTA_TENSORS, DELTA = "delta.safetensors", "delta.json"
SCHEMA_VERSION = 1
_DTYPES = ("float32", "bfloat16", "float16")


def weight_digest(weight: torch.Tensor) -> str:
    """A digest of a weight's type, shape and bits; 32 hexadecimal digits."""
    digest = xxhash.xxh3_128(f"{weight.dtype} {tuple(weight.shape)}".encode())
    if weight.numel():
        digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_delta(
    folder: Path,
    trained: Trained,
    base: BaseModel,
    dtype: torch.dtype,
    full: Callable[[str, torch.Tensor], torch.Tensor],
    written: Callable[[str], None],
) -> None:
    """Write the files of a delta.

    Args:
        folder: exists.
        trained: what the run trained.
        base: the model it was trained from; all of it is read.
        dtype: of the full modules' weights.
        full: the weight of a full module in ``dtype``, of its name and its original.
        written: is told each weight of the base model that is done with.

    Raises:
        OSError: something cannot be written.
    """
    names, digests = set(trained.full_weights(base)), {}
    entries: dict[str, TensorEntry] = {}
    parts = folder / f"{DELTA_TENSORS}.parts"
    # The size of a difference is known when it is packed, and the header comes first.
    with parts.open("w+b") as packed:
        for name in base.entries:
            original = base.read(name)
            digests[name] = weight_digest(original)
            if name in names:
                data = pack(full(name, original), original.to(dtype))
                packed.write(data)
                entries[name] = TensorEntry(torch.uint8, (len(data),))
            written(name)
        factors = {}
        for module in trained.allocation.lora_names:
            rows, columns = base.entries[f"{module}.weight"].shape
            for kind, shape in (("A", (trained.description.rank, columns)), ("B", (rows, trained.description.rank))):
                factors[wire_factor(module, kind)] = TensorEntry(torch.float32, shape)
        file = TensorFile(folder / DELTA_TENSORS, factors | entries)
        packed.seek(0)
        for name, entry in entries.items():
            file.add(name, torch.frombuffer(bytearray(packed.read(entry.bytes)), dtype=torch.uint8))
    parts.unlink()
    for module in trained.allocation.lora_names:
        for kind, factor in zip("AB", trained.factors(module), strict=True):
            file.add(wire_factor(module, kind), factor)
    for name in (DESCRIPTION, ALLOCATION, BASE_WEIGHTS):
        if name != BASE_WEIGHTS or (trained.folder / name).exists():
            shutil.copyfile(trained.folder / name, folder / name)
    content = {
        "schema_version": SCHEMA_VERSION,
        "base_model": base.location,
        "dtype": str(dtype).removeprefix("torch."),
        "base_weights": digests,
    }
    (folder / DELTA).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Delta(Trained):
    """The trained tensors of a delta; of full modules only with the base model's weights."""

    kind = "delta"

    def __init__(self, folder: str | os.PathLike) -> None:
        folder = Path(folder)
        if not (folder / DELTA_TENSORS).is_file():
            raise ConfigurationError(
                f"delta: {str(folder)!r} holds no {DELTA_TENSORS}; give a folder that format=delta wrote",
                see="delta-cannot-be-applied",
            )
        content = _read_content(folder / DELTA)
        self.dtype, self._base = getattr(torch, content["dtype"]), content["base_model"]
        self._digests: dict[str, str] = content["base_weights"]
        self.description = load_description(folder)
        self._open(folder, folder / DELTA_TENSORS)
        self.tokenizer = folder if (folder / TOKENIZER_CONFIG).is_file() else None

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        # A packed difference has a size of its own, and is looked at when it is unpacked.
        return len(self._shapes[name]) == 1 if name in self._digests else super()._fits(name, shape)

    def full(self, name: str, original: torch.Tensor) -> torch.Tensor:
        try:
            return unpack(self._read(name).numpy().tobytes(), original.to(self.dtype))
        except ValueError as error:
            raise self._cannot_be_read(f"{name}: {error}") from error

    def check_base(self, name: str, weight: torch.Tensor) -> None:
        if self._digests.get(name) != weight_digest(weight):
            raise ConfigurationError(
                f"base: {name} has other values than in the model that the delta was made against, which was "
                f"{self._base!r} there; give base=PATH of that model",
                see="delta-cannot-be-applied",
            )


def _read_content(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {content['schema_version']!r}, wanted {SCHEMA_VERSION}")
        if content["dtype"] not in _DTYPES:
            raise ValueError(f"dtype is {content['dtype']!r}, wanted one of {', '.join(_DTYPES)}")
        if not all(isinstance(one, str) for one in (content["base_model"], *content["base_weights"].values())):
            raise ValueError("base_model and base_weights must be texts")
        return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"delta: {str(file)!r} cannot be read ({error}); export the delta again",
            see="delta-cannot-be-applied",
        ) from error
