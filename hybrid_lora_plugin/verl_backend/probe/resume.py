"""The allocation that an earlier start of a run left behind: found, compared with what is asked for now, and used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hybrid_lora_plugin.allocation.budget_modes import BudgetRecord, budget_mode
from hybrid_lora_plugin.allocation.schema import Allocation, AutoStop
from hybrid_lora_plugin.allocation.storage import ALLOCATION_FILE, load_allocation
from hybrid_lora_plugin.config import (
    AUTO,
    BUDGET_AMOUNTS,
    BudgetConfig,
    ControlConfig,
    HybridLoraConfig,
    ModelConfig,
    ProbeCommandConfig,
    ProbeConfig,
    SelectionConfig,
)
from hybrid_lora_plugin.errors import ConfigurationError, explained
from hybrid_lora_plugin.probing.data.files import hub_split, is_there
from hybrid_lora_plugin.probing.data.rows import file_digests
from hybrid_lora_plugin.probing.loading import checkpoint_fingerprint
from hybrid_lora_plugin.probing.method import warmup_rate
from hybrid_lora_plugin.probing.provenance import probe_record
from hybrid_lora_plugin.scoring import get_criterion
from hybrid_lora_plugin.verl_backend.earlier_checkpoint import actor_folder, checkpoint_to_resume, require_hybrid
from hybrid_lora_plugin.verl_backend.probe.policy_settings import policy_settings
from hybrid_lora_plugin.verl_backend.run_kinds import MODEL, kind_of_run

#: numbers that a probe may find itself -> where the artifact says how
_AUTO = {"warmup_steps": "warmup_auto", "partitions": "partitions_auto"}


def has_earlier_allocation(
    folder: Path, hybrid: HybridLoraConfig, data: Callable[[], Mapping[str, Any]] = dict
) -> bool:
    """Whether an earlier start of the run has left its allocation in ``folder``.

    Args:
        folder: where it would be.
        hybrid: what is asked for now.
        data: gives what ``data_of_run`` says of the model and the rows, once there is something to compare; by default
            settings alone are compared.

    Raises:
        ConfigurationError: it has, but under other settings, of another model or other rows, or the file cannot be
            understood.
    """
    if not (folder / ALLOCATION_FILE).exists():
        return False
    with explained(otherwise="allocation-cannot-be-read"):
        allocation = load_allocation(folder)
    for field, kept, wanted in _settings(allocation, hybrid, data()):
        if kept != wanted:
            raise ConfigurationError(
                f"{field}: {wanted!r:.120}, but the allocation that this run made in {folder} has {kept!r:.120}; give "
                f"hybrid_lora.allocation={folder} to train under it, or another trainer.default_local_dir to probe "
                "again",
                see="allocation-of-other-settings",
            )
    return True


def data_of_run(config: DictConfig, hybrid: HybridLoraConfig) -> dict[str, Any]:
    """The model and the rows a probe of this run would see, in the words of an artifact's ``probe.data``.

    What is not on this machine (a model on a hub, rows that were removed since) is left out.
    """
    kind = kind_of_run(config)
    path = str(kind.select(config, MODEL + "path"))
    data: dict[str, Any] = {"checkpoint": checkpoint_fingerprint(path), "model": kind.place(MODEL + "path")}
    if hybrid.probe.objective == "policy":
        data["settings"] = policy_settings(config, hybrid)
    else:
        data["train_on"] = hybrid.probe.train_on
        if all(is_there(file) and hub_split(file) is None for file in hybrid.probe.files):
            data["files"] = file_digests(hybrid.probe.files)
    return data


def allocation_of_checkpoint(config: DictConfig) -> Path | None:
    """The allocation inside the checkpoint that verl would resume from, or None if it would start afresh.

    Raises:
        ConfigurationError: there is a checkpoint to resume, and no allocation in it.
    """
    folder = checkpoint_to_resume(config)
    if folder is None:
        return None
    actor = actor_folder(folder)
    require_hybrid(actor)
    kept = actor / "hybrid_lora" / ALLOCATION_FILE
    if not kept.is_file():
        raise ConfigurationError(
            f"hybrid_lora.allocation: None, and the checkpoint to resume in {folder} holds no "
            f"{kept.relative_to(folder)}; "
            f"give the allocation it was trained under, or trainer.resume_mode=disable and another "
            f"trainer.default_local_dir to start afresh",
            see="checkpoint-without-an-allocation",
        )
    return kept.absolute()


def command_config(hybrid: HybridLoraConfig, path: str, trust_remote_code: bool) -> ProbeCommandConfig:
    """What ``hybrid-lora-probe`` would be given for this run."""
    shared = {spec.name: getattr(hybrid, spec.name) for spec in fields(SelectionConfig)}
    return ProbeCommandConfig(
        model=ModelConfig(path=path, trust_remote_code=trust_remote_code),
        output_dir=hybrid.output_dir,
        probe=hybrid.probe,
        trial=hybrid.trial,
        lora=hybrid.lora,
        **shared,
    )


def _settings(
    allocation: Allocation, hybrid: HybridLoraConfig, data: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(option, value in the artifact, value asked for), for all that decides an allocation."""
    criterion, selection, ours = get_criterion(hybrid.criterion), allocation.selection, "hybrid_lora."
    yield ours + "criterion", selection.criterion, hybrid.criterion
    direction = criterion.direction if hybrid.direction == "auto" else hybrid.direction
    yield ours + "direction", selection.direction, direction
    yield ours + "normalise", selection.normalise, hybrid.normalise
    yield ours + "lora.rank", allocation.budget.lora_rank, hybrid.lora.rank
    if budget_mode(allocation.budget.mode).limits:
        yield from _budget(allocation.budget, hybrid.budget)
    # The first artifacts recorded no options, and one that is newer than the artifact had its default then.
    for name in criterion.options if selection.options else ():
        kept = selection.options.get(name, getattr(ControlConfig(), name))
        yield f"{ours}control.{name}", kept, getattr(hybrid.control, name)
    if criterion.method is None:
        return
    if allocation.probe is None:
        yield ours + "probe", None, f"a probe by {criterion.method}"
        return
    # What the same settings would be recorded as today.
    rate = warmup_rate(hybrid.probe, criterion.method)
    expected = probe_record(command_config(hybrid, "", False), criterion.method, None, {}, rate)
    for name, value in vars(expected).items():
        # The dtype is known once the model is loaded, the rank was compared above, and version 1 has no method; a loss
        # is a result.
        if name in ("method", "rank", "dtype", "data", "held_out", "seeds", *_AUTO.values()):
            continue
        # What several seeds found out of themselves stands with each of them.
        first = (allocation.probe.seeds or [allocation.probe])[0]
        if name == "seed" and (hybrid.probe.seeds or allocation.probe.seeds):
            yield f"{ours}probe.seeds", [one.seed for one in allocation.probe.seeds or ()], list(hybrid.probe.seeds)
            continue
        # A policy probe has no rows of its own: its batches are those of the run.
        if hybrid.probe.objective == "sft" or name not in ("batch_size", "max_length"):
            found = getattr(first, _AUTO.get(name, ""), None)
            yield f"{ours}probe.{name}", getattr(allocation.probe, name) if found is None else AUTO, value
            if found is not None:
                yield from _auto(name, found, hybrid.probe)
    yield from _data(allocation.probe.data, data)


def _auto(name: str, found: AutoStop, wanted: ProbeConfig) -> Iterator[tuple[str, Any, Any]]:
    """The same for how a probe finds its own length."""
    if name == "partitions":
        options = {"max_partitions": found.limit, "settled_share": found.threshold}
    else:
        options = {
            "max_warmup_steps": found.limit,
            "warmup_check_steps": found.every,
            "warmup_check_partitions": found.partitions,
            "warmup_agreement": found.threshold,
        }
    for option, kept in options.items():
        yield f"hybrid_lora.probe.{option}", kept, getattr(wanted, option)


def _budget(kept: BudgetRecord, wanted: BudgetConfig) -> Iterator[tuple[str, Any, Any]]:
    ours = "hybrid_lora.budget."
    yield ours + "mode", kept.mode, wanted.mode
    yield ours + "overflow", kept.overflow, wanted.overflow
    yield ours + BUDGET_AMOUNTS[wanted.mode], budget_mode(kept.mode).asked(kept), wanted.amount


def _data(kept: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The same for model and rows, as far as both sides know them."""
    # Settings by name first: they say more than a digest.
    for name, value in now.get("settings", {}).items():
        if name in kept.get("settings", {}):
            yield name, kept["settings"][name], value
    if "train_on" in now and "files" in kept:
        # An earlier version trained the last turn and did not say so.
        yield "hybrid_lora.probe.train_on", kept.get("train_on", "last"), now["train_on"]
    if now.get("files") is not None and "files" in kept:
        files = [{"name": file["name"], "sha256": file["sha256"]} for file in kept["files"]]
        yield "hybrid_lora.probe.files", files, now["files"]
    if now.get("checkpoint") and kept.get("checkpoint"):
        yield f"{now.get('model', MODEL + 'path')} (digest of its weights)", kept["checkpoint"], now["checkpoint"]
