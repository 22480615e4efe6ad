"""What training changed, and nothing else, as safetensors and JSON beside a checkpoint.

    hybrid_lora/
      trainables.safetensors   fp32: full weights under their plain names; LoRA factors as
                               `<module>.lora_A.weight` [r, d_in] and `<module>.lora_B.weight` [d_out, r]
      trainables.json          base model and its type, rank, alpha, step, how rollout weights are rounded
      allocation.json          the allocation the run trained under
      zeroth_order.json        where frozen weights moved without a gradient: every move (``zeroth_order.move_log``)
      base_weights.json        what tells the base model's weights from others (``recorded_base``)

The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.storage import load_allocation
from hybrid_lora_plugin.config import ROUNDINGS
from hybrid_lora_plugin.errors import ConfigurationError, explained
from hybrid_lora_plugin.files import complete_folder
from hybrid_lora_plugin.training.recorded_base import write_base_weights
from hybrid_lora_plugin.training.rounding import Rounding
from hybrid_lora_plugin.training.zeroth_order.move_log import MOVES, MoveLog

FOLDER = "hybrid_lora"
TENSORS, DESCRIPTION, ALLOCATION = "trainables.safetensors", "trainables.json", "allocation.json"
SCHEMA_VERSION = 3
#: of a checkpoint whose base weights have moved: a reader that does not know of moves must not take it
MOVED_VERSION = 4
#: by version, what its description does not say yet: 1 knew no rounding of rollout weights, so it was to nearest
_NOT_SAID = {
    1: {
        "rollout_dtype": None,
        "rounding_mode": "nearest",
        "rounding_seed": 0,
        "base_dtype": None,
        "zeroth_order": False,
    },
    2: {"base_dtype": None, "zeroth_order": False},
    SCHEMA_VERSION: {"zeroth_order": False},
    MOVED_VERSION: {"zeroth_order": True},
}


@dataclass(frozen=True)
class CheckpointDescription:
    """The JSON beside the tensors: what they belong to."""

    base_model: str
    rank: int
    alpha: int
    global_step: int
    #: type of the rollout engine's weights, e.g. "bfloat16"; None where the checkpoint does not say
    rollout_dtype: str | None = None
    rounding_mode: str = "nearest"
    rounding_seed: int = 0
    #: type in which the run held the base model's weights, which loses nothing of the checkpoint's; None where the
    #: checkpoint does not say
    base_dtype: str | None = None
    #: what a model card says of the training: ``run``, its kind, and the rates ``full_lr`` and ``lora_lr``; None where
    #: the checkpoint does not say
    recipe: dict | None = None
    #: whether frozen weights move by zeroth order, and ``zeroth_order.json`` has the moves
    zeroth_order: bool = False

    @property
    def schema_version(self) -> int:
        """Of the JSON."""
        return MOVED_VERSION if self.zeroth_order else SCHEMA_VERSION

    @property
    def scaling(self) -> float:
        """alpha / rank, PEFT's LoRA scaling."""
        return self.alpha / self.rank

    @property
    def rounding(self) -> Rounding:
        """How the run's syncs round weights of 16 bits."""
        return Rounding(self.rounding_mode, self.rounding_seed)


def save_trained(
    folder: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    description: CheckpointDescription,
    allocation_json: str,
    base_weights: dict[str, str] | None = None,
    moves: MoveLog | None = None,
) -> Path:
    """Write ``<folder>/hybrid_lora``; an older one there is replaced only once the new one is complete.

    Args:
        folder: checkpoint folder of the actor.
        tensors: fp32 CPU tensors by the names above.
        description: what they belong to.
        allocation_json: text of the allocation file to keep beside them.
        base_weights: ``base_identity.weight_digests`` of the base model as the run loaded it, where they are known.
        moves: of the frozen weights, where ``description.zeroth_order``.
    """
    target = Path(folder) / FOLDER
    with complete_folder(target, replace=True) as unfinished:
        save_file(tensors, unfinished / TENSORS, metadata={"format": "pt"})
        content = asdict(description) | {"schema_version": description.schema_version}
        # The version says it.
        del content["zeroth_order"]
        (unfinished / DESCRIPTION).write_text(json.dumps(content, indent=2) + "\n")
        (unfinished / ALLOCATION).write_text(allocation_json)
        write_base_weights(unfinished, base_weights)
        if moves is not None:
            moves.save(unfinished / MOVES)
    return target


def _checked(description: CheckpointDescription) -> CheckpointDescription:
    """``description`` if its values can be what a run has written; ValueError names the first that cannot."""
    types = (None, "float32", "bfloat16", "float16")
    allowed = {
        "base_model": isinstance(description.base_model, str),
        "rank": _is_count(description.rank) and description.rank > 0,
        "alpha": _is_count(description.alpha),
        "global_step": _is_count(description.global_step),
        "rounding_mode": description.rounding_mode in ROUNDINGS,
        "rounding_seed": _is_count(description.rounding_seed),
        "rollout_dtype": description.rollout_dtype in types,
        "base_dtype": description.base_dtype in types,
    }
    for name, holds in allowed.items():
        if not holds:
            raise ValueError(f"{name} is {getattr(description, name)!r}")
    return description


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def load_description(folder: Path) -> CheckpointDescription:
    """Read the JSON of a ``hybrid_lora`` folder.

    Raises:
        ConfigurationError: missing or not understood.
    """
    try:
        raw = json.loads((folder / DESCRIPTION).read_text())
        version = raw.pop("schema_version", None)
        if version not in _NOT_SAID:
            raise ValueError(f"schema_version is {version!r}, wanted {SCHEMA_VERSION}")
        raw |= _NOT_SAID[version]
        # Nothing but a card depends on the recipe, so it is no reason for another version.
        raw.setdefault("recipe", None)
        names = [f.name for f in fields(CheckpointDescription)]
        return _checked(CheckpointDescription(**{name: raw[name] for name in names}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigurationError(
            f"checkpoint: {str(folder)!r} cannot be read ({error}); use another checkpoint",
            see="checkpoint-cannot-be-read",
        ) from error


def require_same_setting(folder: Path, allocation: Allocation, rank: int, alpha: int) -> None:
    """Refuse to resume a checkpoint under a setting that would make another model of its weights.

    Args:
        folder: the checkpoint's ``hybrid_lora`` folder.
        allocation, rank, alpha: of the run that resumes.

    Raises:
        ConfigurationError: modules are assigned differently, or the adapters would be scaled differently.
    """
    with explained(otherwise="checkpoint-cannot-be-read"):
        saved, description = load_allocation(folder / ALLOCATION), load_description(folder)
    if (saved.full_names, saved.lora_names) != (allocation.full_names, allocation.lora_names):
        raise ConfigurationError(
            f"hybrid_lora.allocation: it assigns modules differently from the checkpoint in {str(folder)!r}; resume "
            f"with hybrid_lora.allocation={folder / ALLOCATION}",
            see="checkpoint-of-another-setting",
        )
    if (description.rank, description.alpha) != (rank, alpha):
        raise ConfigurationError(
            f"hybrid_lora.lora: rank {rank} and alpha {alpha} differ from the checkpoint in {str(folder)!r}; resume "
            f"with hybrid_lora.lora.rank={description.rank} hybrid_lora.lora.alpha={description.alpha}",
            see="checkpoint-of-another-setting",
        )


def load_moves(folder: Path) -> MoveLog | None:
    """The moves of the frozen weights of a checkpoint; None where they are the base model's.

    Args:
        folder: the checkpoint's ``hybrid_lora`` folder.

    Raises:
        ConfigurationError: the description or the log is missing or not understood.
    """
    if not load_description(folder).zeroth_order:
        return None
    with explained(otherwise="checkpoint-cannot-be-read"):
        return MoveLog.load(folder / MOVES)


def require_same_moves(folder: Path, enabled: bool) -> None:
    """Refuse to go on without zeroth order from frozen weights that have moved: later checkpoints would not say so.

    Args:
        folder: the checkpoint's ``hybrid_lora`` folder.
        enabled: ``hybrid_lora.zeroth_order.enabled`` of the run that resumes.

    Raises:
        ConfigurationError: the frozen weights have moved, and this run would not move them.
    """
    if not enabled and load_description(folder).zeroth_order:
        raise ConfigurationError(
            f"hybrid_lora.zeroth_order.enabled: False, and the frozen weights of the checkpoint in {str(folder)!r} "
            "move by zeroth order; resume with hybrid_lora.zeroth_order.enabled=true and the run's other options of it",
            see="checkpoint-of-another-setting",
        )


def require_same_rounding(folder: Path, rollout_dtype: str, rounding: Rounding) -> None:
    """Refuse to resume where rollouts in 16 bits, and a model exported in them, would be rounded otherwise.

    Args:
        folder: the checkpoint's ``hybrid_lora`` folder.
        rollout_dtype, rounding: of the run that resumes.

    Raises:
        ConfigurationError: mode or seed are others than in the run that saved the checkpoint, or the description is
            missing or not understood.
    """
    before = load_description(folder)
    seeds = before.rounding_mode == rounding.mode == "stochastic"
    same = before.rounding_mode == rounding.mode and (not seeds or before.rounding_seed == rounding.seed)
    if same or rollout_dtype == "float32":
        return
    raise ConfigurationError(
        f"hybrid_lora.sync_rounding: {rounding.mode} with sync_seed {rounding.seed} rounds {rollout_dtype} weights "
        f"otherwise than the run that saved the checkpoint {str(folder)!r}; resume with "
        f"hybrid_lora.sync_rounding={before.rounding_mode} hybrid_lora.sync_seed={before.rounding_seed}",
        see="checkpoint-of-another-setting",
    )


def other_rounding(folder: Path, rollout_dtype: str, rounding: Rounding) -> str | None:
    """What a resumed run has to be told where its rollout weights are rounded otherwise than those of the run before.

    No weight that trains depends on it, so it is no reason to refuse.

    Args:
        folder: the checkpoint's ``hybrid_lora`` folder.
        rollout_dtype, rounding: of the run that resumes.

    Returns:
        One line that names each setting with both values and what follows; None where both round alike.

    Raises:
        ConfigurationError: the description is missing or not understood.
    """
    before = load_description(folder)
    settings = {
        # One from before types were recorded cannot be compared.
        "actor_rollout_ref.rollout.dtype": (before.rollout_dtype or rollout_dtype, rollout_dtype),
        "hybrid_lora.sync_rounding": (before.rounding_mode, rounding.mode),
    }
    if before.rounding_mode == rounding.mode == "stochastic":
        settings["hybrid_lora.sync_seed"] = (before.rounding_seed, rounding.seed)
    changed = {name: values for name, values in settings.items() if values[0] != values[1]}
    if not changed:
        return None
    found = " and ".join(f"{name} is {now} and was {then}" for name, (then, now) in changed.items())
    if "actor_rollout_ref.rollout.dtype" in changed or rollout_dtype != "float32":
        follows = "from here on rollouts differ from those that the run before would have made, and a model exported"
    else:
        follows = "float32 rollouts stay as they would have been, but a model exported in 16 bits"
    way_back = " ".join(f"{name}={then}" for name, (then, _) in changed.items())
    return (
        f"{found} in the run that saved the checkpoint {str(folder)!r}: {follows} from a later checkpoint is rounded "
        f"by this run's settings; to go on as before give {way_back}"
    )


def _find(folder: Path) -> Path | None:
    tried = [folder, folder / FOLDER, folder / "actor" / FOLDER]
    return next((path for path in tried if (path / TENSORS).is_file()), None)


def has_trained(folder: str | os.PathLike) -> bool:
    """Whether ``load_trained`` finds something there: the last thing that is written of an actor's checkpoint."""
    return _find(Path(folder)) is not None


def load_trained(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], CheckpointDescription, Path]:
    """Read what ``save_trained`` wrote.

    Args:
        folder: the ``hybrid_lora`` folder, the actor's checkpoint folder, or a ``global_step_N`` folder.

    Returns:
        The tensors, the description, and the path of the allocation file.

    Raises:
        ConfigurationError: nothing there, or not readable.
    """
    folder = Path(folder)
    found = _find(folder)
    if found is None:
        raise ConfigurationError(
            f"checkpoint: {str(folder)!r} holds no {FOLDER}/{TENSORS}; give a global_step_N folder that a run with "
            "+hybrid_lora=enabled saved",
            see="checkpoint-cannot-be-read",
        )
    description = load_description(found)
    try:
        return load_file(found / TENSORS), description, found / ALLOCATION
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"checkpoint: {str(found)!r} cannot be read ({error}); use another checkpoint",
            see="checkpoint-cannot-be-read",
        ) from error
