"""A checkpoint of a hybrid run, as the engine writes it, without an engine."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.allocation import load_allocation
from hybrid_lora_plugin.base_identity import weight_digests
from hybrid_lora_plugin.names import wire_name
from hybrid_lora_plugin.training.apply import apply_allocation, trainable_groups
from hybrid_lora_plugin.training.checkpoint import CheckpointDescription, save_trained
from tests.support.allocations import make_allocation


def make_hybrid_checkpoint(base: Path, folder: Path, base_dtype: str | None = None) -> Path:
    """Write an allocation for ``base`` into ``folder/allocation`` and a checkpoint of step 1 into ``folder/actor``.

    Returns:
        The actor's folder.
    """
    artifact = make_allocation(base, folder / "allocation")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base)
        model = apply_allocation(model, load_allocation(artifact), rank=4, alpha=8)
    tensors = {
        wire_name(name): parameter.detach().float() + 0.01
        for group in trainable_groups(model).values()
        for name, parameter in group
    }
    description = CheckpointDescription(str(base), rank=4, alpha=8, global_step=1, base_dtype=base_dtype)
    text = (artifact / "allocation.json").read_text()
    save_trained(folder / "actor", tensors, description, text, weight_digests(base))
    return folder / "actor"
