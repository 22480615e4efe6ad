"""Real artifacts for tests: seeded random sensitivities through the real score, budget and writer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from hybrid_lora_plugin.allocation import allocate, save_allocation
from hybrid_lora_plugin.allocation.artifact import (
    Allocation,
    BudgetRecord,
    CriterionRecord,
    ModelIdentity,
    ModuleRecord,
)
from hybrid_lora_plugin.allocation.report import Census
from hybrid_lora_plugin.candidates import architecture_of, find_candidates_from_config, model_fingerprint
from hybrid_lora_plugin.config import BudgetConfig
from hybrid_lora_plugin.scoring import hybrid_score, moments


def make_allocation(model: str | Path, folder: str | Path, ratio: float = 0.3, seed: int = 0) -> Path:
    """Write the artifact a probe would write for ``model``, with drawn instead of measured sensitivities."""
    config = AutoConfig.from_pretrained(model)
    candidates = find_candidates_from_config(config)
    generator = torch.Generator().manual_seed(seed)
    sensitivities = torch.rand(4, len(candidates), generator=generator, dtype=torch.float64) + 0.1
    scores = hybrid_score(sensitivities)
    means, stds = moments(sensitivities)
    budget = BudgetConfig(ratio=ratio)
    assignment = allocate(candidates, scores.tolist(), budget)
    modules = [
        ModuleRecord(
            name=c.name, layer=c.layer, type=c.type, component=c.component, parameters=c.parameters,
            mean=means[i].item(), std=stds[i].item(), score=scores[i].item(), signal=True,
            assignment=assignment.modules[c.name],
        )
        for i, c in enumerate(candidates)
    ]  # fmt: skip
    allocation = Allocation(
        model=ModelIdentity(
            str(model), architecture_of(config), model_fingerprint(config), config.num_hidden_layers, assignment.total
        ),
        criterion=CriterionRecord(
            name="hybrid", direction="lowest", normalise="none", objective="sft", rank=4, init="default",
            warmup_steps=1, lr=1e-4, partitions=4, batch_size=1, max_length=16, dtype="float32", seed=seed, data={},
        ),
        budget=BudgetRecord("parameters", ratio, "stop", assignment.limit, assignment.used),
        modules=modules,
        environment={},
    )  # fmt: skip
    return save_allocation(folder, allocation, sensitivities, Census(frozen=0, full=assignment.used, lora=0))
