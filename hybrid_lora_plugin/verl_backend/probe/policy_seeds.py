"""Policy probes of several seeds, one after the other, and one choice of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hybrid_lora_plugin.allocation.consensus import named_by_seed
from hybrid_lora_plugin.allocation.measurement_file import load_measurements
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.allocation.storage import ALLOCATION_FILE, load_allocation
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.probing.provenance import environment, record_of_seeds
from hybrid_lora_plugin.probing.resume import PartialState
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.verl_backend.probe.policy_settings import kept_settings, policy_settings
from hybrid_lora_plugin.verl_backend.probe.resume import command_config


def run_seeds(config: DictConfig, hybrid: HybridLoraConfig, run_one: Callable[..., None]) -> None:
    """A probe of each seed in the unfinished probe's folder, then their consensus in ``hybrid.output_dir``.

    A seed whose artifact is there is not probed again.

    Args:
        config: of the run.
        hybrid: its checked options, with several seeds.
        run_one: runs a probe of one seed; takes what this does, and more overrides.
    """
    artifacts = []
    for number, seed in enumerate(hybrid.probe.seeds):
        folder = Path(f"{hybrid.output_dir}.partial") / f"seed_{number}"
        artifacts.append(folder)
        if (folder / ALLOCATION_FILE).is_file():
            continue
        print(f"hybrid_lora: seed {seed}, {number + 1} of {len(hybrid.probe.seeds)}", flush=True)
        probe = dataclasses.replace(hybrid.probe, seed=seed, seeds=[])
        one = dataclasses.replace(hybrid, probe=probe, output_dir=str(folder))
        PartialState(folder, policy_settings(config, one))
        run_one(config, one, f"hybrid_lora.probe.seed={seed}", "hybrid_lora.probe.seeds=[]")
    _write_consensus(hybrid, artifacts)


def _write_consensus(hybrid: HybridLoraConfig, artifacts: list[Path]) -> None:
    allocations = [load_allocation(folder) for folder in artifacts]
    record = record_of_seeds([allocation.probe for allocation in allocations])
    data: dict[str, Any] = record.data | {"settings": kept_settings(hybrid.output_dir)}
    first = allocations[0]
    measurements = named_by_seed([load_measurements(*each) for each in zip(artifacts, allocations, strict=True)])
    allocation = select_modules(
        command_config(hybrid, first.model.name_or_path, False),
        first.model,
        first.modules,
        measurements,
        lora_rank=hybrid.lora.rank,
        probe=dataclasses.replace(record, data=data),
        environment=environment(),
    )
    save_allocation(Path(hybrid.output_dir), allocation, measurements)
    print(f"hybrid_lora: allocation of {len(artifacts)} seeds written to {hybrid.output_dir}", flush=True)
