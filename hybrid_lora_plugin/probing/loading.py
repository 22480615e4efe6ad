"""Loading the model and tokenizer to probe, with one-line errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrid_lora_plugin.config import ModelConfig
from hybrid_lora_plugin.probing.errors import ProbeError


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of ``config.path``.

    Raises:
        ProbeError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, config, "tokenizer")


def load_model(config: ModelConfig, device: torch.device) -> nn.Module:
    """The model of ``config.path`` on a device, in ``config.dtype``.

    Raises:
        ProbeError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return _load(AutoModelForCausalLM, config, "model", dtype=getattr(torch, name)).to(device)


def _load(factory: Any, config: ModelConfig, what: str, **options: Any) -> Any:
    if config.gguf_file:
        options["gguf_file"] = config.gguf_file
    try:
        return factory.from_pretrained(config.path, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProbeError(
            f"model.path: the {what} of {config.path!r} cannot be loaded ({reason}); give a Hugging Face folder or name"
        ) from error
