"""The allocation that an earlier start of a run left behind: found, compared with what is asked for now, and used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.allocation.storage import ALLOCATION_FILE, Allocation, load_allocation
from hybrid_lora_plugin.config import HybridLoraConfig, ModelConfig, ProbeCommandConfig
from hybrid_lora_plugin.errors import ConfigurationError, explained
from hybrid_lora_plugin.probing.data.rows import file_digests
from hybrid_lora_plugin.probing.loading import checkpoint_fingerprint
from hybrid_lora_plugin.probing.method import warmup_rate
from hybrid_lora_plugin.probing.provenance import probe_record
from hybrid_lora_plugin.scoring import get_criterion
from hybrid_lora_plugin.verl_backend.probe.policy_settings import policy_settings


def find_kept(folder: Path, hybrid: HybridLoraConfig, data: Mapping[str, Any] | None = None) -> bool:
    """Whether an earlier start of the run has left its allocation in ``folder``.

    Args:
        folder: where it would be.
        hybrid: what is asked for now.
        data: what ``data_of_run`` says of the model and the rows; None compares settings alone.

    Raises:
        ConfigurationError: it has, but under other settings, of another model or other rows, or the file cannot be
            understood.
    """
    if not (folder / ALLOCATION_FILE).exists():
        return False
    with explained(otherwise="allocation-cannot-be-read"):
        allocation = load_allocation(folder)
    for field, kept, wanted in _settings(allocation, hybrid, data or {}):
        if kept != wanted:
            raise ConfigurationError(
                f"{field}: {wanted!r:.120}, but the allocation that this run made in {folder} has {kept!r:.120}; give "
                f"hybrid_lora.allocation={folder} to train under it, or another trainer.default_local_dir to probe "
                "again",
                see="allocation-of-other-settings",
            )
    return True


def data_of_run(config: DictConfig, hybrid: HybridLoraConfig) -> dict[str, Any]:
    """The model and the rows a probe of this run would see, in the words of an artifact's ``criterion.data``.

    What is not on this machine (a model on a hub, rows that were removed since) is left out.
    """
    path = str(OmegaConf.select(config, "actor_rollout_ref.model.path"))
    data: dict[str, Any] = {"checkpoint": checkpoint_fingerprint(path)}
    if hybrid.probe.objective == "policy":
        data["settings"] = policy_settings(config, hybrid)
    elif all(Path(file).exists() for file in hybrid.probe.files):
        data["files"] = file_digests(hybrid.probe.files)
    return data


def allocation_of_checkpoint(config: DictConfig) -> Path | None:
    """The allocation inside the checkpoint that verl would resume from, or None if it would start afresh.

    Raises:
        ConfigurationError: there is a checkpoint to resume, and no allocation in it.
    """
    mode = OmegaConf.select(config, "trainer.resume_mode", default="auto")
    if mode == "resume_path":
        folder = Path(str(OmegaConf.select(config, "trainer.resume_from_path")))
    else:
        checkpoints = Path(str(OmegaConf.select(config, "trainer.default_local_dir")))
        tracker = checkpoints / "latest_checkpointed_iteration.txt"
        if mode == "disable" or not tracker.is_file():
            return None
        folder = checkpoints / f"global_step_{tracker.read_text().strip()}"
    kept = folder / "actor" / "hybrid_lora" / ALLOCATION_FILE
    if not kept.is_file():
        raise ConfigurationError(
            f"hybrid_lora.allocation: None, and the checkpoint to resume in {folder} holds no {kept.relative_to(folder)}; "
            f"give the allocation it was trained under, or trainer.resume_mode=disable and another "
            f"trainer.default_local_dir to start afresh",
            see="checkpoint-without-an-allocation",
        )
    return kept.absolute()


def command_config(hybrid: HybridLoraConfig, path: str, trust_remote_code: bool) -> ProbeCommandConfig:
    """What ``hybrid-lora-probe`` would be given for this run."""
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


def _settings(
    allocation: Allocation, hybrid: HybridLoraConfig, data: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(option, value in the artifact, value asked for), for all that decides an allocation."""
    criterion, budget, ours = get_criterion(hybrid.criterion), hybrid.budget, "hybrid_lora."
    record = allocation.criterion
    yield ours + "criterion", record.name, hybrid.criterion
    direction = criterion.direction if hybrid.direction == "auto" else hybrid.direction
    yield ours + "direction", record.direction, direction
    yield ours + "normalise", record.normalise, hybrid.normalise
    yield ours + "lora.rank", record.rank, hybrid.lora.rank
    if allocation.budget.mode != "fixed":
        yield ours + "budget.mode", allocation.budget.mode, budget.mode
        yield ours + "budget.overflow", allocation.budget.overflow, budget.overflow
        if budget.mode == "total_trainable":
            yield ours + "budget.total", allocation.budget.limit, budget.total
        else:
            yield ours + "budget.ratio", allocation.budget.ratio, float(budget.ratio)
    if criterion.method is None:
        for name, value in record.options.items():
            if hasattr(hybrid.control, name):
                yield f"{ours}control.{name}", value, getattr(hybrid.control, name)
        return
    # What the same settings would be recorded as today.
    rate = warmup_rate(hybrid.probe, criterion.method)
    expected = probe_record(command_config(hybrid, "", False), criterion.method, None, {}, rate)
    for name in ("objective", "warmup_steps", "partitions", "batch_size", "max_length", "init", "lr", "seed"):
        # A policy probe has no rows of its own: its batches are those of the run.
        if hybrid.probe.objective == "sft" or name not in ("batch_size", "max_length"):
            yield f"{ours}probe.{name}", getattr(record, name), getattr(expected, name)
    for name, value in expected.options.items():
        yield f"{ours}probe.{name}", record.options.get(name), value
    yield from _data(record.data, data)


def _data(kept: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The same for model and rows, as far as both sides know them."""
    # Settings by name first: they say more than a digest.
    for name, value in now.get("settings", {}).items():
        if name in kept.get("settings", {}):
            yield name, kept["settings"][name], value
    if now.get("files") is not None and "files" in kept:
        files = [{"name": file["name"], "sha256": file["sha256"]} for file in kept["files"]]
        yield "hybrid_lora.probe.files", files, now["files"]
    if now.get("checkpoint") and kept.get("checkpoint"):
        yield "actor_rollout_ref.model.path (digest of its weights)", kept["checkpoint"], now["checkpoint"]
