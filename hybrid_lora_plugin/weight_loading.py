"""What transformers would make of a checkpoint, read from its own loading report before any weight is.

transformers fills what it does not find with random numbers, leaves out what it does not know, and says so in a
warning. Neither is the model that the folder describes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hybrid_lora_plugin.base_checkpoint import refuse_adapter
from hybrid_lora_plugin.checkpoint_tensors import StoredTensor, stored_tensors
from hybrid_lora_plugin.errors import ConfigurationError, reason_of

#: what wrappers put before every name: torch.compile, data parallel, PEFT, FSDP
_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.")
#: names that a message lists
_NAMED = 2
#: what the text model's names begin with in a multimodal model
_IN_MULTIMODAL = "model.language_model."


def check_weights(path: str | Path, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint whose weights are not those of the model that its config describes.

    It is loaded on the meta device, by transformers' own rules for names: tied weights and buffers that are computed
    may be absent, and families may have names of their own.

    Args:
        path: folder of a checkpoint, or a name on the Hugging Face hub, whose files are then fetched.
        trust_remote_code: as in transformers.

    Raises:
        ConfigurationError: a weight is missing, belongs to no part of the model, or has another shape; or an adapter
            lies beside them; or it cannot be read; or its weights are named as those of a multimodal model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quiet(), TiedOnMeta():
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                trust_remote_code=trust_remote_code,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        # Libraries below transformers, and a model's own code, have errors of every kind for what they cannot read.
        raise ConfigurationError(
            f"model: {str(path)!r} cannot be loaded ({reason_of(error)}); give a checkpoint that transformers loads",
            see="checkpoint-does-not-fit-its-config",
        ) from error
    refuse_loaded_adapter(path, model)
    refuse_report(path, report)
    if Path(path).is_dir():
        _refuse_other_tied(Path(path), getattr(model, "all_tied_weights_keys", {}))
        _refuse_multimodal_names(Path(path), model)


def refuse_loaded_adapter(path: str | Path, model: torch.nn.Module) -> None:
    """Refuse a model that transformers has put an adapter on, which it found beside the weights, also on a hub.

    Args:
        path: of the checkpoint, for the message.
        model: as loaded.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        refuse_adapter(str(path))


def refuse_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Refuse what transformers' loading report says of a checkpoint.

    Args:
        path: of the checkpoint, for the message.
        report: what ``from_pretrained(..., output_loading_info=True)`` returns beside the model.

    Raises:
        ConfigurationError: naming the first weights of each kind and how many there are.
    """
    missing, unexpected = sorted(report.get("missing_keys", ())), sorted(report.get("unexpected_keys", ()))
    shapes = [
        f"{name} {list(stored)} in the files and {list(wanted)} in the model"
        for name, stored, wanted in sorted(report.get("mismatched_keys", ()))
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights of the model are in none of its files ({_first(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} tensors in its files belong to no part of the model ({_first(unexpected)})")
    if shapes:
        parts.append(f"{len(shapes)} weights have another shape than its config says ({_first(shapes)})")
    if errors := report.get("error_msgs"):
        parts.append(" ".join(str(errors[0]).split()))
    if not parts:
        return
    wrapper = next((prefix for prefix in _WRAPPERS if unexpected and unexpected[0].startswith(prefix)), None)
    if wrapper:
        way_out = f"save it again without {wrapper!r} before the names, as the model inside the wrapper"
    else:
        way_out = "give the checkpoint and the config.json that belong together, with all weights and no others"
    raise ConfigurationError(
        f"model: {str(path)} is not the model of its config.json: {'; '.join(parts)}; {way_out}",
        see="checkpoint-does-not-fit-its-config",
    )


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _refuse_other_tied(folder: Path, tied: Mapping[str, str]) -> None:
    """Refuse a head of its own under a config that ties it: transformers would keep it, and vLLM would leave it out."""
    stored = stored_tensors(folder)
    for target, source in tied.items():
        if target in stored and source in stored and not _equal(stored[target], stored[source]):
            raise ConfigurationError(
                f"model: {folder} has other values in {target} than in {source}, which its config.json ties to each "
                f"other; write tie_word_embeddings: false there, or leave {target} out of the files",
                see="checkpoint-does-not-fit-its-config",
            )


def _refuse_multimodal_names(folder: Path, model: torch.nn.Module) -> None:
    """Refuse a text model under the names of the multimodal one that it comes from: transformers reads and by default
    writes it so, and a sync and the rollout engine's checkpoint would have no name in common."""
    name = next((name for name in sorted(stored_tensors(folder)) if name.startswith(_IN_MULTIMODAL)), None)
    if name is not None and not any(own.startswith(_IN_MULTIMODAL) for own, _ in model.named_parameters()):
        raise ConfigurationError(
            f"model: {folder} names its weights as the multimodal model does that it comes from ({name}), and "
            f"{type(model).__name__} names them model.…; save it again with "
            f"save_pretrained(FOLDER, save_original_format=False), docs/models.md has the command",
            see="multimodal-model-not-supported",
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.end - one.begin
        while left:
            block = min(left, 1 << 24)
            if first.read(block) != second.read(block):
                return False
            left -= block
    return True


class TiedOnMeta(TorchFunctionMode):
    """While entered, transformers ties weights on the meta device, where it cannot compare them, as it does for a
    checkpoint that holds both."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.equal and args[0].is_meta:
            return True
        return function(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report and bar: what matters of it is said in one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
