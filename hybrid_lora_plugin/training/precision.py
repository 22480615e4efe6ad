"""Which types a hybrid model is held in: what trains in float32, what is frozen as the checkpoint stores it.

A frozen weight is read and never written, so a wider type than the checkpoint's holds the same values in more memory.
A trained weight needs float32: in bfloat16 a step of 1e-6 leaves nearly all of them unchanged.
"""

from __future__ import annotations

from collections.abc import Set

import torch

_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


def frozen_dtype(setting: str, stored: Set[str]) -> torch.dtype:
    """The type for the frozen weights of a model.

    Args:
        setting: ``hybrid_lora.frozen_dtype``: auto or float32.
        stored: the types of the checkpoint's tensors as safetensors names them, e.g. {"BF16"}; empty if unknown.

    Returns:
        With ``auto`` the checkpoint's own type where all its floating-point weights have one of two bytes, so that
        nothing is lost; float32 for any other checkpoint.
    """
    if setting != "auto":
        return getattr(torch, setting)
    floating = {name for name in stored if name.startswith(("F", "BF"))}
    return _HALF.get(floating.pop(), torch.float32) if len(floating) == 1 else torch.float32
