"""The original weights: read from a safetensors checkpoint, and proven once to be those the other side started from.

Modes that do not send every weight rely on what the rollout engine loaded by itself: the weights that never train,
and the bases it merges into. At the first sync the trainer sends one digest for each; the receiver digests its
checkpoint.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.digest import digest_of, digest_soon

STORAGE = ("memory_map", "pinned")
#: tensors that wait on the host for their digest while the next are gathered or read
_AHEAD = 4
#: elements that are looked at together
_CHUNK = 1 << 20


def checkpoint_folder(model: str, revision: str | None = None) -> Path:
    """Folder of a model's files on this machine.

    Args:
        model: a folder, or a name on the Hugging Face hub whose files have been downloaded.
        revision: of the name.

    Raises:
        WeightSyncError: neither is there.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:
        raise WeightSyncError(
            f"{model}: neither a folder nor a model in the local Hugging Face cache; give a folder as "
            "actor_rollout_ref.model.path, or hybrid_lora.sync=merge",
            see="no-safetensors-checkpoint",
        ) from error


def stored_dtypes(model: str) -> set[str]:
    """Types of a checkpoint's tensors as safetensors names them, e.g. {"BF16"}; empty without safetensors files.

    Args:
        model: as for `checkpoint_folder`.
    """
    try:
        return CheckpointWeights(checkpoint_folder(model)).dtypes()
    except WeightSyncError:
        return set()


class CheckpointWeights:
    """Tensors of a checkpoint by plain name.

    Args:
        folder: a Hugging Face folder with ``model.safetensors`` or an index of shards.
        storage: ``memory_map`` reads from the file each time, so the operating system's cache holds one copy for all
            processes of a machine; ``pinned`` keeps what was asked for once in page-locked memory, for the fastest
            copies to an accelerator.

    Raises:
        WeightSyncError: the folder has no safetensors weights.
    """

    def __init__(self, folder: str | Path, storage: str = "memory_map"):
        self.folder = Path(folder)
        self.storage = storage
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.is_file():
            self._file_of = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise WeightSyncError(
                f"{self.folder}: no safetensors weights there to merge into or to compare with; save the model as "
                "safetensors, or give hybrid_lora.sync=merge",
                see="no-safetensors-checkpoint",
            )
        self._open: dict[str, object] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._file_of)

    def _file(self, name: str):
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt", device="cpu")
        return self._open[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor ``name``, from the file's header; KeyError where there is none."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtypes(self) -> set[str]:
        """Types of all tensors as safetensors names them, e.g. {"BF16"}, from the files' headers."""
        return {self._file(name).get_slice(name).get_dtype() for name in self}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``, which is looked at once and not kept. KeyError where there is none."""
        return self._file(name).get_tensor(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The whole tensor ``name`` to merge into, on the host; not to be written to. KeyError where there is none."""
        if name in self._kept:
            return self._kept[name]
        tensor = self.read(name)
        if self.storage == "pinned":
            self._kept[name] = tensor.pin_memory() if torch.cuda.is_available() else tensor.clone()
            return self._kept[name]
        return tensor


def value_digest(tensor: torch.Tensor) -> str:
    """A digest of values rather than bits: equal for a bf16 tensor and for the same numbers held in fp32."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return digest_of(tensor)
    values = tensor.float().contiguous()
    bits = values.view(torch.int32)
    # bf16 is the upper half of fp32. Most fp32 weights show in their first elements that they need the lower one.
    if any((part & 0xFFFF).any() for part in bits.view(-1).split(_CHUNK)):
        return digest_of(values)
    return digest_of((bits >> 16).to(torch.int16))


def value_digests(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """``value_digest`` by name, by other threads while the next tensor is drawn."""
    found: dict[str, str] = {}
    waiting: deque[tuple[str, Callable[[], str]]] = deque()

    def settle(most: int) -> None:
        while len(waiting) > most:
            name, digest = waiting.popleft()
            found[name] = digest()

    for name, tensor in weights:
        waiting.append((name, digest_soon(tensor.detach().cpu(), value_digest)))
        del tensor
        settle(_AHEAD)
    settle(0)
    return found


def base_digests(
    weights: Iterable[tuple[str, torch.Tensor]], group: torch.distributed.ProcessGroup | None = None
) -> dict[str, str]:
    """``value_digest`` of each floating tensor; the ranks of ``group`` share the work, and each has all of it.

    Args:
        weights: (name, whole tensor); with shards every rank must draw them.
        group: the ranks that hold one copy of the weights between them, so that each gathers the same tensors; None
            where each holds a whole one.
    """
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    order: list[str] = []

    def own() -> Iterator[tuple[str, torch.Tensor]]:
        elements = [0] * ranks
        for name, tensor in weights:
            if tensor.is_floating_point():
                order.append(name)
                whose = elements.index(min(elements))
                elements[whose] += tensor.numel()
                if whose == rank:
                    yield name, tensor

    digests = value_digests(own())
    if ranks > 1:
        everyone: list[dict[str, str]] = [{}] * ranks
        torch.distributed.all_gather_object(everyone, digests, group=group)
        digests = {name: digest for part in everyone for name, digest in part.items()}
    return {name: digests[name] for name in order}


def check_base(wanted: dict[str, str], original: Callable[[str], torch.Tensor], where: str) -> None:
    """Compare the trainer's digests with the receiver's checkpoint.

    Args:
        wanted: digest by plain name, from the trainer.
        original: the checkpoint's tensor of a name; raises KeyError where it has none.
        where: the checkpoint, for the message.

    Raises:
        WeightSyncError: naming the first weight that differs or is not there.
    """

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for name in wanted:
            try:
                tensor = original(name)
            except KeyError:
                raise WeightSyncError(
                    f"{name}: the trainer has this weight and the checkpoint of the rollout engine, {where}, has not; "
                    "give hybrid_lora.sync=merge, which needs no checkpoint there",
                    see="checkpoints-of-trainer-and-engine-differ",
                ) from None
            yield name, tensor

    for name, digest in value_digests(read()).items():
        if digest != wanted[name]:
            raise WeightSyncError(
                f"{name}: the rollout engine's checkpoint {where} holds other values than the trainer started from; "
                "start both from one checkpoint",
                see="checkpoints-of-trainer-and-engine-differ",
            )
