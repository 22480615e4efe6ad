"""Allocations of any depth made in memory from given scores, without a model, a probe or the budget's rules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from hybrid_lora_plugin.allocation.budget import FULL, LORA
from hybrid_lora_plugin.allocation.budget_modes import BudgetRecord, budget_mode
from hybrid_lora_plugin.allocation.schema import Allocation, ModelIdentity, ModuleRecord, ProbeRecord, SelectionRecord
from hybrid_lora_plugin.allocation.storage import allocation_text
from hybrid_lora_plugin.candidates import COMPONENT_OF_TYPE, FUSED_TYPES, TYPE_ORDER

#: of a family that packs no projections
TYPES = tuple(type_ for type_ in TYPE_ORDER if type_ not in FUSED_TYPES and COMPONENT_OF_TYPE[type_] != "recurrent")
# Widths as different as those of a real model, in this order.
SIZES = dict(zip(TYPES, (400, 60, 60, 400, 1200, 1200, 1200), strict=True))


def module_name(layer: int, type_: str) -> str:
    """Name in the Hugging Face model."""
    return f"model.layers.{layer}.{'mlp' if COMPONENT_OF_TYPE[type_] == 'mlp' else 'self_attn'}.{type_}"


def module_names(layers: int) -> list[str]:
    """Names of the ``7 layers`` candidates, in model order."""
    return [module_name(layer, type_) for layer in range(layers) for type_ in TYPES]


def drawn_scores(layers: int, seed: int = 0, spread: float = 1.0) -> list[float]:
    """Log-normal scores ``[7 layers]``, all positive."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7 * layers, generator=generator, dtype=torch.float64).mul(spread).exp().tolist()


def make(
    layers: int = 4,
    scores: list[float] | None = None,
    full: list[str] | None = None,
    count: int = 3,
    mode: str = "parameters",
    stds: list[float] | None = None,
    silent: tuple[int, ...] = (),
    name: str = "hybrid",
    direction: str = "lowest",
    config_sha256: str = "a" * 64,
    selection: dict | None = None,
    probe: dict | None = None,
    budget: dict | None = None,
    probed: bool = True,
) -> Allocation:
    """A made allocation.

    Args:
        layers: L; there are M = 7 L modules.
        scores: ``[M]``; None: 0 for all, or what a choice by rule records.
        full: names of the full modules; None: the ``count`` first in the direction given.
        mode: budget mode; limit and used follow it, the limit with room to spare.
        stds: ``[M]``; None: half the score's size where there are scores.
        silent: indices without a signal.
        selection, probe, budget: fields to set otherwise.
        probed: whether there is a record of a probe.
    """
    names = module_names(layers)
    values = scores or [0.0] * len(names)
    if full is None:
        order = sorted(range(len(names)), key=lambda i: values[i] if direction == "lowest" else -values[i])
        full = [names[i] for i in order if i not in silent][:count]
    modules = []
    for i, module in enumerate(names):
        layer, type_ = divmod(i, 7)
        type_ = TYPES[type_]
        modules.append(
            ModuleRecord(
                name=module,
                layer=layer,
                type=type_,
                component=COMPONENT_OF_TYPE[type_],
                parameters=SIZES[type_],
                mean=abs(values[i]) ** 0.5,
                std=stds[i] if stds else abs(values[i]) / 2,
                # A choice by rule records score 1 for what it names.
                score=float(module in full) if mode == "fixed" else 0.0 if i in silent else values[i],
                signal=module in full if mode == "fixed" else i not in silent,
                assignment=FULL if module in full else LORA,
                in_features=1,
                out_features=1,
            )
        )
    total = sum(module.parameters for module in modules)
    record = dict(
        method="svd_lora", objective="sft", rank=16, init="default", warmup_steps=500, lr=2.5e-5, partitions=20,
        partitions_per_batch=1, batch_size=8, max_length=2048, dtype="float32", seed=0, data={},
    )  # fmt: skip
    model = ModelIdentity("models/drawn", "Qwen2ForCausalLM", config_sha256, layers, total, parameters=2 * total)
    choice = SelectionRecord(**(dict(criterion=name, direction=direction, normalise="none") | (selection or {})))
    ratio = 0.5 if mode in ("parameters", "modules") else 0.0
    asked = BudgetRecord(mode, ratio, "stop", limit=total, used=0, lora_rank=16)
    spent = budget_mode(mode).expected(asked, modules, [module.assignment == FULL for module in modules])
    spent = dataclasses.replace(spent, **(budget or {}))
    return Allocation(model, choice, spent, modules, {}, ProbeRecord(**(record | (probe or {}))) if probed else None)


def unprobed(name: str, full: list[str], layers: int = 4, **arguments) -> Allocation:
    """A choice by rule: budget mode ``fixed``, no scores, nothing probed."""
    return make(layers, full=full, mode="fixed", name=name, probed=False, **arguments)


def write(folder: Path, allocation: Allocation) -> Path:
    """Only ``allocation.json``, in a folder of that name."""
    folder.mkdir()
    (folder / "allocation.json").write_text(allocation_text(allocation))
    return folder


def png_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
