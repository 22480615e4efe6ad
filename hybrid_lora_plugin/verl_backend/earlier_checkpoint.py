"""The checkpoint that verl would resume from, looked at before Ray starts and again where it is loaded.

``trainer.resume_mode=auto``, verl's default, takes whatever an earlier run left in ``trainer.default_local_dir``, full
fine-tuning and plain LoRA too. verl (0.9.1 ``trainer/ppo/v1/trainer_base.py``, ``trainer/ppo/ray_trainer.py``) looks
for it in the process that drives the workers, so mostly on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.storage import ALLOCATION_FILE, load_allocation
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError, explained, with_reference
from hybrid_lora_plugin.files import bring_back, complete_file
from hybrid_lora_plugin.training.checkpoint import (
    FOLDER,
    has_trained,
    require_same_moves,
    require_same_rounding,
    require_same_setting,
)
from hybrid_lora_plugin.training.rounding import Rounding
from hybrid_lora_plugin.verl_backend.checkpoint_files import is_archive
from hybrid_lora_plugin.verl_backend.checkpoint_retention import TRACKER
from hybrid_lora_plugin.verl_backend.run_kinds import (
    ACTOR,
    MODEL,
    REINFORCEMENT_LEARNING,
    ROLLOUT,
    RunKind,
    kind_of_run,
    tell,
)
from hybrid_lora_plugin.verl_backend.trainable_state import is_trainable

LOAD_CONTENTS = ACTOR + "checkpoint.load_contents"
START_AFRESH = "to start afresh give trainer.default_local_dir=NEW, or trainer.resume_mode=disable"
_SHARD = re.compile(r".+_world_size_(\d+)_rank_(\d+)\.pt")


def checkpoint_to_resume(config: DictConfig) -> Path | None:
    """The ``global_step_N`` folder that verl would resume from, or None where it would start afresh.

    Raises:
        ConfigurationError: the settings or verl's tracker lead nowhere.
    """
    mode = OmegaConf.select(config, "trainer.resume_mode", default="auto")
    if mode not in ("auto", "disable", "resume_path"):
        raise ConfigurationError(
            f"trainer.resume_mode: {mode!r} is no mode of verl's; give auto, disable or resume_path",
            see="resume-setting-not-usable",
        )
    path = OmegaConf.select(config, "trainer.resume_from_path")
    # The trainer on labelled rows takes a path by either mode.
    if mode == "resume_path" or (mode == "auto" and path and not kind_of_run(config).samples):
        if "global_step_" not in str(path):
            raise ConfigurationError(
                f"trainer.resume_from_path: {path!r} with trainer.resume_mode={mode}; give a folder global_step_N",
                see="resume-setting-not-usable",
            )
        return Path(str(path))
    if mode == "disable":
        return None
    checkpoints = _checkpoints(config)
    step = _last_step(checkpoints)
    if step is None:
        return None
    if not step.isdecimal():
        raise ConfigurationError(
            f"trainer.default_local_dir: {str(checkpoints / TRACKER)!r} says {step!r:.40} where the step of the last "
            f"checkpoint belongs; write it there, or {START_AFRESH}",
            see="resume-setting-not-usable",
        )
    folder = checkpoints / f"global_step_{int(step)}"
    # Where it is gone verl starts afresh.
    return folder if folder.exists() else None


def settle_tracker(config: DictConfig, probing: bool = False) -> str | None:
    """Let verl find the last checkpoint that is whole, where an interruption or a hand left its tracker astray.

    verl writes the tracker in place, so that a process killed there leaves it empty, and starts afresh, over the other
    checkpoints, where the step that it names is gone.

    Args:
        config: the composed configuration.
        probing: whether the run is the probe on rollouts, whose checkpoints hold no trained weights.

    Returns:
        A line for the user where the tracker names another step now.
    """
    mode = OmegaConf.select(config, "trainer.resume_mode", default="auto")
    checkpoints = _checkpoints(config)
    named = _last_step(checkpoints)
    if mode != "auto" or named is None or not (named.isdecimal() or not named):
        return None
    if named:
        folder = checkpoints / f"global_step_{int(named)}"
        bring_back(folder)
        bring_back(folder / "actor")
        if folder.is_dir() and (_is_whole(folder, probing) or not _is_ours(folder)):
            return None
    whole = [folder for folder in checkpoints.glob("global_step_*") if _step_of(folder) and _is_whole(folder, probing)]
    last = max(whole, key=_step_of, default=None)
    tracker = checkpoints / TRACKER
    if last is None:
        if named:
            return None
        tracker.unlink()
        return f"WARNING: {tracker} was left empty and there is no checkpoint beside it: the run starts afresh"
    with complete_file(tracker) as unfinished:
        unfinished.write_text(str(_step_of(last)))
    astray = f"named step {named}, which is not whole there" if named else "was left empty"
    return f"WARNING: {tracker} {astray}; going on from {last.name}, the last checkpoint that is"


def _step_of(folder: Path) -> int | None:
    step = folder.name.rpartition("_")[2]
    return int(step) if step.isdecimal() else None


def _is_ours(folder: Path) -> bool:
    """Whether a run under Hybrid-LoRA began a ``global_step_N`` folder, as far as this machine sees it."""
    actor = actor_folder(folder)
    return has_trained(folder) or not actor.is_dir() or not any(_SHARD.fullmatch(file.name) for file in actor.iterdir())


def _is_whole(folder: Path, probing: bool) -> bool:
    """Whether all of a ``global_step_N`` folder is there, as far as this machine sees it.

    The actor's part has its name when it is complete. What the trainer saves behind it is torch's archive, whose index
    stands at its end.
    """
    actor = (folder / "actor").is_dir() if probing else has_trained(folder)
    return actor and all(is_archive(file) for file in folder.glob("data*.pt"))


def require_whole(folder: Path) -> None:
    """Refuse a ``global_step_N`` folder whose save did not come to its end.

    Raises:
        ConfigurationError: naming the file that is cut.
    """
    for file in sorted(folder.glob("data*.pt")):
        if not is_archive(file):
            raise ConfigurationError(
                f"checkpoint: {str(file)!r} cannot be read (it is cut), so the save of this step did not come to its "
                f"end; resume from another step, or {START_AFRESH}",
                see="checkpoint-cannot-be-read",
            )


def check_earlier_checkpoint(config: DictConfig, hybrid: HybridLoraConfig) -> None:
    """Refuse to resume what this run cannot go on from, as far as this machine sees it; the workers look again.

    Args:
        config: the composed configuration.
        hybrid: its ``hybrid_lora`` node, with the allocation if there is one.

    Raises:
        ConfigurationError: the checkpoint is of a run without hybrid_lora, under another setting or of another number
            of ranks, or its weights would not be loaded.
    """
    folder = checkpoint_to_resume(config)
    if folder is None:
        _warn_of_mixing(config)
        return
    require_whole(folder)
    actor = actor_folder(folder)
    require_hybrid(actor)
    if not _holds_first_ranks_part(actor):
        return
    kind = kind_of_run(config)
    contents = kind.select(config, LOAD_CONTENTS)
    require_weights(["model"] if contents is None else list(contents), actor, kind)
    _require_same_ranks(actor, config, kind)
    allocation = _allocation(hybrid)
    if allocation is not None:
        rank, alpha = (kind.select(config, f"{MODEL}lora_{name}") for name in ("rank", "alpha"))
        require_same_setting(actor / FOLDER, allocation, rank, alpha)
        require_same_moves(actor / FOLDER, hybrid.zeroth_order.enabled)
    dtype = kind.select(config, ROLLOUT + "dtype")
    if (actor / FOLDER).is_dir() and dtype in ("bfloat16", "float16"):
        require_same_rounding(actor / FOLDER, dtype, Rounding(hybrid.sync_rounding, hybrid.sync_seed))


def actor_folder(folder: Path) -> Path:
    """Where the trained model of a ``global_step_N`` folder is: in there for verl's trainer on labelled rows, which
    trains nothing else."""
    own = folder.is_dir() and any(_SHARD.fullmatch(file.name) or file.name == FOLDER for file in folder.iterdir())
    return folder if own else folder / "actor"


def require_hybrid(actor: Path) -> None:
    """Refuse a checkpoint that a run without hybrid_lora saved.

    Rank 0 writes the folder ``hybrid_lora``. Where nothing of its is, on a node with a disk of its own, another one
    has to tell.

    Args:
        actor: folder of the actor's checkpoint.

    Raises:
        ConfigurationError: naming the folder, and how to start afresh.
    """
    if (actor / FOLDER).is_dir() or not _holds_first_ranks_part(actor):
        return
    kind = "of plain LoRA" if (actor / "lora_train_meta.json").is_file() else "without +hybrid_lora=enabled"
    raise ConfigurationError(
        f"checkpoint: {str(actor)!r} holds no {FOLDER}, so a run {kind} saved it, and its weights fit no hybrid model; "
        f"{START_AFRESH}",
        see="checkpoint-of-a-run-without-hybrid-lora",
    )


def require_weights(contents: Collection[str], actor: Path, kind: RunKind = REINFORCEMENT_LEARNING) -> None:
    """Refuse to resume a checkpoint without its weights: the base model would train on under the checkpoint's step.

    Args:
        contents: ``actor_rollout_ref.actor.checkpoint.load_contents``, which follows ``save_contents``.
        actor: folder of the actor's checkpoint.
        kind: of the run, for the setting's name.

    Raises:
        ConfigurationError: ``model`` is not among them.
    """
    if "model" not in contents:
        raise ConfigurationError(
            f"{kind.place(LOAD_CONTENTS)}: {list(contents)} leaves out the weights of "
            f"{str(actor)!r}, and the base model would go on from that step; add model if the checkpoint has it, or "
            f"{START_AFRESH}",
            see="resume-without-weights",
        )


def _require_same_ranks(actor: Path, config: DictConfig, kind: RunKind) -> None:
    ranks = kind.ranks(config)
    said = f"this run has {ranks} rank{'s' * (ranks > 1)}"
    if kind.samples:
        nodes, devices = (OmegaConf.select(config, f"trainer.{name}") for name in ("nnodes", "n_gpus_per_node"))
        said = f"trainer.n_gpus_per_node: {devices} on trainer.nnodes={nodes} makes {ranks} ranks"
    if kind.samples and is_trainable(actor / FOLDER):
        return  # whole tensors, which any number of ranks shares out
    saved = {int(found[1]) for file in actor.iterdir() if (found := _SHARD.fullmatch(file.name))}
    if saved and ranks not in saved:
        raise ConfigurationError(
            f"{said}, and the checkpoint in {str(actor)!r} has the shards of {min(saved)}, of which each rank resumes "
            f"its own; start that many, or {START_AFRESH}",
            see="checkpoint-of-another-number-of-ranks",
        )


def _holds_first_ranks_part(actor: Path) -> bool:
    """Whether anything is there besides the shards of other ranks."""
    if not actor.is_dir():
        return False
    shards = [(_SHARD.fullmatch(file.name)) for file in actor.iterdir()]
    return any(found is None or found[2] == "0" for found in shards)


def _allocation(hybrid: HybridLoraConfig) -> Allocation | None:
    """The one that the run trains under, unless it has to be probed for."""
    path = Path(hybrid.allocation or hybrid.output_dir)
    if not hybrid.allocation and not (path / ALLOCATION_FILE).exists():
        return None
    with explained(otherwise="allocation-cannot-be-read"):
        return load_allocation(path)


def _warn_of_mixing(config: DictConfig) -> None:
    """Say it where a run that starts afresh would write its checkpoints among those of another one."""
    # SFT's trainer saves its last step whatever the frequency, which may be a word.
    if kind_of_run(config).samples and (OmegaConf.select(config, "trainer.save_freq") or -1) <= 0:
        return
    checkpoints = _checkpoints(config)
    step = _last_step(checkpoints)
    if step is None:
        return
    warning = (
        f"WARNING: trainer.resume_mode: this run starts afresh, and its checkpoints go to "
        f"{str(checkpoints)!r}, among those of an earlier run, of which global_step_{step} is the last: those of the "
        f"same steps and {TRACKER} are overwritten; give trainer.default_local_dir=NEW to keep both"
    )
    tell(with_reference(warning, "checkpoints-of-two-runs-in-one-folder"))


def _checkpoints(config: DictConfig) -> Path:
    return Path(str(OmegaConf.select(config, "trainer.default_local_dir")))


def _last_step(checkpoints: Path) -> str | None:
    """What verl's tracker says, None where there is none."""
    tracker = checkpoints / TRACKER
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else None
