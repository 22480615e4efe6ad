"""The base model that a checkpoint belongs to, known again by its weights: ``hybrid_lora/base_weights.json``.

The file holds ``base_identity.weight_digests`` of the model as the run loaded it. A checkpoint from before it existed,
or of a base that is not in safetensors, has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from hybrid_lora_plugin.base_checkpoint import check_model_folder
from hybrid_lora_plugin.base_identity import first_difference, weight_digests
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.weight_loading import check_weights

BASE_WEIGHTS = "base_weights.json"


def write_base_weights(folder: Path, digests: Mapping[str, str] | None) -> None:
    """Write the file into a ``hybrid_lora`` folder; nothing where the digests are not known."""
    if digests is not None:
        (folder / BASE_WEIGHTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def read_base_weights(folder: Path) -> dict[str, str] | None:
    """The digests in a ``hybrid_lora`` folder; None where it has none.

    Raises:
        ConfigurationError: the file is damaged.
    """
    file = folder / BASE_WEIGHTS
    if not file.exists():
        return None
    try:
        digests = json.loads(file.read_text(encoding="utf-8"))
        if digests and all(isinstance(digest, str) for digest in digests.values()):
            return digests
        reason = "no digests in it"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error)
    raise ConfigurationError(
        f"checkpoint: {str(file)!r} cannot be read ({reason}); use another checkpoint", see="checkpoint-cannot-be-read"
    )


def require_recorded_base(base: str | os.PathLike, folder: Path, trust_remote_code: bool = False) -> str | None:
    """Refuse a base model other than the one that a checkpoint was trained from.

    A copy elsewhere, in other files or in a wider type is the same model.

    Args:
        base: Hugging Face folder or name.
        folder: the checkpoint's ``hybrid_lora`` folder.
        trust_remote_code: as in transformers.

    Returns:
        One line where nothing can be compared; None where the weights are the ones.

    Raises:
        ConfigurationError: its files cannot be used, are not the model of their config, or hold other weights.
    """
    recorded = read_base_weights(folder)
    if not os.path.isdir(base) and (str(base).startswith(("/", ".", "~")) or str(base).count("/") > 1):
        raise ConfigurationError(
            f"base: there is no folder {str(base)!r}; give base=PATH with a copy of the model the run started from",
            see="checkpoint-of-another-base-model",
        )
    try:
        if os.path.isdir(base):
            check_model_folder(base, safetensors=False)
        check_weights(base, trust_remote_code)
        found = weight_digests(base)
    except ConfigurationError as error:
        # What elsewhere is called the model has another name here.
        raise ConfigurationError.relayed(
            f"base: {str(error).removeprefix('model: ')}", otherwise="checkpoint-of-another-base-model"
        ) from error
    if recorded is None or found is None:
        why = "the checkpoint does not say which weights it was" if recorded is None else "it is not in safetensors"
        return f"base: {str(base)!r} was not compared with the model that the run started from: {why}"
    if difference := first_difference(recorded, found):
        raise ConfigurationError(
            f"base: {str(base)!r} is not the model that the run started from: {difference}; give base=PATH with a copy "
            f"of that one, wherever it lies",
            see="checkpoint-of-another-base-model",
        )
    return None
