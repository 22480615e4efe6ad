"""What the engine loads: a model as it stands, or the base model with the full weights of an adapter's folder.

``hybrid-lora-export format=adapter`` writes a PEFT adapter and, beside it, the weights of the fully tuned modules. The
adapter on the base model alone is another model. So those weights are put into a copy of the base model first, exactly
as they stand, and the engine adds the adapter to that.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hybrid_lora_plugin.base_identity import weights_identity
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.training.adapter_folder import ADAPTER_TENSORS, FULL_WEIGHTS
from hybrid_lora_plugin.training.base_model import UNLOADABLE, BaseModel
from hybrid_lora_plugin.training.model_folder import ModelFolder
from hybrid_lora_plugin.training.rounding import NEAREST, round_weight

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class ServedModel:
    """A model to evaluate.

    Attributes:
        given: as the user gave it.
        path: folder or name that the engine loads; of an adapter's folder only after ``assemble``.
        adapter: folder of a PEFT adapter that the engine adds; None for a model as it stands.
        rank: of the adapter.
        identity: what tells its weights from others; None where that is not known.
        config: of the model, as ``config.json`` has it.
        notes: what is to be said of it, a line each.
    """

    given: str
    path: str
    config: Mapping[str, Any]
    adapter: Path | None = None
    rank: int = 0
    identity: str | None = None
    has_full_weights: bool = False
    trust_remote_code: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def tokenizer(self) -> str:
        """Folder or name with the tokenizer and the chat template."""
        return str(self.adapter) if self.adapter and (self.adapter / "tokenizer_config.json").exists() else self.path

    def end_tokens(self, of_tokenizer: int | None) -> list[int]:
        """Tokens that end a response: the tokenizer's, and those that the model's ``generation_config.json`` names.

        vLLM is kept from that file, in which a chat model may name a second end, as Qwen2.5 does.
        """
        from transformers import GenerationConfig

        try:
            named = GenerationConfig.from_pretrained(self.path).eos_token_id
        except UNLOADABLE:
            named = self.config.get("eos_token_id")
        return sorted({of_tokenizer, *(named if isinstance(named, list) else [named])} - {None})

    def assemble(self, folder: Path) -> None:
        """Make the engine's model where it is not there yet.

        Args:
            folder: for the copy of the base model; whatever is there is removed.

        Raises:
            ConfigurationError: the base model or the full weights cannot be read, or do not fit.
            OSError: the copy cannot be written.
        """
        if not self.has_full_weights:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_with_full_weights(self.path, self.adapter / FULL_WEIGHTS, folder, self.trust_remote_code)
        self.path = str(folder)


def served_model(model: str, trust_remote_code: bool = False) -> ServedModel:
    """Look at what is to be evaluated; no weight is loaded.

    Args:
        model: Hugging Face folder or name, a merged export, or an adapter's folder.
        trust_remote_code: as in transformers.

    Raises:
        ConfigurationError: there is nothing, or nothing that could be served.
    """
    from transformers import AutoConfig

    folder = Path(model).expanduser()
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not folder.is_dir() and (looks_like_a_path or folder.exists()):
        raise ConfigurationError(f"model: there is no folder {model!r}; give a Hugging Face folder or name")
    if folder.is_dir() and (folder / "hybrid_lora" / "trainables.json").exists() or (folder / "actor").is_dir():
        raise ConfigurationError(
            f"model: {model!r} is a checkpoint of a run; export it first with hybrid-lora-export checkpoint={model}"
        )
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else None
    described = _adapter_config(adapter) if adapter else {}
    path = described.get("base_model_name_or_path", model) if adapter else model
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).to_dict()
    except UNLOADABLE as error:
        where = f"the base model {path!r} of the adapter" if adapter else repr(path)
        raise ConfigurationError(
            f"model: {where} cannot be loaded ({_first_line(error)}); give a Hugging Face folder or name that is there"
        ) from error
    if adapter is None:
        return ServedModel(model, path, config, identity=weights_identity(path), trust_remote_code=trust_remote_code)
    return _with_adapter(model, path, config, adapter, described, trust_remote_code)


def _with_adapter(model, path, config, adapter: Path, described, trust_remote_code: bool) -> ServedModel:
    from hybrid_lora_plugin.files import file_sha256

    files = [adapter / ADAPTER_TENSORS, adapter / FULL_WEIGHTS]
    if not files[0].is_file():
        raise ConfigurationError(
            f"model: {str(adapter)!r} holds {ADAPTER_CONFIG} and no {ADAPTER_TENSORS}; export it again"
        )
    full = files[1].is_file()
    identity = "+".join(filter(None, [weights_identity(path), *(file_sha256(file) for file in files if file.exists())]))
    note = (
        f"model: the base model {path} with {FULL_WEIGHTS} put into a copy of it, and the adapter added by vLLM"
        if full
        else f"model: the base model {path} with the adapter alone, as {model} holds no {FULL_WEIGHTS}; of a hybrid "
        "run that is another model than the trained one"
    )
    return ServedModel(
        model, path, config, adapter, int(described["r"]), identity, full, trust_remote_code, notes=[note]
    )


def _adapter_config(adapter: Path) -> dict[str, Any]:
    file = adapter / ADAPTER_CONFIG
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(described["base_model_name_or_path"], str) or not isinstance(described["r"], int):
            raise ValueError("base_model_name_or_path and r are wanted")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"model: {file} is no adapter's configuration ({_first_line(error)}); export it again"
        ) from error
    return described


@torch.no_grad()
def write_with_full_weights(
    base: str, full_weights: Path, folder: Path, trust_remote_code: bool = False, said: Callable = lambda name: None
) -> None:
    """Write a copy of a base model in which some weights are others, in their type.

    Args:
        base: Hugging Face folder or name.
        full_weights: safetensors of plain names; all of one floating type.
        folder: exists and is empty.
        trust_remote_code: as in transformers.
        said: is told each weight that was written.

    Raises:
        ConfigurationError: they cannot be read, or are not weights of that model.
        OSError: the folder cannot be written.
    """
    model = BaseModel(base, None, trust_remote_code)
    try:
        with safe_open(full_weights, framework="pt") as stream:
            names = set(stream.keys())
            shapes = {name: tuple(stream.get_slice(name).get_shape()) for name in names}
            wrong = [n for n in sorted(names) if n not in model.entries or tuple(model.entries[n].shape) != shapes[n]]
            if wrong or not names:
                raise ConfigurationError(
                    f"model: {full_weights} holds {wrong[0] if wrong else 'nothing'}, which is no weight of {base} "
                    "in that shape; export the adapter again, or put its base model where adapter_config.json says"
                )
            dtypes = {stream.get_tensor(name).dtype for name in names}
            floating = [dtype for dtype in dtypes if dtype.is_floating_point]
            target = floating[0] if len(floating) == 1 else torch.float32
            structure = model.structure.to(target)
            structure.config.dtype = target
            output = ModelFolder(folder, structure, model.entries)
            for name in model.entries:
                weight = stream.get_tensor(name) if name in names else model.read(name)
                output.add(name, round_weight(name, weight, target, NEAREST) if weight.is_floating_point() else weight)
                said(name)
            output.finish()
    except SafetensorError as error:
        raise ConfigurationError(
            f"model: {full_weights} cannot be read ({_first_line(error)}); export the adapter again"
        ) from error
    from hybrid_lora_plugin.training.export import load_tokenizer

    load_tokenizer(base, trust_remote_code).save_pretrained(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def remove(folder: Path) -> None:
    """Remove what ``assemble`` wrote."""
    if os.path.lexists(folder):
        shutil.rmtree(folder, ignore_errors=True)
