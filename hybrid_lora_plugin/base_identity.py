"""What tells the weights of one checkpoint from another's, so that a base model is known again where it is used.

A path says nothing: its content may be overwritten, moved, or of another seed. So samples of every tensor's values are
digested, whatever the files are called, how they are split, and how wide the numbers are stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hybrid_lora_plugin.checkpoint_tensors import StoredTensor, stored_tensors

#: elements up to which a tensor is read whole; of a larger one that many, in blocks spread evenly over it
_WHOLE = 1 << 18
_BLOCKS, _BLOCK = 256, 1 << 10
_AS_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def weight_digests(model: str | Path) -> dict[str, str] | None:
    """A digest of sampled values of every tensor of a checkpoint.

    A quarter of a million values of each tensor are read. Whatever trains a weight changes all of it, so another
    training, another seed or a merged adapter shows; an edit of a few rows of a large matrix can be missed.

    Args:
        model: folder of a checkpoint, or a name on the Hugging Face hub whose files are on this machine.

    Returns:
        16 hexadecimal digits by name; equal for float32, float16 and bfloat16 copies of the same numbers. None where
        the weights are not in safetensors, or not on this machine.

    Raises:
        ConfigurationError: a file is not readable as safetensors.
    """
    folder = _folder(model)
    stored = {} if folder is None else stored_tensors(folder)
    return {name: _digest(stored[name]) for name in sorted(stored)} or None


def weights_identity(model: str | Path) -> str | None:
    """One digest of all of ``weight_digests``, 64 hexadecimal digits; None where those are not known."""
    digests = weight_digests(model)
    return None if digests is None else hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def first_difference(recorded: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """What tells two checkpoints apart, in words; None where they hold the same weights.

    A tensor in one of them alone is a tied weight that some libraries write twice: whether one is missing is asked
    where a model is loaded.

    Args:
        recorded, found: from ``weight_digests``.
    """
    common = recorded.keys() & found.keys()
    if not common:
        return f"{min(recorded)} is not in it"
    other = sorted(name for name in common if recorded[name] != found[name])
    return f"{other[0]} has other values, as have {len(other)} of {len(common)} tensors" if other else None


def _folder(model: str | Path) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except Exception:
        # A name has many ways not to be on this machine.
        return None


def _digest(tensor: StoredTensor) -> str:
    digest = hashlib.sha256(str(tensor.shape).encode())
    dtype = _AS_STORED.get(tensor.dtype)
    if dtype is None:
        digest.update(tensor.dtype.encode())
        dtype = np.dtype("u1")
    count = (tensor.end - tensor.begin) // dtype.itemsize
    with tensor.file.open("rb") as stream:
        for start, length in _parts(count):
            stream.seek(tensor.begin + start * dtype.itemsize)
            values = np.frombuffer(stream.read(length * dtype.itemsize), dtype)
            if tensor.dtype == "BF16":
                # bfloat16 is the upper half of float32.
                values = (values.astype("<u4") << 16).view("<f4")
            elif tensor.dtype == "F16":
                values = values.astype("<f4")
            digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def _parts(count: int) -> list[tuple[int, int]]:
    """(first element, number of elements) of each block that is read."""
    if count <= _WHOLE:
        return [(0, count)]
    return [(block * (count - _BLOCK) // (_BLOCKS - 1), _BLOCK) for block in range(_BLOCKS)]
