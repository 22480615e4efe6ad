"""Turn a plain Hugging Face model into a hybrid one: full modules trainable, LoRA on the rest, all else frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer

from hybrid_lora_plugin.allocation.placement import LORA
from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.names import ADAPTER, is_adapter, plain_name
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.training.lora_linear import LoraLinear, share_inputs

#: attribute of a hybrid model that holds its ``HybridParts``; FSDP's wrappers pass attributes through
_PARTS = "hybrid_lora_parts"


@dataclass(frozen=True)
class HybridParts:
    """What is what in a hybrid model, from before it was sharded: FSDP1 hides names and sizes of parameters.

    Attributes:
        trained: names in ``state_dict()`` of everything that trains.
        lora_modules: plain names of the modules with an adapter, in model order.
        counts: the count of all parameters, tied weights once.
        merged_shapes: of every weight and bias of the plain model that training changes, (d_out, d_in) or (d_out,):
            those of full modules, and the weights with an adapter.
    """

    trained: frozenset[str]
    lora_modules: tuple[str, ...]
    counts: ParameterCounts
    merged_shapes: tuple[tuple[int, ...], ...]


def parts_of(model: torch.nn.Module) -> HybridParts:
    """The record that ``apply_allocation`` left on the model, also when FSDP has wrapped it since."""
    return getattr(model, _PARTS)


def apply_allocation(
    model: torch.nn.Module, allocation: Allocation, *, rank: int = 16, alpha: int = 32, dropout: float = 0.0
) -> PeftModel:
    """Make the modules of ``allocation`` trainable, each in its own way.

    Args:
        model: a plain Hugging Face causal language model, not yet wrapped by PEFT or FSDP; changed in place.
        allocation: which candidates are fully fine-tuned, which get LoRA and which stay frozen.
        rank, alpha, dropout: of the adapters; PEFT scales them by alpha / rank.

    Returns:
        The PEFT model. Weights and biases of full modules and all LoRA factors require a gradient, nothing else, and
        are in float32 whatever the model's type.

    Raises:
        ConfigurationError: the model is wrapped already, is not the one the allocation is for, a module
            with LoRA takes none, or PEFT did not put adapters on exactly the modules asked for.
    """
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise ConfigurationError(
            "model: it already carries a PEFT adapter, wanted a plain model; apply the allocation before wrapping"
        )
    allocation.check_model(model.config, find_candidates(model))
    full, lora = set(allocation.full_names), sorted(allocation.lora_names)
    for module in allocation.modules:
        if module.assignment == LORA and not module.takes_adapter:
            raise ConfigurationError(
                f"allocation: LoRA on {module.name}, whose weight a fused kernel reads in training, so that the "
                f"adapter would be passed over; assign it full or frozen"
            )
    if not lora:
        raise ConfigurationError(
            "allocation: it leaves no module to LoRA; lower budget.ratio, or train without hybrid_lora for full "
            "fine-tuning"
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora,
        bias="none",
    )
    # PEFT's own way to bring a layer of one's own.
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
    share_inputs(peft_model)

    wrapped = {plain_name(name) for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)}
    if wrapped != set(lora):
        wrong = sorted(wrapped.symmetric_difference(lora))
        raise ConfigurationError(
            f"allocation: PEFT adapted {len(wrapped)} modules where {len(lora)} were assigned to LoRA, first "
            f"difference {wrong[0]!r}; this PEFT version matches module names differently, install peft==0.21.2"
        )
    for name, module in peft_model.named_modules():
        if plain_name(name) in full:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        elif isinstance(module, LoraLayer):
            for factor in (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight):
                factor.data = factor.data.float()
            # PEFT has rounded A's values to the type of its base weight.
            module.reset_lora_parameters(ADAPTER, init_lora_weights=True)
    setattr(peft_model, _PARTS, _parts(peft_model))
    return peft_model


def _parts(model: PeftModel) -> HybridParts:
    groups = trainable_groups(model)
    wrapped = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    changed = [parameter for _, parameter in groups["full"]] + [m.get_base_layer().weight for m in wrapped.values()]
    full, lora = (sum(parameter.numel() for _, parameter in groups[kind]) for kind in ("full", "lora"))
    return HybridParts(
        trained=frozenset(name for group in groups.values() for name, _ in group),
        lora_modules=tuple(wrapped),
        counts=ParameterCounts(sum(p.numel() for p in model.parameters()) - full - lora, full=full, lora=lora),
        merged_shapes=tuple(tuple(parameter.shape) for parameter in changed),
    )


def trainable_groups(model: torch.nn.Module) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """The trainable parameters of a hybrid model by kind: ``{"lora": [...], "full": [...]}``, in model order."""
    groups: dict[str, list[tuple[str, torch.nn.Parameter]]] = {"lora": [], "full": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["lora" if is_adapter(name) else "full"].append((name, parameter))
    return groups
