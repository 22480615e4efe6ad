"""A PEFT adapter and, beside it, the weights of the fully tuned modules, which no adapter can hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, TaskType

from hybrid_lora_plugin.names import PEFT_PREFIX, wire_factor
from hybrid_lora_plugin.training.base_model import BaseModel
from hybrid_lora_plugin.training.tensor_file import TensorEntry, TensorFile
from hybrid_lora_plugin.training.trained import Trained

ADAPTER_TENSORS, FULL_WEIGHTS = "adapter_model.safetensors", "full_weights.safetensors"


def write_adapter(
    folder: Path,
    trained: Trained,
    base: BaseModel,
    dtype: torch.dtype,
    full: Callable[[str, torch.Tensor], torch.Tensor],
    written: Callable[[str], None],
) -> None:
    """Write the files of an adapter, its factors in float32.

    Args:
        folder: exists.
        trained: what the run trained.
        base: the model it was trained from; of full modules it is read.
        dtype: of the full modules' weights.
        full: the weight of a full module in ``dtype``, of its name and its original.
        written: is told each weight of the base model that is done with.

    Raises:
        OSError: something cannot be written.
    """
    description, modules = trained.description, trained.allocation.lora_names
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=description.rank,
        lora_alpha=description.alpha,
        lora_dropout=0.0,
        bias="none",
        base_model_name_or_path=base.location,
        inference_mode=True,
    )
    # As a list: PEFT would make a set of it, which is written in another order each time.
    config.target_modules = sorted(modules)
    entries = {}
    for module in modules:
        rows, columns = base.entries[f"{module}.weight"].shape
        for kind, shape in (("A", (description.rank, columns)), ("B", (rows, description.rank))):
            entries[PEFT_PREFIX + wire_factor(module, kind)] = TensorEntry(torch.float32, shape)
    file = TensorFile(folder / ADAPTER_TENSORS, entries)
    for module in modules:
        for kind, factor in zip("AB", trained.factors(module), strict=True):
            file.add(PEFT_PREFIX + wire_factor(module, kind), factor)
        written(f"{module}.weight")
    names = trained.full_weights(base)
    file = TensorFile(folder / FULL_WEIGHTS, {name: TensorEntry(dtype, base.entries[name].shape) for name in names})
    for name in names:
        original = base.read(name)
        trained.check_base(name, original)
        file.add(name, full(name, original))
        written(name)
    # Last: without it PEFT loads nothing, and with it nothing asks for the full weights.
    config.save_pretrained(str(folder))


def loader(folder: str, dtype: torch.dtype, trust_remote_code: bool) -> str:
    """Five lines of Python that make ``model`` of the adapter, the full weights and the base model.

    Args:
        folder: of the adapter.
        dtype: to load the base model in.
        trust_remote_code: whether it has code of its own.
    """
    options = f'dtype="{dtype}"'.replace("torch.", "") + (", trust_remote_code=True" if trust_remote_code else "")
    return "\n".join(
        (
            "from peft import AutoPeftModelForCausalLM",
            "from safetensors.torch import load_file",
            f"model = AutoPeftModelForCausalLM.from_pretrained({folder!r}, {options})",
            f"full = load_file({f'{folder}/{FULL_WEIGHTS}'!r})",
            "assert not model.get_base_model().load_state_dict(full, strict=False).unexpected_keys",
        )
    )
