"""Which types a hybrid model is held in: what trains in float32, what is frozen as the checkpoint stores it.

A frozen weight is read and never written, so a wider type than the checkpoint's holds the same values in more memory.
A trained weight needs float32: in bfloat16 a step of 1e-6 leaves nearly all of them unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from transformers import PreTrainedModel

from hybrid_lora_plugin.sync.checkpoint_weights import CheckpointWeights, checkpoint_folder
from hybrid_lora_plugin.sync.errors import WeightSyncError

_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


def frozen_dtype(setting: str, model: str | Path) -> torch.dtype:
    """The type for the frozen weights of a model.

    Args:
        setting: ``hybrid_lora.frozen_dtype``: auto or float32.
        model: the checkpoint's folder, or a name on the Hugging Face hub whose files have been downloaded.

    Returns:
        With ``auto`` the checkpoint's own type where all its floating-point weights have one of two bytes, so that
        nothing is lost; float32 for any other checkpoint, and for one without safetensors.
    """
    if setting != "auto":
        return getattr(torch, setting)
    try:
        stored = CheckpointWeights(checkpoint_folder(str(model))).dtypes()
    except WeightSyncError:
        return torch.float32
    floating = {name for name in stored if name.startswith(("F", "BF"))}
    return _HALF.get(floating.pop(), torch.float32) if len(floating) == 1 else torch.float32


@contextmanager
def only_parameters_cast() -> Iterator[None]:
    """Inside, ``model.to(dtype)`` of a Hugging Face model casts its parameters and leaves its buffers as they are.

    verl casts the model it has loaded, and with it RoPE's frequencies, which are no weights: rounded to bfloat16 they
    turn a token a thousand positions away by another angle, in trainer and reference alike and not in the rollout.
    """
    original = PreTrainedModel.to

    def to(self, *arguments, **options):
        floating = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        result = original(self, *arguments, **options)
        for module, name, buffer in floating:
            module._buffers[name] = buffer.to(module._buffers[name].device)
        return result

    with mock.patch.object(PreTrainedModel, "to", to):
        yield
