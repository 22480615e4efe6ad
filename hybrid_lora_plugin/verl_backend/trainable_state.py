"""What a run resumes from under ``hybrid_lora.save=trainable``: whole tensors of what trains, for any number of ranks.

    hybrid_lora/
      trainables.safetensors   the trained weights, as in every checkpoint (training/checkpoint.py)
      optimizer.safetensors    the optimizer's state as `<name of the state>/<name of the weight>`
      resume.json              parameter groups, schedule, number of ranks, digest of the base model

The frozen weights are those of the base model, which the run has loaded; its digest must be the one recorded. Only
safetensors and JSON are read. Random states are in verl's ``extra_state`` of each rank, which a run of as many ranks
reads as always.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import distribute_tensor

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.training.checkpoint import TENSORS
from hybrid_lora_plugin.training.dtensor import local_tensor, whole

STATE, OPTIMIZER = "resume.json", "optimizer.safetensors"
SCHEMA_VERSION = 1


def is_trainable(folder: Path) -> bool:
    """Whether the ``hybrid_lora`` folder of a checkpoint is all there is to resume from."""
    return (folder / STATE).is_file()


def read_state(folder: Path) -> dict[str, Any] | None:
    """The JSON of such a checkpoint: ``ranks``, ``base``, ``schedule``, ``groups``, ``tensors``; None of another one.

    Raises:
        ConfigurationError: it cannot be understood, or a file beside it is cut.
    """
    if not is_trainable(folder):
        return None
    try:
        state = json.loads((folder / STATE).read_text())
        if state["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {state['schema_version']!r}, wanted {SCHEMA_VERSION}")
        for name in (TENSORS, OPTIMIZER):
            # Opening compares the file's size with what its header says.
            with safe_open(folder / name, framework="pt") as file:
                if name == OPTIMIZER and set(file.keys()) != set(state["tensors"]):
                    raise ValueError(f"{name} does not hold what {STATE} says")
        return {key: state[key] for key in ("ranks", "base", "schedule", "groups", "tensors")}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigurationError(
            f"checkpoint: {str(folder)!r} cannot be read ({error}); resume from another step",
            see="checkpoint-cannot-be-read",
        ) from error


def gathered_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[int, str], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """On rank 0 the optimizer's state, whole and on the host; elsewhere nothing. Every rank must call it.

    Args:
        optimizer: of FSDP2's parameters.
        names: name on the wire by ``id`` of a parameter.
        ranks: of the trainer.
    """
    found = {}
    for parameter in _parameters(optimizer):
        for key, value in sorted(optimizer.state[parameter].items()):
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                value = torch.tensor(value, dtype=torch.float64)
            gathered = whole(value, ranks.device)
            if ranks.first:
                found[f"{key}/{names[id(parameter)]}"] = gathered.cpu().contiguous()
    return found


def save_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    schedule: dict,
    base: str,
    ranks: int,
) -> None:
    """Write both files into the ``hybrid_lora`` folder of a checkpoint; on rank 0.

    Args:
        folder: exists.
        optimizer: its groups are recorded, but for their parameters.
        tensors: from ``gathered_optimizer``.
        schedule: the scheduler's ``state_dict()``.
        base: digest of the base model.
        ranks: how many train.
    """
    save_file(tensors, folder / OPTIMIZER, metadata={"format": "pt"})
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {
        "schema_version": SCHEMA_VERSION,
        "ranks": ranks,
        "base": base,
        "schedule": schedule,
        "groups": groups,
        "tensors": sorted(tensors),
    }
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n")


@torch.no_grad()
def load_weights(folder: Path, named: list[tuple[str, torch.Tensor]], ranks: Ranks) -> None:
    """Put the trained weights into parameters; rank 0 reads, every rank must call it.

    Args:
        folder: the ``hybrid_lora`` folder, as rank 0 sees it.
        named: (name on the wire, parameter), in one order on all ranks.
        ranks: of the trainer.

    Raises:
        ConfigurationError: on every rank, where one is missing or of another shape.
    """
    with _Reader(folder / TENSORS, ranks) as reader:
        for name, parameter in named:
            local_tensor(parameter).copy_(reader.part(name, parameter, parameter.dtype))


@torch.no_grad()
def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, state: dict[str, Any], names: dict[int, str], ranks: Ranks
) -> None:
    """Put groups and state into an optimizer that has taken no step; rank 0 reads, every rank must call it.

    Args:
        folder: the ``hybrid_lora`` folder, as rank 0 sees it.
        optimizer: of FSDP2's parameters.
        state: from ``read_state`` on rank 0, the same on every rank.
        names: name on the wire by ``id`` of a parameter.
        ranks: of the trainer.

    Raises:
        ConfigurationError: on every rank, where it is of another optimizer.
    """
    for group, kept in zip(optimizer.param_groups, state["groups"], strict=True):
        for key, value in kept.items():
            # JSON knows no tuples.
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    keys: dict[str, list[str]] = {}
    for full in state["tensors"]:
        key, _, name = full.partition("/")
        keys.setdefault(name, []).append(key)
    with _Reader(folder / OPTIMIZER, ranks) as reader:
        for parameter in _parameters(optimizer):
            name = names[id(parameter)]
            own = optimizer.state[parameter]
            for key in keys.get(name, []):
                own[key] = reader.like(f"{key}/{name}", parameter)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


class _Reader:
    """Tensors of a file that rank 0 reads, each rank its part of them."""

    def __init__(self, file: Path, ranks: Ranks) -> None:
        self._path, self._ranks, self._open = file, ranks, None

    def __enter__(self) -> _Reader:
        if self._ranks.first:
            self._open = safe_open(self._path, framework="pt")
        return self

    def __exit__(self, *_) -> None:
        self._open = None

    def _described(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, on every rank."""

        def look() -> tuple[tuple[int, ...], torch.dtype]:
            try:
                self._read = self._open.get_tensor(name)
            except SafetensorError as error:
                raise ConfigurationError(
                    f"checkpoint: {str(self._path)!r} cannot be read (it has no {name!r}); resume from another step",
                    see="checkpoint-cannot-be-read",
                ) from error
            return tuple(self._read.shape), self._read.dtype

        return self._ranks.from_first(look)

    def part(self, name: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """This rank's part of a tensor that is sharded as ``parameter`` is, where that is."""
        return local_tensor(self._sharded(name, parameter, dtype)).to(local_tensor(parameter).device)

    def like(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """A tensor of a parameter's state: sharded as it is, or a single number as it was."""
        shape, dtype = self._described(name)
        if shape == tuple(parameter.shape):
            return self._distributed(shape, dtype, parameter)
        value = self._read if self._ranks.first else torch.empty(shape, dtype=dtype)
        box = [value]
        if self._ranks.size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _sharded(self, name: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        shape, _ = self._described(name)
        if shape != tuple(parameter.shape):
            raise ConfigurationError(
                f"checkpoint: {name!r} in {str(self._path)!r} is {list(shape)} and {list(parameter.shape)} here; give "
                "the model and the rank that the run started with",
                see="checkpoint-of-another-setting",
            )
        return self._distributed(shape, dtype, parameter)

    def _distributed(self, shape: tuple[int, ...], dtype: torch.dtype, parameter: torch.Tensor) -> torch.Tensor:
        device = self._ranks.device
        full = self._read.to(device, dtype) if self._ranks.first else torch.empty(shape, dtype=dtype, device=device)
        if not hasattr(parameter, "device_mesh"):
            return full
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
