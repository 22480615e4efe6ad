"""The allocation a run trains under when it was given none: probed by its own workers before the actor is built.

The probe (objective ``sft``) runs on the ranks of the actor, with the base sharded over them, and is gone before the
actor takes the memory. The artifact lies beside the checkpoints; a resumed run finds it there and never probes again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from verl.utils.device import get_device_id, get_torch_device

from hybrid_lora_plugin.allocation.artifact import ALLOCATION_FILE, Allocation, load_allocation
from hybrid_lora_plugin.config import ConfigurationError, HybridLoraConfig, ModelConfig, ProbeCommandConfig
from hybrid_lora_plugin.probing.progress import LineProgress
from hybrid_lora_plugin.probing.ranks import Ranks
from hybrid_lora_plugin.probing.record import probe_record
from hybrid_lora_plugin.probing.run import warmup_rate
from hybrid_lora_plugin.probing.runner import NO_RUN, run_probe
from hybrid_lora_plugin.scoring import get_criterion


def worker_ranks() -> Ranks:
    """The ranks of verl's actor, each on its own device."""
    return Ranks(torch.device(get_device_id()))


def probed_allocation(hybrid: HybridLoraConfig, model_config: Any) -> tuple[Allocation, str]:
    """Probe, unless an earlier start of this run did; every rank of the actor calls it.

    Args:
        hybrid: with ``output_dir`` set and no ``allocation``.
        model_config: verl's ``HFModelConfig``.

    Returns:
        The allocation and the text of its file, equal on every rank whether or not it can read rank 0's disk.

    Raises:
        ConfigurationError: something cannot be used, or the artifact found was made with other settings.
    """
    folder, ranks = Path(hybrid.output_dir), worker_ranks()
    if not ranks.from_first(lambda: find_kept(folder, hybrid)):
        if hybrid.probe.objective == "policy" and get_criterion(hybrid.criterion).run != NO_RUN:
            raise ConfigurationError(
                f"hybrid_lora.output_dir: {folder} holds no allocation, and objective policy is probed before the workers "
                f"start; start the run with `python -m verl.trainer.main_ppo`"
            )
        run_probe(command_config(hybrid, model_config), LineProgress(interval=30.0), ranks)
        # FSDP's modules refer to each other: without a collection the probe would sit beside the actor.
        gc.collect()
        get_torch_device().empty_cache()
    return ranks.from_first(lambda: (load_allocation(folder), (folder / ALLOCATION_FILE).read_text(encoding="utf-8")))


def command_config(hybrid: HybridLoraConfig, model_config: Any) -> ProbeCommandConfig:
    """What ``hybrid-lora-probe`` would be given for this run."""
    return _command_config(hybrid, model_config.local_path, model_config.trust_remote_code)


def _command_config(hybrid: HybridLoraConfig, path: str, trust_remote_code: bool) -> ProbeCommandConfig:
    return ProbeCommandConfig(
        model=ModelConfig(path=path, trust_remote_code=trust_remote_code),
        output_dir=hybrid.output_dir,
        criterion=hybrid.criterion,
        direction=hybrid.direction,
        normalise=hybrid.normalise,
        budget=hybrid.budget,
        probe=hybrid.probe,
        control=hybrid.control,
        lora=hybrid.lora,
    )


def find_kept(folder: Path, hybrid: HybridLoraConfig) -> bool:
    """Whether an earlier start of the run has left its allocation in ``folder``.

    Raises:
        ConfigurationError: it has, but under other settings, or the file cannot be understood.
    """
    if not (folder / ALLOCATION_FILE).exists():
        return False
    allocation = load_allocation(folder)
    for field, kept, wanted in _settings(allocation, hybrid):
        if kept != wanted:
            raise ConfigurationError(
                f"hybrid_lora.{field}: {wanted!r}, but the allocation that this run made in {folder} has {kept!r}; give "
                f"hybrid_lora.allocation={folder} to train under it, or another trainer.default_local_dir to probe again"
            )
    return True


def _settings(allocation: Allocation, hybrid: HybridLoraConfig) -> Iterator[tuple[str, Any, Any]]:
    """(option, value in the artifact, value asked for), for all that decides an allocation."""
    criterion, budget = get_criterion(hybrid.criterion), hybrid.budget
    record = allocation.criterion
    yield "criterion", record.name, hybrid.criterion
    yield "direction", record.direction, criterion.direction if hybrid.direction == "auto" else hybrid.direction
    yield "normalise", record.normalise, hybrid.normalise
    yield "lora.rank", record.rank, hybrid.lora.rank
    if allocation.budget.mode != "fixed":
        yield "budget.mode", allocation.budget.mode, budget.mode
        yield "budget.overflow", allocation.budget.overflow, budget.overflow
        if budget.mode == "total_trainable":
            yield "budget.total", allocation.budget.limit, budget.total
        else:
            yield "budget.ratio", allocation.budget.ratio, float(budget.ratio)
    if criterion.run == NO_RUN:
        for name, value in record.options.items():
            if hasattr(hybrid.control, name):
                yield f"control.{name}", value, getattr(hybrid.control, name)
        return
    # What the same settings would be recorded as today.
    expected = probe_record(
        _command_config(hybrid, "", False), criterion.run, None, {}, warmup_rate(hybrid.probe, criterion.run)
    )
    for name in ("objective", "warmup_steps", "partitions", "batch_size", "max_length", "lr", "init", "seed"):
        # A policy probe has no rows of its own: its batches are those of the run.
        if hybrid.probe.objective == "sft" or name not in ("batch_size", "max_length"):
            yield f"probe.{name}", getattr(record, name), getattr(expected, name)
    for name, value in expected.options.items():
        yield f"probe.{name}", record.options.get(name), value
