"""Checkpoints of hybrid models that were trained for a few steps in this process."""

from __future__ import annotations

import torch

from hybrid_lora_plugin.base_identity import weight_digests
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.training.apply import trainable_groups
from hybrid_lora_plugin.training.checkpoint import CheckpointDescription, save_trained

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def train_a_little(model, steps=3, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def trainables_of(model):
    groups = trainable_groups(model)
    return {
        plain_name(name).replace(".default.", "."): parameter.detach().clone()
        for group in groups.values()
        for name, parameter in group
    }


def save_checkpoint(model, base, allocation_folder, folder, **changes):
    description = CheckpointDescription(
        **({"base_model": str(base), "rank": 4, "alpha": 8, "global_step": 3} | changes)
    )
    text = (allocation_folder / "allocation.json").read_text()
    return save_trained(folder, trainables_of(model), description, text, weight_digests(base))
