"""A plain Hugging Face folder from the base checkpoint and what training changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from hybrid_lora_plugin.allocation.storage import load_allocation
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.errors import ConfigurationError, WeightSyncError
from hybrid_lora_plugin.files import complete_folder
from hybrid_lora_plugin.names import wire_factor
from hybrid_lora_plugin.training.arrival import ENOUGH, Arrival, TrainedPiece, arrival_of
from hybrid_lora_plugin.training.checkpoint import load_trained
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.model_folder import LARGEST_FILE
from hybrid_lora_plugin.training.recorded_base import require_recorded_base
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding, on_grid, round_weight


@dataclass(frozen=True)
class KeptUpdate:
    """What of the trained update is in exported weights."""

    dtype: torch.dtype
    rounding: Rounding
    #: by kind of module, ``lora`` and ``full``: ⟨W_exported − W0, W − W0⟩ / ‖W − W0‖²; 1.0 is all of it
    share: dict[str, float]
    #: why nobody can tell whether this is the run's base model; None where it is
    uncertain: str | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        how = "by the run's thresholds" if self.rounding.is_stochastic(self.dtype) else "to nearest"
        text = f"weights in {dtype}" + ("" if self.dtype == torch.float32 else f", rounded {how}")
        kept = " and ".join(f"{share:.1%} of the update of {kind} modules" for kind, share in self.share.items())
        text += f": {kept or 'no update'} kept"
        if min(self.share.values(), default=1.0) < ENOUGH:
            text += "; give dtype=float32 to keep all of it"
        return text if self.uncertain is None else f"{text}\n{self.uncertain}"


class Exported(NamedTuple):
    """A written model."""

    folder: Path
    #: what of the update is in its weights
    kept: KeptUpdate


@torch.no_grad()
def merged_model(
    checkpoint: str | os.PathLike, base: str | None = None, trust_remote_code: bool = False, dtype: str = "auto"
):
    """The trained model as a plain ``AutoModelForCausalLM`` on the CPU.

    Args:
        checkpoint: a ``global_step_N`` folder of a hybrid run (or its ``actor`` or ``hybrid_lora`` folder).
        base: Hugging Face folder or name of the base model; default: the one recorded in the checkpoint.
        trust_remote_code: as in transformers.
        dtype: of the weights; ``auto`` is that of the run's rollout engine, where the checkpoint is older and does not
            say so that of the base checkpoint. The engine's own type gets the engine's own weights, bit for bit: the
            same thresholds decide.

    Returns:
        The model, the base it was made from, and what of the update is in it.

    Raises:
        ConfigurationError: the checkpoint is missing something, belongs to another base model, or has a weight that
            does not fit into float16.
    """
    tensors, description, allocation_path = load_trained(checkpoint)
    allocation = load_allocation(allocation_path)
    base = base or description.base_model
    uncertain = require_recorded_base(base, allocation_path.parent, trust_remote_code)
    try:
        model = _base_model(base, description.base_dtype, trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"base: {base!r} cannot be loaded ({reason}); give base=PATH") from error
    allocation.check_model(model.config, find_candidates(model))

    chosen = description.rollout_dtype if dtype == "auto" else dtype
    target = model.dtype if chosen is None else getattr(torch, chosen)
    rounding = description.rounding
    modules = dict(model.named_modules())
    unused = set(tensors)
    arrival = Arrival(sampled=None)

    def take(name: str) -> torch.Tensor:
        if name not in tensors:
            raise ConfigurationError(
                f"checkpoint: tensor {name!r} is missing; the checkpoint is incomplete, use another"
            )
        unused.discard(name)
        return tensors[name]

    trained: set[torch.nn.Parameter] = set()
    try:
        for name in allocation.full_names:
            for kind, parameter in modules[name].named_parameters(recurse=False):
                plain = f"{name}.{kind}"
                exact, original = take(plain), parameter.detach()
                moved = on_grid(exact, original, target) if rounding.is_stochastic(target) else exact
                parameter.data = round_weight(plain, moved, target, rounding)
                arrival.add_full(TrainedPiece.of(exact, original), parameter)
                trained.add(parameter)
        for name in allocation.lora_names:
            weight, plain = modules[name].weight, f"{name}.weight"
            factors = take(wire_factor(name, "A")), take(wire_factor(name, "B"))
            rows, columns = weight.shape
            for kind, factor, shape in zip(
                "AB", factors, ((description.rank, columns), (rows, description.rank)), strict=True
            ):
                if factor.shape != shape:
                    raise ConfigurationError(
                        f"checkpoint: tensor {wire_factor(name, kind)!r} has shape {list(factor.shape)}, and "
                        f"{list(shape)} belongs to rank {description.rank}; use another checkpoint"
                    )
            weight.data = merge_weight(weight, *factors, description.scaling, target, rounding, plain, arrival)
            trained.add(weight)
        for name, parameter in model.named_parameters():
            if parameter not in trained and parameter.is_floating_point():
                parameter.data = round_weight(name, parameter, target, NEAREST)
    except WeightSyncError as error:
        raise ConfigurationError(f"dtype: {chosen} does not hold all weights ({error}); give dtype=float32") from error
    if unused:
        raise ConfigurationError(
            f"checkpoint: tensor {sorted(unused)[0]!r} belongs to no module of {base!r}; give the base it was trained "
            f"from"
        )
    model.config.dtype = target
    share = {kind: arrived[0] for kind, sums in arrival.sums().items() if (arrived := arrival_of(sums))}
    return model, base, KeptUpdate(target, rounding, share, uncertain)


def _base_model(base: str | os.PathLike, held: str | None, trust_remote_code: bool, **options):
    from transformers import AutoModelForCausalLM

    # In the type that the run held it in: a checkpoint's config may name another than its tensors have.
    options |= {"dtype": held or "auto", "trust_remote_code": trust_remote_code}
    return AutoModelForCausalLM.from_pretrained(base, **options)


def weightless_model(base: str | os.PathLike, held: str, dtype: torch.dtype, trust_remote_code: bool = False):
    """What ``merged_model`` returns, on the meta device: everything but the weights.

    Args:
        base: Hugging Face folder or name of the base model.
        held: type in which the run holds it.
        dtype: of the merged weights.
        trust_remote_code: as in transformers.
    """
    model = _base_model(base, held, trust_remote_code, device_map="meta").to(dtype)
    model.config.dtype = dtype
    return model


def save_tokenizer(
    base: str | os.PathLike, folder: Path, trust_remote_code: bool = False, chat_template: str | None = None
) -> None:
    """Write the base model's tokenizer into a folder.

    Args:
        base: Hugging Face folder or name of the base model.
        folder: exists.
        trust_remote_code: as in transformers.
        chat_template: of a run, in place of its own.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def export_checkpoint(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    base: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> Exported:
    """Write the trained model with tokenizer as a folder that ``AutoModelForCausalLM`` loads.

    The folder appears under its name only when it is complete; an existing one is never written to.

    Raises:
        ConfigurationError: ``output_dir`` exists, or as ``merged_model``.
    """
    output = Path(output_dir)
    if output.exists():
        raise ConfigurationError(f"output_dir: {str(output)!r} exists already; give a new folder or remove it")
    model, base, kept = merged_model(checkpoint, base, trust_remote_code, dtype)
    with complete_folder(output) as unfinished:
        model.save_pretrained(unfinished, max_shard_size=LARGEST_FILE)
        save_tokenizer(base, unfinished, trust_remote_code)
    return Exported(output, kept)
