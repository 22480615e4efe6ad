"""Loading the model and tokenizer to probe, with one-line errors, and noticing when the checkpoint changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.base_checkpoint import check_model_folder
from hybrid_lora_plugin.candidates import find_candidates, meta_model
from hybrid_lora_plugin.config import ModelConfig
from hybrid_lora_plugin.errors import ProbeError, reason_of
from hybrid_lora_plugin.weight_loading import check_weights, refuse_loaded_adapter, refuse_report

#: names of the files that tokenizers are made of
_TOKENIZERS = ("tokenizer*", "*.model", "vocab*", "*.tiktoken", "merges.txt")
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of ``config.path``.

    Raises:
        ProbeError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, config, "tokenizer")


def load_model_config(config: ModelConfig) -> Any:
    """The Hugging Face config of ``config.path``.

    Raises:
        ProbeError: it cannot be loaded.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, config, "model")


def check_model_files(config: ModelConfig, loads: bool = True) -> None:
    """Refuse a path that is no model, and a folder whose files cannot be used, before anything is loaded.

    Args:
        config: of the model.
        loads: whether weights and tokenizer are needed; a choice without a probe reads the config alone.

    Raises:
        ConfigurationError: naming what is missing or not usable.
    """
    path = str(config.path)
    if os.path.isdir(path):
        if config.gguf_file:
            if not (Path(path) / config.gguf_file).is_file():
                raise ProbeError(
                    f"model.gguf_file: {config.gguf_file!r} is not in {path}; give the name of a file there"
                )
        else:
            # transformers reads other formats too; what the rollout engine needs is asked for where there is one.
            check_model_folder(path, safetensors=False, weights=loads)
            # transformers would make one up from the config, without a single token.
            if loads and not any(file for pattern in _TOKENIZERS for file in Path(path).glob(pattern)):
                raise ProbeError(f"model.path: {path!r} has no tokenizer; put its files there, such as tokenizer.json")
    elif os.path.lexists(path):
        raise ProbeError(f"model.path: {path!r} is no folder; give the folder with config.json and the weights")
    elif path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ProbeError(f"model.path: there is no folder {path!r}; give a Hugging Face folder or name")


def check_model(config: ModelConfig) -> None:
    """Refuse a model that cannot be trained before its weights are read.

    Raises:
        ConfigurationError: its files, its structure or the names of its weights are refused, or its config cannot be
            loaded.
    """
    check_model_files(config)
    find_candidates(meta_model(load_model_config(config), config.trust_remote_code))
    if os.path.isdir(config.path) and not config.gguf_file:
        check_weights(config.path, config.trust_remote_code)


def load_model(config: ModelConfig, device: torch.device) -> nn.Module:
    """The model of ``config.path`` on the CPU, in the ``config.dtype`` that is meant for ``device``.

    Raises:
        ConfigurationError: it cannot be loaded, or what was loaded is not what the checkpoint's config describes.
    """
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, probed_dtype(config, device))
    model, report = _load(AutoModelForCausalLM, config, "model", dtype=dtype, output_loading_info=True)
    refuse_loaded_adapter(config.path, model)
    refuse_report(config.path, report)
    return model


def probed_dtype(config: ModelConfig, device: torch.device) -> str:
    """Name of the dtype that the base is held and computed in on ``device``."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if device.type == "cpu" else "bfloat16"


def _load(factory: Any, config: ModelConfig, what: str, **options: Any) -> Any:
    if config.gguf_file:
        options["gguf_file"] = config.gguf_file
    try:
        return factory.from_pretrained(config.path, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:
        # Libraries below transformers, and a model's own code, have errors of every kind for what they cannot read.
        raise ProbeError(
            f"model.path: the {what} of {config.path!r} cannot be loaded ({reason_of(error)}); give a Hugging Face "
            f"folder or name"
        ) from error


def parameter_count(model: nn.Module) -> int:
    """All parameters of a model, tied ones once; with FSDP2 the global count."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """SHA-256 over an exact checksum of every parameter: equal weights give equal digests on every device.

    The checksum of a tensor is the sum of its bit patterns as integers, which no order of addition changes.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {_checksum(parameter.detach())}\n".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    bits = tensor.contiguous().view(_INTEGER_OF_SIZE[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def checkpoint_fingerprint(path: str) -> str | None:
    """SHA-256 that tells the weight files of one local checkpoint from another's, without reading all of them.

    Over the size of each file and 64 blocks of 64 KiB spread over it: two trainings of one model differ in them, and
    a copy in another folder does not.

    Args:
        path: folder of a checkpoint.

    Returns:
        64 hexadecimal digits; None if ``path`` is no local folder with weight files.
    """
    folder, digest = Path(path).expanduser(), hashlib.sha256()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    weights = [file for file in files if file.suffix in (".safetensors", ".bin", ".gguf")]
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for block in range(64):
                stream.seek(block * max(0, size - 65536) // 63)
                digest.update(stream.read(65536))
    return digest.hexdigest() if weights else None


class CheckpointWatch:
    """Notices when the files of a local checkpoint are not the ones that were loaded."""

    _SUFFIXES = (".safetensors", ".bin", ".gguf", ".json")

    def __init__(self, path: str) -> None:
        """Take note of the files in folder ``path``; a name on a hub has none to watch."""
        self._folder = Path(path)
        self._before = self._files()

    def _files(self) -> dict[str, tuple[int, int]]:
        if not self._folder.is_dir():
            return {}
        stats = {file.name: file.stat() for file in sorted(self._folder.iterdir()) if file.suffix in self._SUFFIXES}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def check(self) -> None:
        """Refuse to go on if something changed.

        Raises:
            ProbeError: naming the first file that appeared, vanished or was written.
        """
        after = self._files()
        for name in sorted(self._before.keys() | after.keys()):
            if self._before.get(name) != after.get(name):
                raise ProbeError(
                    f"model.path: {self._folder / name} changed while it was probed, so the scores are of a model that "
                    f"is no longer there; probe again when nothing writes to {self._folder}"
                )
