"""A model that others load, from the base checkpoint and what training changed.

    merged    a plain Hugging Face model
    adapter   a PEFT adapter, and the weights of the fully tuned modules beside it
    delta     the difference to the base model, from which a merged model is made again

Each is written one weight at a time into a folder that has its name once it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.errors import ConfigurationError, WeightSyncError
from hybrid_lora_plugin.files import complete_folder
from hybrid_lora_plugin.training.adapter_folder import loader, write_adapter
from hybrid_lora_plugin.training.arrival import ENOUGH, Arrival, TrainedPiece, arrival_of
from hybrid_lora_plugin.training.base_model import UNLOADABLE, BaseModel, cannot_be_loaded
from hybrid_lora_plugin.training.delta import Delta, write_delta
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.model_card import CARD, model_card
from hybrid_lora_plugin.training.model_folder import LARGEST_FILE, ModelFolder
from hybrid_lora_plugin.training.recorded_base import require_recorded_base
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding, on_grid, round_weight
from hybrid_lora_plugin.training.trained import Trained
from hybrid_lora_plugin.training.zeroth_order.move_log import MoveLog


@dataclass(frozen=True)
class KeptUpdate:
    """What of the trained update is in exported weights."""

    dtype: torch.dtype
    rounding: Rounding
    #: by kind of module, ``full`` and ``lora``: ⟨W_exported − W0, W − W0⟩ / ‖W − W0‖²; 1.0 is all of it
    share: dict[str, float]
    #: whether LoRA factors are there as they are, in float32
    has_factors: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        how = "by the run's thresholds" if self.rounding.is_stochastic(self.dtype) else "to nearest"
        text = f"weights in {dtype}" + ("" if self.dtype == torch.float32 else f", rounded {how}")
        kept = " and ".join(f"{share:.1%} of the update of {kind} modules" for kind, share in self.share.items())
        if self.has_factors:
            kept = "LoRA factors in float32" + (f", and {kept}" if kept else "")
        text += f": {kept or 'no update'} kept"
        if min(self.share.values(), default=1.0) < ENOUGH:
            text += "; give dtype=float32 to keep all of it"
        return text


class Exported(NamedTuple):
    """A written model."""

    folder: Path
    #: what of the update is in its weights
    kept: KeptUpdate
    #: what else there is to say of it, a line each
    notes: list[str]


def export_checkpoint(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    base: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    **options,
) -> Exported:
    """Export the trained model of a checkpoint as a new folder.

    Args:
        checkpoint: a ``global_step_N`` folder of a hybrid run (or its ``actor`` or ``hybrid_lora`` folder).
        output_dir: appears when it is complete; an existing one is never written to.
        base: Hugging Face folder or name of the base model; default: the one recorded in the checkpoint.
        trust_remote_code: as in transformers.
        dtype: of merged and fully tuned weights; ``auto`` is that of the run's rollout engine, where the checkpoint is
            older and does not say so that of the base checkpoint. The engine's own type gets the engine's own weights,
            bit for bit: the same thresholds decide.
        options: ``format``, ``largest_file`` and ``progress`` of ``Export``.

    Raises:
        ConfigurationError: ``output_dir`` exists or cannot be written; the checkpoint is missing something or belongs
            to another base model; or a weight does not fit into float16.
    """
    return Export(Trained(checkpoint), base, trust_remote_code, dtype, **options).write(Path(output_dir))


def apply_delta(
    delta: str | os.PathLike,
    output_dir: str | os.PathLike,
    base: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    **options,
) -> Exported:
    """Export the trained model of a folder that ``format=delta`` wrote; else as ``export_checkpoint``.

    ``dtype=auto`` is that of the run's rollout engine here too. A delta in 16 bits gives its own type only.
    """
    return Export(Delta(delta), base, trust_remote_code, dtype, **options).write(Path(output_dir))


@dataclass
class Export:
    """One export.

    Attributes:
        trained: what the run trained.
        base: Hugging Face folder or name of the base model; None is the one that the run recorded.
        trust_remote_code: as in transformers.
        dtype: of merged and fully tuned weights, or ``auto``.
        format: ``merged``, ``adapter`` or ``delta``.
        largest_file: of a merged model, as ``save_pretrained``'s ``max_shard_size``.
        progress: is told (bytes of the base model that are done with, bytes in all).
    """

    trained: Trained
    base: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    format: str = "merged"
    largest_file: str = LARGEST_FILE
    progress: Callable[[int, int], None] = lambda done, total: None
    notes: list[str] = field(default_factory=list)

    @torch.no_grad()
    def write(self, output: Path) -> Exported:
        """Write the folder ``output``; raises as ``export_checkpoint``."""
        if os.path.lexists(output):
            raise ConfigurationError(f"output_dir: {str(output)!r} exists already; give a new folder or remove it")
        trained = self.trained
        if trained.moves is not None and self.format != "merged":
            raise ConfigurationError(
                f"format: {self.format!r} leaves the base model as it is, and this run moved frozen weights of it by "
                "zeroth order; give format=merged"
            )
        base = self._model = self._known_base()
        trained.allocation.check_model(base.structure.config, find_candidates(base.structure))
        trained.require_all(base)
        if not base.is_streamed:
            self.notes.append(f"{base.name}: not in safetensors under the names of its model, so it was loaded whole")
        self._choose_dtype()
        if trained.moves is not None:
            self.notes.append(self._said_of_moves(trained.moves))
        self._arrival, self._bytes = Arrival(sampled=None), self._largest_size()
        try:
            with complete_folder(output) as unfinished:
                self._write(unfinished, output)
        except WeightSyncError as error:
            said = str(self._target).removeprefix("torch.")
            raise ConfigurationError(
                f"dtype: {said} does not hold all weights ({error}); give dtype=float32"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"output_dir: {str(output)!r} cannot be written ({error.strerror or error}); nothing of it was left "
                f"there, give a new folder on a disk with {_size(self._bytes)} of room",
                see="export-cannot-be-written",
            ) from error
        return Exported(output, self._kept, self.notes)

    def _known_base(self) -> BaseModel:
        description, name = self.trained.description, self.base or self.trained.description.base_model
        try:
            uncertain = require_recorded_base(name, self.trained.folder, self.trust_remote_code)
        except ConfigurationError:
            raise
        except UNLOADABLE as error:
            raise cannot_be_loaded(name, error) from error
        if uncertain:
            self.notes.append(uncertain)
        return BaseModel(name, description.base_dtype, self.trust_remote_code)

    def _choose_dtype(self) -> None:
        description, held = self.trained.description, self.trained.dtype
        chosen = description.rollout_dtype if self.dtype == "auto" else self.dtype
        self._target = self._model.structure.dtype if chosen is None else getattr(torch, chosen)
        if held not in (torch.float32, self._target):
            raise ConfigurationError(
                f"dtype: {self._target} is asked for and the delta holds {held}; give dtype=auto, or export the delta "
                f"from the checkpoint again with dtype=float32".replace("torch.", "")
            )

    def _said_of_moves(self, log: MoveLog) -> str:
        said = f"zeroth order: {len(log.moves)} moves of {len(log.shapes)} frozen weights made again on the base model"
        if any(dtype.itemsize > self._target.itemsize for dtype in log.dtypes.values()):
            said += (
                f"; rounded to nearest in {self._target}, which loses moves that are small; give dtype=float32 to keep "
                "all of them"
            )
        return said.replace("torch.", "")

    # -- the three formats ----------------------------------------------------------------------------------------

    def _write(self, folder: Path, output: Path) -> None:
        entries, allocation = self._model.entries, self.trained.allocation
        changed = {f"{name}.weight" for name in allocation.lora_names} | set(self.trained.full_weights(self._model))
        read = {name: entry.bytes for name, entry in entries.items() if self.format != "adapter" or name in changed}
        done = 0

        def written(name: str) -> None:
            nonlocal done
            done += read[name]
            self.progress(done, sum(read.values()))

        free = shutil.disk_usage(folder).free
        if free < self._bytes:
            raise OSError(f"{_size(free)} is free there, and it takes {_size(self._bytes)}")
        # What is not weights first: what cannot be written is known before an hour of merging.
        self._save_tokenizer(folder)
        if self.format == "merged":
            self._write_merged(folder, written)
        else:
            write = {"adapter": write_adapter, "delta": write_delta}[self.format]
            write(folder, self.trained, self._model, self._target, self._full, written)
        sums = self._arrival.sums()
        share = {kind: arrived[0] for kind in ("full", "lora") if (arrived := arrival_of(sums.get(kind, [0] * 4)))}
        rounding = self.trained.description.rounding
        self._kept = KeptUpdate(self._target, rounding, share, has_factors=self.format != "merged")
        (folder / CARD).write_text(self._card(output), encoding="utf-8")

    def _write_merged(self, folder: Path, written: Callable[[str], None]) -> None:
        structure = self._model.structure.to(self._target)
        structure.config.dtype = self._target
        output = ModelFolder(folder, structure, self._model.entries, self.largest_file)
        if output.refused:
            self.notes.append(
                f"generation_config.json and config.json: written as the base model has them, although transformers "
                f"finds fault with them ({output.refused})"
            )
        for name, weight in self._merged():
            output.add(name, weight)
            written(name)
        output.finish()

    def _merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight of the merged model in the order of its files."""
        description, allocation = self.trained.description, self.trained.allocation
        lora = {f"{name}.weight": name for name in allocation.lora_names}
        full = set(self.trained.full_weights(self._model))
        for name in self._model.entries:
            base = self._model.read(name)
            self.trained.check_base(name, base)
            base = self.trained.moved(name, base)
            if name in lora:
                how = (description.scaling, self._target, description.rounding, name, self._arrival)
                yield name, merge_weight(base, *self.trained.factors(lora[name]), *how)
            elif name in full:
                yield name, self._full(name, base)
            elif base.is_floating_point():
                yield name, round_weight(name, base, self._target, NEAREST)
            else:
                yield name, base

    def _full(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """A weight or bias of a full module as it is exported."""
        exact, target, rounding = self.trained.full(name, original), self._target, self.trained.description.rounding
        if exact.dtype != torch.float32:
            return exact
        moved = on_grid(exact, original, target) if rounding.is_stochastic(target) else exact
        weight = round_weight(name, moved, target, rounding)
        self._arrival.add_full(TrainedPiece.of(exact, original), weight)
        return weight

    # -- what is not weights --------------------------------------------------------------------------------------

    def _save_tokenizer(self, folder: Path) -> None:
        run, base = self.trained.tokenizer, self._model.name
        try:
            tokenizer = load_tokenizer(run or base, self.trust_remote_code)
        except UNLOADABLE as error:
            reason = " ".join(str(error).split())
            raise ConfigurationError(
                f"tokenizer: that in {str(run or base)!r} cannot be loaded ({reason}); put a tokenizer there"
            ) from error
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:
            # The library behind it raises no OSError where the disk is full.
            raise OSError(" ".join(str(error).split())) from error
        if run is None:
            self.notes.append(f"tokenizer and chat template: of {base}, since the {self.trained.kind} holds none")
        else:
            self.notes.append(f"tokenizer and chat template: the run's, from {run}")

    def _largest_size(self) -> int:
        """Bytes of what will be written, at most."""
        entries, allocation = self._model.entries, self.trained.allocation
        width = self._target.itemsize
        if self.format == "merged":
            return width * sum(entry.elements for entry in entries.values())
        full = sum(entries[name].elements for name in self.trained.full_weights(self._model))
        lora = sum(sum(entries[f"{name}.weight"].shape) for name in allocation.lora_names)
        # A delta's differences lie beside their file until their sizes are known.
        return (2 if self.format == "delta" else 1) * width * full + 4 * lora * self.trained.description.rank

    def _card(self, output: Path) -> str:
        if self.format == "merged":
            use = [_python(_MERGED_LOADER.format(folder=output.name))]
        elif self.format == "adapter":
            use = [
                "The adapter alone, on the base model alone, is another model: the weights of the fully tuned modules "
                "are in `full_weights.safetensors` and have to be loaded too. These lines load all of it:",
                _python(loader(output.name, self._target, self.trust_remote_code)),
                "vLLM loads the adapter (`enable_lora`, "
                f"`max_lora_rank={self.trained.description.rank}` or more) on a model that has those weights; to serve "
                "without an adapter, export with `format=merged`.",
            ]
        else:
            use = [
                "This is the difference to the base model, of which each weight is compared with the one it was made "
                "against. The model is made again, bit for bit, by",
                f"```bash\nhybrid-lora-export delta={output.name} output_dir=model\n```",
                "In float32 the delta holds all that was trained, and any `dtype` can be made of it."
                if self._target == torch.float32
                else f"It holds the fully tuned modules in {str(self._target).removeprefix('torch.')}, as the rollout "
                "engine had them, and no other type can be made of it.",
            ]
        description, allocation = self.trained.description, self.trained.allocation
        return model_card(self.format, self._model.location, description, allocation, str(self._kept), use)


_MERGED_LOADER = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""


def _python(text: str) -> str:
    return f"```python\n{text}\n```"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def load_tokenizer(source: str | os.PathLike, trust_remote_code: bool = False):
    """The tokenizer of a Hugging Face folder or name; raises as transformers does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
