"""A plain Hugging Face folder from the base checkpoint and what training changed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hybrid_lora_plugin.allocation.storage import load_allocation
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.files import complete_folder
from hybrid_lora_plugin.names import wire_factor
from hybrid_lora_plugin.training.checkpoint import load_trained
from hybrid_lora_plugin.training.merge import merge_weight


@torch.no_grad()
def merged_model(checkpoint: str | os.PathLike, base: str | None = None, trust_remote_code: bool = False):
    """The trained model as a plain ``AutoModelForCausalLM`` on the CPU, in the dtype of the base checkpoint.

    Args:
        checkpoint: a ``global_step_N`` folder of a hybrid run (or its ``actor`` or ``hybrid_lora`` folder).
        base: Hugging Face folder or name of the base model; default: the one recorded in the checkpoint.

    Raises:
        ConfigurationError: the checkpoint is missing something, or belongs to another base model.
    """
    from transformers import AutoModelForCausalLM

    tensors, description, allocation_path = load_trained(checkpoint)
    allocation = load_allocation(allocation_path)
    base = base or description.base_model
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"base: {base!r} cannot be loaded ({reason}); give base=PATH") from error
    allocation.check_model(model.config, find_candidates(model))

    modules = dict(model.named_modules())
    unused = set(tensors)

    def take(name: str) -> torch.Tensor:
        if name not in tensors:
            raise ConfigurationError(
                f"checkpoint: tensor {name!r} is missing; the checkpoint is incomplete, use another"
            )
        unused.discard(name)
        return tensors[name]

    for name in allocation.full_names:
        for kind, parameter in modules[name].named_parameters(recurse=False):
            parameter.copy_(take(f"{name}.{kind}"))
    for name in allocation.lora_names:
        weight = modules[name].weight
        factors = take(wire_factor(name, "A")), take(wire_factor(name, "B"))
        weight.copy_(merge_weight(weight, *factors, description.scaling, weight.dtype))
    if unused:
        raise ConfigurationError(f"checkpoint: tensor {sorted(unused)[0]!r} belongs to no module of {base!r}")
    return model, base


def export_checkpoint(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the trained model with tokenizer as a folder that ``AutoModelForCausalLM`` loads.

    The folder appears under its name only when it is complete; an existing one is never written to.

    Raises:
        ConfigurationError: ``output_dir`` exists, or as ``merged_model``.
    """
    from transformers import AutoTokenizer

    output = Path(output_dir)
    if output.exists():
        raise ConfigurationError(f"output_dir: {str(output)!r} exists already; give a new folder or remove it")
    model, base = merged_model(checkpoint, base, trust_remote_code)
    with complete_folder(output) as unfinished:
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code).save_pretrained(unfinished)
    return output
