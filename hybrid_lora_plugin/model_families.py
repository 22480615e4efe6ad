"""Which models can be trained: the families that a test takes all the way, and what is refused by how it is built.

What is refused is told from a config, and from the modules of a model on any device, meta included: a name of a family
says nothing about a checkpoint that somebody derived from it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hybrid_lora_plugin.errors import ConfigurationError

#: ``model_type`` of every family that ``tests/test_model_families.py`` takes from the probe to the export, with the
#: name that people know it by
FAMILIES = {
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "llama": "Llama, SmolLM2",
    "mistral": "Mistral",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text only",
    "granite": "Granite",
    "olmo2": "OLMo 2",
    "smollm3": "SmolLM3",
    "seed_oss": "Seed-OSS",
    "phi3": "Phi-3",
    "glm": "GLM-4-9B (glm)",
    "glm4": "GLM-4-0414 (glm4)",
    "falcon_h1": "Falcon-H1",
    "qwen3_5_text": "Qwen3.5, text only",
}
#: of these, those with recurrent layers beside attention
RECURRENT_FAMILIES = ("falcon_h1", "qwen3_5_text")
_WAY_OUT = "give a text-only dense decoder, docs/models.md lists the families"
#: fields in which configs say how many experts a layer has
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: parameters by which state-space and linear-attention layers keep their decay, in every implementation of them
_DECAYS = ("A_log", "dt_bias")


def untried(config: Any) -> str | None:
    """One line where no test takes the family of a Hugging Face config all the way; None where one does."""
    if config.model_type in FAMILIES:
        return None
    return (
        f"{_name_of(config)}: found by its structure; no test takes a model of this family ({config.model_type}) "
        f"from the probe to the export, see docs/models.md"
    )


def refuse_config(config: Any) -> None:
    """Refuse a model for what its config says, before it is built.

    Args:
        config: a ``transformers.PretrainedConfig``.

    Raises:
        ConfigurationError: it is quantised, multimodal, an encoder with a decoder, a mixture of experts, or recurrent.
    """
    name = _name_of(config)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        refuse_quantised(name, str(method or "unknown method"))
    parts = sorted(
        field for field, value in vars(config).items() if field.endswith("_config") and hasattr(value, "model_type")
    )
    if parts:
        raise ConfigurationError(
            f"model: {name} is multimodal, with {', '.join(parts)} in its config; which of its parts train and how "
            f"they are named in the rollout engine is not known here; {_text_model_alone(config) or _WAY_OUT}",
            see="multimodal-model-not-supported",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(
            f"model: {name} has an encoder beside its decoder; {_WAY_OUT}", see="multimodal-model-not-supported"
        )
    experts = [field for field in _EXPERTS if isinstance(value := getattr(config, field, None), int) and value > 1]
    if experts:
        _refuse_experts(name, f"{experts[0]}={getattr(config, experts[0])}")
    recurrent = recurrent_layers(config)
    if recurrent and config.model_type not in RECURRENT_FAMILIES:
        _refuse_recurrent(name, f"layers of type {', '.join(recurrent)} in its config")
    if config.model_type == "falcon_h1" and config.mamba_rms_norm and config.mamba_norm_before_gate:
        raise ConfigurationError(
            f"model: {name} normalises its recurrent output before the gate (mamba_rms_norm=True, "
            f"mamba_norm_before_gate=True): transformers computes that, and vLLM gates first whatever the config says; "
            f"give a Falcon-H1 with mamba_norm_before_gate=False",
            see="recurrent-model-not-supported",
        )


def recurrent_layers(config: Any) -> list[str]:
    """Types of recurrent layers that a config names, each once; empty where all layers are of attention.

    Args:
        config: a ``transformers.PretrainedConfig`` of a decoder.
    """
    # Full, sliding and chunked attention keep nothing from one packed row to the next.
    kinds = getattr(config, "layer_types", None) or ()
    return sorted({kind for kind in kinds if kind.startswith("linear") or not kind.endswith("attention")})


def refuse_structure(model: nn.Module) -> None:
    """Refuse a model for the modules it is made of.

    Args:
        model: a plain Hugging Face model, on any device, meta included.

    Raises:
        ConfigurationError: it has experts, recurrent layers, or what ``refuse_config`` refuses.
    """
    config = getattr(model, "config", None)
    if config is not None:
        refuse_config(config)
    name = type(model).__name__
    known = getattr(config, "model_type", None) in RECURRENT_FAMILIES
    for path, module in model.named_modules():
        if known and isinstance(module, nn.Conv1d):
            continue
        if isinstance(module, nn.Conv1d):
            _refuse_recurrent(name, f"a convolution over the sequence, {path}")
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts":
            _refuse_experts(name, path)
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf in _DECAYS and not known:
                _refuse_recurrent(name, f"a recurrent state, {path}.{leaf}")
            if parameter.dim() > 2 and not isinstance(module, nn.Conv2d | nn.Conv3d):
                _refuse_experts(name, f"{path}.{leaf}")


def refuse_quantised(name: str, method: str) -> None:
    """Raise the error for a checkpoint whose weights are quantised.

    Args:
        name: of the model, for the message.
        method: of its quantisation.
    """
    raise ConfigurationError(
        f"model: {name} is quantised ({method}): its weights can neither be trained nor compared with what the rollout "
        f"engine holds; give the checkpoint it was made from, in bfloat16, float16 or float32",
        see="quantised-checkpoint",
    )


def _name_of(config: Any) -> str:
    return (getattr(config, "architectures", None) or [type(config).__name__])[0]


def _text_model_alone(config: Any) -> str | None:
    """The way out for a multimodal config whose text model is a family of its own, and what transformers loads of it
    as a causal language model; None for the others."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    kind = getattr(getattr(config, "text_config", None), "model_type", None)
    if kind not in FAMILIES or CLASSES.get(config.model_type) != CLASSES[kind]:
        return None
    return f"save its text model alone ({CLASSES[kind]}) and give that folder, docs/models.md has the command"


def _refuse_recurrent(name: str, what: str) -> None:
    raise ConfigurationError(
        f"model: {name} has {what}: of recurrent families those that were tried are let in, because a state may go on "
        f"from one packed row into the next and weights may be held transformed; {_WAY_OUT}",
        see="recurrent-model-not-supported",
    )


def _refuse_experts(name: str, where: str) -> None:
    raise ConfigurationError(
        f"model: {name} is a mixture of experts ({where}): vLLM packs experts once and a later sync writes plain "
        f"weights into packed memory, so that rollouts are wrong without an error (vllm#42821); {_WAY_OUT}",
        see="mixture-of-experts-not-supported",
    )
