"""The model of a run, checked on the driver: its folder, its family, and an account of its linear modules."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.base_checkpoint import check_model_folder
from hybrid_lora_plugin.candidates import FUSED_TYPES, Candidate, find_candidates, meta_model
from hybrid_lora_plugin.errors import ConfigurationError, explained
from hybrid_lora_plugin.linear_account import account_text, frozen_linear
from hybrid_lora_plugin.model_families import recurrent_layers, untried
from hybrid_lora_plugin.verl_backend.requirements import check_sequence_parallel, hybrid_config
from hybrid_lora_plugin.verl_backend.run_kinds import ACTOR, MODEL, ROLLOUT, kind_of_run, tell
from hybrid_lora_plugin.verl_backend.zeroth_order_requirements import check_moving_modules
from hybrid_lora_plugin.weight_loading import check_weights


def checked_model(config: DictConfig) -> tuple[Any, list[Candidate]] | None:
    """The model of a run, as far as it can be known here; prints what is a candidate and what stays frozen.

    Of a name on a hub only the config is fetched.

    Args:
        config: of the run.

    Returns:
        Its Hugging Face config and its candidates; None where only the workers see it, which refuse the same.

    Raises:
        ConfigurationError: it cannot be trained, or its weights cannot be loaded or read back by the rollout engine.
    """
    kind = kind_of_run(config)
    path = os.path.expanduser(str(kind.select(config, MODEL + "path")))
    trust = bool(kind.select(config, MODEL + "trust_remote_code", default=False))
    local = os.path.isdir(path)
    if local:
        check_model_folder(path, safetensors=kind.select(config, ROLLOUT + "load_format") == "safetensors")
    model_config = _config_of(path, trust, local, kind.place(MODEL + "path"))
    if model_config is None:
        return None
    with explained(otherwise="model-without-known-modules"):
        model = meta_model(model_config, trust)
        candidates = find_candidates(model)
    _refuse_split_packed(config, candidates)
    if OmegaConf.select(config, "hybrid_lora.zeroth_order.enabled"):
        hybrid = hybrid_config(OmegaConf.to_container(config.hybrid_lora, resolve=True))
        check_moving_modules(hybrid, model_config, model, candidates)
    if recurrent_layers(model_config):
        for line in _check_recurrent(config, model_config):
            tell(line)
    if local:
        check_weights(path, trust)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tell("linear modules: number, parameters, share of the model")
    for line in account_text(candidates, frozen_linear(model, candidates), parameters):
        tell(f"  {line}")
    kernel = kind.select(config, MODEL + "override_config.attn_implementation")
    if kind.samples and kernel == "sdpa" and getattr(model_config, "attn_logit_softcapping", None):
        tell(
            f"WARNING: {MODEL}override_config.attn_implementation: sdpa leaves out the cap on attention logits that "
            "the rollout engine applies; give flash_attention_2 or eager [docs/models.md]"
        )
    if said := untried(model_config):
        tell(said)
    return model_config, candidates


def _config_of(path: str, trust: bool, local: bool, name: str) -> Any:
    from transformers import AutoConfig

    if not local and "://" in path:
        return _left_to_workers(name, path, "it is not on this machine")
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:
        if local:
            raise
        # A hub has many ways to be out of reach.
        return _left_to_workers(name, path, (str(error).strip().splitlines() or [type(error).__name__])[0])
    if not local and getattr(found, "auto_map", None):
        return _left_to_workers(name, path, "it brings code of its own, which is not fetched here")
    return found


def _left_to_workers(name: str, path: str, reason: str) -> None:
    tell(f"{name}: {path!r} cannot be checked on the driver ({reason}); the workers check it when they have loaded it")


def _refuse_split_packed(config: DictConfig, candidates: list[Candidate]) -> None:
    workers = int(kind_of_run(config).select(config, ROLLOUT + "tensor_model_parallel_size") or 1)
    # Mamba's in_proj packs five, Qwen3.5's in_proj_qkv three, and the convolutions beside them three.
    packed = sorted({candidate.type for candidate in candidates} & {*FUSED_TYPES, "in_proj", "in_proj_qkv"})
    if workers > 1 and packed:
        raise ConfigurationError(
            f"{ROLLOUT}tensor_model_parallel_size: {workers}, but the {' and '.join(packed)} of this model pack "
            f"several projections, which cannot be read back from several workers; give 1, and more replicas instead",
            see="packed-weight-over-several-workers",
        )


def _check_recurrent(config: DictConfig, model_config: Any) -> list[str]:
    """What a run of a recurrent model must not do, and lines on what its start will ask."""
    kind = kind_of_run(config)
    for name in (ACTOR + "ulysses_sequence_parallel_size", ACTOR + "fsdp_config.ulysses_sequence_parallel_size"):
        check_sequence_parallel(model_config, int(kind.select(config, name) or 1), str(kind.place(name)))
    name = kind.place(MODEL + "use_remove_padding")
    if not kind.select(config, MODEL + "use_remove_padding", default=True):
        return []
    return [
        f"WARNING: {name}: True packs rows, and this model has recurrent layers, of which most carry a state on from "
        f"one row into the next; the start of the run measures it and refuses, then give {name}=false "
        "[docs/troubleshooting.md#packed-rows-differ]"
    ]
