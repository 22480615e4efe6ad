"""What a run trained, one tensor at a time: from a checkpoint, or from a delta that was exported from one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.storage import load_allocation
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.names import wire_factor
from hybrid_lora_plugin.training.base_model import BaseModel
from hybrid_lora_plugin.training.checkpoint import (
    ALLOCATION,
    TENSORS,
    CheckpointDescription,
    load_moves,
    load_trained,
)
from hybrid_lora_plugin.training.tensor_file import read_tensor, shapes_in
from hybrid_lora_plugin.training.zeroth_order.move_log import MoveLog

#: where verl puts configuration and tokenizer of a run, beside the ``hybrid_lora`` folder
_RUN_FOLDER = "huggingface"
TOKENIZER_CONFIG = "tokenizer_config.json"


class Trained:
    """The trained tensors of a checkpoint.

    Args:
        checkpoint: a ``global_step_N`` folder of a hybrid run, or its ``actor`` or ``hybrid_lora`` folder.

    Attributes:
        folder: with description and allocation.
        description: what the tensors belong to.
        allocation: that the run trained under.
        tokenizer: folder with the tokenizer and the chat template that the run used; None where there is none.
        dtype: of the weights of full modules; float32 in a checkpoint.
        moves: of the frozen weights by zeroth order; None where they are the base model's.

    Raises:
        ConfigurationError: nothing there, or not readable.
    """

    #: how messages call it
    kind = "checkpoint"
    dtype = torch.float32
    moves: MoveLog | None = None

    def __init__(self, checkpoint: str | os.PathLike) -> None:
        _, self.description, allocation = load_trained(checkpoint)
        self._open(allocation.parent, allocation.parent / TENSORS)
        self.moves = load_moves(self.folder)
        of_run = self.folder.parent / _RUN_FOLDER
        self.tokenizer = of_run if (of_run / TOKENIZER_CONFIG).is_file() else None

    description: CheckpointDescription
    allocation: Allocation
    tokenizer: Path | None

    def _open(self, folder: Path, file: Path) -> None:
        self.folder, self._file = folder, file
        self.allocation = load_allocation(folder / ALLOCATION)
        try:
            self._shapes = shapes_in(file)
        except (OSError, SafetensorError) as error:
            raise self._cannot_be_read(error) from error

    def require_all(self, base: BaseModel) -> None:
        """See that the tensors are those of the allocation's modules in this model.

        Raises:
            ConfigurationError: naming the first that is missing, of another shape, or of no module.
        """
        wanted = {name: base.entries[name].shape for name in self.full_weights(base)}
        rank = self.description.rank
        for module in self.allocation.lora_names:
            rows, columns = base.entries[f"{module}.weight"].shape
            wanted |= {wire_factor(module, "A"): (rank, columns), wire_factor(module, "B"): (rows, rank)}
        for name, shape in wanted.items():
            if name not in self._shapes:
                raise ConfigurationError(
                    f"{self.kind}: tensor {name!r} is missing; the {self.kind} is incomplete, use another",
                    see="checkpoint-cannot-be-read",
                )
            if not self._fits(name, shape):
                raise ConfigurationError(
                    f"{self.kind}: tensor {name!r} has shape {list(self._shapes[name])}, and {list(shape)} belongs to "
                    f"rank {rank} and to {base.name!r}; use another, or give the base it was trained from",
                    see="checkpoint-cannot-be-read",
                )
        for name, shape in self.moves.shapes.items() if self.moves else ():
            if name in wanted or name not in base.entries or base.entries[name].shape != shape:
                raise ConfigurationError(
                    f"{self.kind}: weight {name!r} has moved by zeroth order, and {base.name!r} has no frozen one of "
                    f"shape {list(shape)} by that name; give the base it was trained from",
                    see="checkpoint-cannot-be-read",
                )
        if unused := self._shapes.keys() - wanted.keys():
            raise ConfigurationError(
                f"{self.kind}: tensor {min(unused)!r} belongs to no module of {base.name!r}; give the base it was "
                f"trained from",
                see="checkpoint-cannot-be-read",
            )

    def full_weights(self, base: BaseModel) -> list[str]:
        """Names of the weights and biases of fully tuned modules, in model order."""
        modules = dict(base.structure.named_modules())
        return [f"{name}.{kind}" for name in self.allocation.full_names for kind, _ in modules[name].named_parameters()]

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._shapes[name] == shape

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, d_in] and B [d_out, r] of a module, float32."""
        return self._read(wire_factor(module, "A")), self._read(wire_factor(module, "B"))

    def full(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """A weight or bias of a full module, in ``dtype``.

        Args:
            name: plain name.
            original: of the base model, in the type that the run held it in.
        """
        return self._read(name)

    def moved(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """A weight of the base model as the run held it at last: itself, unless zeroth order moved it.

        Args:
            name: plain name.
            base: of the base model, in the type that the run held it in; stays as it is.

        Raises:
            ConfigurationError: the run held it in another type, or shape.
        """
        return base if self.moves is None else self.moves.moved(name, base)

    def check_base(self, name: str, weight: torch.Tensor) -> None:
        """Refuse a weight of another base model, where it is known which it was.

        Args:
            name: plain name.
            weight: of the base model, in the type that the run held it in.

        Raises:
            ConfigurationError: it is not the one.
        """

    def _read(self, name: str) -> torch.Tensor:
        try:
            return read_tensor(self._file, name)
        except (OSError, SafetensorError) as error:
            raise self._cannot_be_read(error) from error

    def _cannot_be_read(self, error: Exception | str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.kind}: {str(self._file)!r} cannot be read ({error}); use another {self.kind}",
            see="checkpoint-cannot-be-read",
        )
