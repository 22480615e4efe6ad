"""The model of a run with shapes and no memory: what trains, what is frozen, and how many parameters each is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid_lora_plugin.allocation import Allocation, load_allocation
from hybrid_lora_plugin.allocation.schema import ModelIdentity
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.candidates import Candidate, architecture_of, find_candidates, meta_model, model_fingerprint
from hybrid_lora_plugin.config import WITHOUT_PROBE, AllocateCommandConfig, HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.model_families import recurrent_layers
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.plan.run import FULL, HYBRID, Run


@dataclass(frozen=True)
class PlannedModel:
    """A model to be trained, on the meta device.

    Attributes:
        config: the Hugging Face config.
        plain: the plain causal language model, in float32.
        trained: what the run trains: the plain model itself, with adapters, or under an allocation.
        counts: parameters, tied ones once.
        allocation: with ``HYBRID``. drawn: whether it was drawn, since nothing is probed yet.
    """

    config: Any
    plain: nn.Module
    trained: nn.Module
    counts: ParameterCounts
    allocation: Allocation | None = None
    drawn: bool = False

    @property
    def candidates(self) -> list[Candidate]:
        """The linear modules that take part."""
        return find_candidates(self.plain)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return text_config(self.config).num_hidden_layers

    @property
    def head(self) -> int:
        """Parameters of the product that gives the logits."""
        return self.plain.get_output_embeddings().weight.numel()

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head where that has its own."""
        tied = self.plain.get_output_embeddings().weight is self.plain.get_input_embeddings().weight
        return self.plain.get_input_embeddings().weight.numel() + (0 if tied else self.head)

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return self.plain.get_output_embeddings().weight.shape[0]

    def parameters(self) -> Iterator[tuple[str, torch.Size, bool]]:
        """Name, shape and whether it trains, of every parameter."""
        for name, parameter in self.trained.named_parameters():
            yield name, parameter.shape, parameter.requires_grad

    def largest_layer(self) -> tuple[int, int]:
        """Most parameters of one decoder layer with its adapters, and most of one that train."""
        sizes: dict[str, int] = {}
        training: dict[str, int] = {}
        for name, shape, trains in self.parameters():
            layer = layer_of(name)
            if layer is not None:
                sizes[layer] = sizes.get(layer, 0) + math.prod(shape)
                training[layer] = training.get(layer, 0) + math.prod(shape) * trains
        return max(sizes.values()), max(training.values())


def layer_of(name: str) -> str | None:
    """The decoder layer that a parameter belongs to, by its prefix; None outside of them."""
    head, found, tail = plain_name(name).partition(".layers.")
    return f"{head}.layers.{tail.partition('.')[0]}" if found else None


def text_config(config: Any) -> Any:
    """The part of a config that describes the decoder."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def planned_model(config: Any, run: Run, name: str, trust_remote_code: bool = False) -> PlannedModel:
    """The model of a run.

    Args:
        config: a ``transformers.PretrainedConfig``.
        run: how it is trained.
        name: of the model, for messages.
        trust_remote_code: as in transformers.

    Raises:
        ConfigurationError: the model cannot be trained so, or the allocation is not one of it.
    """
    if recurrent := recurrent_layers(text_config(config)):
        raise ConfigurationError(
            f"model: {name} has layers of type {', '.join(recurrent)}, whose activations and whose states in the "
            "rollout engine are not planned; start it with short responses, or plan a model all of attention",
            see="recurrent-model-not-supported",
        )
    plain, trained = (meta_model(deepcopy(config), trust_remote_code) for _ in range(2))
    if run.training == FULL:
        total = sum(parameter.numel() for parameter in plain.parameters())
        return PlannedModel(config, plain, trained, ParameterCounts(0, total, 0))
    if run.training != HYBRID:
        trained = with_adapters(trained, run)
        return PlannedModel(config, plain, trained, _counts(trained))
    allocation, drawn = allocation_of(plain, run.hybrid, name)
    trained = under_allocation(trained, allocation, run)
    return PlannedModel(config, plain, trained, _counts(trained, allocation), allocation, drawn)


def _counts(model: nn.Module, allocation: Allocation | None = None) -> ParameterCounts:
    frozen = full = lora = 0
    whole = set() if allocation is None else set(allocation.full_names)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen += parameter.numel()
        elif plain_name(name).rpartition(".")[0] in whole:
            full += parameter.numel()
        else:
            lora += parameter.numel()
    return ParameterCounts(frozen, full, lora)


def with_adapters(model: nn.Module, run: Run) -> nn.Module:
    """LoRA as verl attaches it, without an allocation; ``model`` is changed in place."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets = run.lora_targets if isinstance(run.lora_targets, str) else list(run.lora_targets)
    with torch.device("meta"):
        return get_peft_model(
            model,
            LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=run.lora_rank,
                lora_alpha=run.lora_alpha,
                target_modules=targets,
                bias="none",
            ),
        )


def under_allocation(model: nn.Module, allocation: Allocation, run: Run) -> nn.Module:
    """The plugin's own model; ``model`` is changed in place."""
    from hybrid_lora_plugin.training.apply import apply_allocation

    with torch.device("meta"):
        return apply_allocation(model, allocation, rank=run.lora_rank, alpha=run.lora_alpha)


def allocation_of(plain: nn.Module, hybrid: HybridLoraConfig, name: str) -> tuple[Allocation, bool]:
    """The run's allocation, or one that it may come to, and whether that was drawn.

    A criterion without a probe gives its own. For the others modules are drawn at random within the budget: how many
    parameters are fully tuned differs from a probe's choice by less than the first module that does not fit.

    Args:
        plain: the model.
        hybrid: the options of the run.
        name: of the model.
    """
    candidates = find_candidates(plain)
    if hybrid.allocation:
        allocation = load_allocation(hybrid.allocation)
        allocation.check_model(plain.config, candidates)
        return allocation, False
    identity = ModelIdentity(
        name_or_path=name,
        architecture=architecture_of(plain.config),
        config_sha256=model_fingerprint(plain.config),
        num_layers=1 + max(candidate.layer for candidate in candidates),
        candidate_parameters=sum(candidate.parameters for candidate in candidates),
    )
    drawn = hybrid.criterion not in WITHOUT_PROBE
    settings = (
        AllocateCommandConfig(criterion="random", budget=hybrid.budget, placement=hybrid.placement)
        if drawn
        else AllocateCommandConfig(
            criterion=hybrid.criterion,
            direction=hybrid.direction,
            budget=hybrid.budget,
            placement=hybrid.placement,
            control=hybrid.control,
        )
    )
    chosen = select_modules(settings, identity, candidates, {}, lora_rank=hybrid.lora.rank, environment={})
    return chosen, drawn or hybrid.criterion == "random"
