"""Real artifacts for tests: seeded random measurements through the real criteria, budget and writer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from hybrid_lora_plugin.allocation import Allocation
from hybrid_lora_plugin.allocation.schema import ProbeRecord
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.candidates import find_candidates, find_candidates_from_config, meta_model
from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig
from hybrid_lora_plugin.probing.loading import parameter_count
from hybrid_lora_plugin.probing.provenance import model_identity
from hybrid_lora_plugin.report.artifact import save_allocation


def draw_measurements(modules: int, batches: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """What an SVD-LoRA probe with controls measures, drawn: ``[T, M]`` and ``[M]`` float64, all above 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1

    measured = {"sensitivities": draw(batches, modules)}
    measured |= {name: draw(batches, modules) for name in ("lora_output", "gradient_norm", "snip")}
    return measured | {name: draw(modules) for name in ("alpha", "delta_norm")}


def decide_for(config, measurements: dict[str, torch.Tensor], settings=None, name: str = "models/tiny") -> Allocation:
    """The allocation a probe of the model that ``config`` describes would give, in memory."""
    plain = meta_model(config)
    candidates = find_candidates(plain)
    model = model_identity(name, plain, candidates, parameter_count(plain))
    probe = ProbeRecord(
        method="svd_lora", objective="sft", rank=4, init="default", warmup_steps=1, lr=1e-4, partitions=4,
        partitions_per_batch=1, batch_size=1, max_length=16, dtype="float32", seed=0,
        data={"files": [{"name": "rows.jsonl", "rows": 100, "sha256": "0" * 64}]},
    )  # fmt: skip
    settings = settings or AllocateCommandConfig(budget=BudgetConfig(ratio=0.3))
    return select_modules(
        settings, model, candidates, measurements, lora_rank=4, probe=probe, environment={"torch": "2"}
    )


def make_allocation(model: str | Path, folder: str | Path, ratio: float = 0.3, seed: int = 0) -> Path:
    """Write the artifact a probe would write for ``model``, with drawn instead of measured sensitivities."""
    config = AutoConfig.from_pretrained(model)
    measurements = draw_measurements(len(find_candidates_from_config(config)), seed=seed)
    settings = AllocateCommandConfig(budget=BudgetConfig(ratio=ratio))
    return save_allocation(folder, decide_for(config, measurements, settings, name=str(model)), measurements)
