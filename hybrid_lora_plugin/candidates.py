"""Which linear modules take part (paper Eq. 2): names, layer, type, component and parameter count.

Candidates are found by structure, not by a list per model family: linear leaves of the decoder stack named
``<prefix>.layers.<i>.<container>.<type>``, where the container tells the component: ``self_attn`` attention, ``mamba``
and ``linear_attn`` recurrence, ``mlp`` and ``feed_forward`` the MLP. ``model_families`` says which families are built
that way, and refuses models with other parts. Everything here works on the meta device.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid_lora_plugin.errors import ConfigurationError, reason_of
from hybrid_lora_plugin.model_families import FAMILIES, recurrent_layers, refuse_config, refuse_structure

# The order in which ties are broken and the heat map is drawn. A type that packs others stands behind them.
TYPE_ORDER = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "in_proj",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
    "out_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)
#: kinds of layer that a decoder is made of
COMPONENTS = ("attention", "recurrent", "mlp")
#: what each type that packs several projections into one weight holds, one below the other
FUSED_TYPES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
COMPONENT_OF_TYPE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"), "attention"),
    **dict.fromkeys(("in_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"), "recurrent"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "down_proj"), "mlp"),
}
CONTAINERS = {"attention": ("self_attn",), "recurrent": ("mamba", "linear_attn"), "mlp": ("mlp", "feed_forward")}
_NAME = re.compile(
    rf"^(?P<stack>(?:.+\.)?layers)\.(?P<layer>\d+)\."
    rf"(?P<container>{'|'.join(name for names in CONTAINERS.values() for name in names)})\.(?P<type>\w+)$"
)
# Mamba-2 in transformers hands this weight to a fused kernel in training: an adapter beside it would be passed over.
_READ_BY_A_KERNEL = re.compile(r"\.mamba\.out_proj$")

# What decides the shape and meaning of the candidate weights. Precision, attention kernel, token ids,
# generation settings and the library version are left out on purpose: they differ between the process
# that probes and the one that trains.
_FINGERPRINT_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "hidden_act",
)
_FINGERPRINT_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
# The same of models with recurrent layers; not asked of others, whose artifacts are older than these.
_RECURRENT_FIELDS = (
    "mamba_d_ssm",
    "mamba_n_heads",
    "mamba_d_head",
    "mamba_n_groups",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "mamba_rms_norm",
    "mamba_norm_before_gate",
    "projectors_bias",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


@dataclass(frozen=True)
class Candidate:
    """One linear module that may be fully fine-tuned or adapted by LoRA.

    Attributes:
        name: name in the plain Hugging Face model, e.g. ``model.layers.0.self_attn.q_proj``.
        layer: index of the decoder layer, from 0.
        type: one of ``TYPE_ORDER``.
        component: one of ``COMPONENTS``.
        parameters: weight plus bias.
        in_features, out_features: d_in and d_out of the weight; 0 where they are not known.
    """

    name: str
    layer: int
    type: str
    component: str
    parameters: int
    in_features: int = 0
    out_features: int = 0

    @property
    def takes_adapter(self) -> bool:
        """Whether LoRA on it is computed; where it is not, a fused kernel reads the weight: fully tuned or frozen."""
        return _READ_BY_A_KERNEL.search(self.name) is None

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a LoRA adapter on this module, ``r (d_in + d_out)``; 0 where it takes none."""
        return rank * (self.in_features + self.out_features) if self.takes_adapter else 0


def tie_break(candidate: Candidate) -> tuple[int, int]:
    """What decides between candidates that are equal otherwise: model order."""
    return candidate.layer, TYPE_ORDER.index(candidate.type)


def find_candidates(model: nn.Module) -> list[Candidate]:
    """All candidate modules of a model, by layer and then by ``TYPE_ORDER``.

    Args:
        model: a plain Hugging Face causal language model, on any device, meta included.

    Returns:
        The M candidates.

    Raises:
        ConfigurationError: the model has none, or has more than one stack of layers that matches, or is of a kind that
            ``model_families`` refuses.
    """
    refuse_structure(model)
    found: dict[str, list[Candidate]] = {}
    for name, module in model.named_modules():
        match = _NAME.match(name)
        if match is None or not isinstance(module, nn.Linear):
            continue
        type_ = match["type"]
        component = COMPONENT_OF_TYPE.get(type_)
        if component is None or match["container"] not in CONTAINERS[component]:
            continue
        if not isinstance(model.get_submodule(match["stack"]), nn.ModuleList):
            continue
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        candidate = Candidate(
            name, int(match["layer"]), type_, component, parameters, module.in_features, module.out_features
        )
        found.setdefault(match["stack"], []).append(candidate)
    if not found:
        raise ConfigurationError(
            f"model: {type(model).__name__} has no linear module named "
            f"<prefix>.layers.<i>.self_attn.{{q,k,v,qkv,o}}_proj, "
            f"<prefix>.layers.<i>.mlp.{{gate,up,gate_up,down}}_proj, or the like in feed_forward, mamba or "
            f"linear_attn; "
            f"give a decoder built that way ({', '.join(FAMILIES.values())})",
            see="model-without-known-modules",
        )
    if len(found) > 1:
        raise ConfigurationError(
            f"model: {type(model).__name__} has several stacks of candidate layers ({', '.join(sorted(found))}); "
            f"give a text-only causal language model",
            see="model-without-known-modules",
        )
    (candidates,) = found.values()
    return sorted(candidates, key=tie_break)


def find_candidates_from_config(config: Any) -> list[Candidate]:
    """The candidates of the model a Hugging Face config describes, without allocating its weights.

    Args:
        config: a ``transformers.PretrainedConfig`` of a causal language model.

    Raises:
        ConfigurationError: as ``find_candidates``.
    """
    return find_candidates(meta_model(config))


def meta_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model a Hugging Face config describes, without weights.

    Args:
        config: a ``transformers.PretrainedConfig``.
        trust_remote_code: as in transformers.

    Raises:
        ConfigurationError: it describes a model that ``model_families.refuse_config`` refuses.
    """
    from transformers import AutoModelForCausalLM

    # Some of these have no causal language model of that name.
    refuse_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        # A size of 0, heads that do not divide: what goes wrong depends on the family.
        raise ConfigurationError(
            f"model: {getattr(config, '_name_or_path', '') or type(config).__name__} cannot be built from its config "
            f"({reason_of(error)}); give the config.json that belongs to the weights",
            see="checkpoint-does-not-fit-its-config",
        ) from error


def architecture_of(config: Any) -> str:
    """Class name of the causal language model a config describes, e.g. ``Qwen2ForCausalLM``.

    A config that was never saved has no ``architectures``; it then follows from the model type, so that a
    model built in memory and the same model loaded from its folder have one identity.
    """
    declared = getattr(config, "architectures", None)
    if declared:
        return declared[0]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)


def model_fingerprint(config: Any) -> str:
    """SHA-256 over the fields of a Hugging Face config that decide which weights the candidates are.

    The same for one checkpoint whatever precision, attention kernel, token ids, path or transformers
    version it is loaded with; verl's workers recompute it from their own config object.

    Args:
        config: a ``transformers.PretrainedConfig``; of a composite config the text part counts.

    Returns:
        64 hexadecimal digits.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    identity: dict[str, Any] = {name: getattr(text, name, None) for name in _FINGERPRINT_FIELDS}
    identity |= {name: bool(getattr(text, name, False)) for name in _FINGERPRINT_FLAGS}
    heads = identity["num_attention_heads"]
    # Some families and library versions leave these two out of the config and derive them.
    identity["num_key_value_heads"] = getattr(text, "num_key_value_heads", None) or heads
    identity["head_dim"] = getattr(text, "head_dim", None) or identity["hidden_size"] // heads
    identity["architecture"] = architecture_of(config)
    if recurrent_layers(text):
        identity["layer_types"] = list(text.layer_types)
        identity |= {name: getattr(text, name, None) for name in _RECURRENT_FIELDS}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
