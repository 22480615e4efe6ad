"""Reading a hybrid model for a sync: whole tensors under plain names, one at a time, from any sharding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from hybrid_lora_plugin.names import is_adapter, is_wrapped, peft_factor, plain_name, wire_factor
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.training.apply import parts_of
from hybrid_lora_plugin.training.arrival import TrainedPiece
from hybrid_lora_plugin.training.dtensor import local_tensor, whole, with_local
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.rounding import NEAREST, on_grid, round_weight


def plain_state(
    model: torch.nn.Module, state: dict[str, torch.Tensor] | None = None
) -> dict[str, tuple[str, torch.Tensor]]:
    """The model's own weights by plain Hugging Face name, as (its name in the model, tensor), in model order.

    LoRA factors are left out, and the output head where it is the embedding. ``state`` is the model's ``state_dict()``
    where the caller has it already: with FSDP2 it takes as long as sending the factors.
    """
    state = model.state_dict() if state is None else state
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return {
        plain_name(name): (name, tensor)
        for name, tensor in state.items()
        if not is_adapter(name) and not (tied and plain_name(name) == "lm_head.weight")
    }


def layer_state(model: torch.nn.Module, layer: str) -> dict[str, torch.Tensor]:
    """The part of ``state_dict()`` of the module ``layer``, named as in ``model``; of one layer only where that is
    possible.

    The whole model's takes as long as sending the factors, but FSDP1 gives no other.
    """
    if isinstance(model, FullyShardedDataParallel):
        return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{layer}.")}
    return model.get_submodule(layer).state_dict(prefix=f"{layer}.")


def factors_of(state: dict[str, torch.Tensor], name: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A [r, d_in] and B [d_out, r] of the LoRA layer whose base weight is ``name``.

    Raises:
        KeyError: the layer lacks one. A name that changed must fail here, not send the bare base.
    """
    return whole(state[peft_factor(name, "A")], device), whole(state[peft_factor(name, "B")], device)


def merged(state: dict[str, torch.Tensor], plain: str, name: str, plan: SyncPlan) -> torch.Tensor:
    """A weight with an adapter, whole and as the rollout engine gets it.

    Args:
        state: the model's ``state_dict()``, or that of the layer.
        plain: name of the weight in the plain model.
        name: of its base weight in ``state``.
        plan: of this sync.
    """
    lora_a, lora_b = factors_of(state, name, plan.device)
    base = whole(state[name], plan.device)
    return merge_weight(base, lora_a, lora_b, plan.scaling, plan.dtype, plan.rounding, plain, plan.arrival)


def unmerged(model: torch.nn.Module, plain: str, name: str, tensor: torch.Tensor, plan: SyncPlan) -> torch.Tensor:
    """A tensor of ``state_dict()`` that has no adapter, whole and as the rollout engine gets it.

    What trains is rounded as the plan says. What does not train is what the engine loaded: rounded to nearest.
    """
    if name not in parts_of(model).trained:
        value = whole(tensor, plan.device)
        return round_weight(plain, value, plan.dtype, NEAREST) if value.is_floating_point() else value
    original, exact = plan.originals.get(name), tensor
    moves = original is not None and original.dtype != plan.dtype and plan.rounding.is_stochastic(plan.dtype)
    if moves:
        # Before it is gathered: no rank has another whole tensor.
        exact = tensor.detach().to(plan.device)
        exact = with_local(exact, on_grid(local_tensor(exact), original.to(plan.device), plan.dtype))
    sent = round_weight(plain, whole(exact, plan.device), plan.dtype, plan.rounding, spent=moves)
    if plan.arrival is not None:
        piece = plan.pieces.get(name)
        if piece is None and original is not None:
            piece = TrainedPiece.of(tensor, original)
        if piece is not None:
            plan.arrival.add_full(piece, sent)
    return sent


def trained_weights(
    model: torch.nn.Module, plan: SyncPlan, factor_dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """What training changes and nothing else: full modules as they are, LoRA modules as their two factors.

    Args:
        model: the hybrid PEFT model, inside FSDP or unsharded.
        plan: of this sync.
        factor_dtype: of the factors, to nearest.

    Yields:
        (plain name, tensor of ``plan.dtype``) for a full module, (``MODULE.lora_A.weight``, ``[r, d_in]``) and
        (``MODULE.lora_B.weight``, ``[d_out, r]``) for the others, which come first.
    """
    state = plan.state_of(model)
    trained = parts_of(model).trained
    plain_weights = plain_state(model, state)
    if missing := trained - state.keys():
        raise KeyError(f"{min(missing)}: trained, but not in the model's state")
    # The wider type first: in a bucket without gaps everything then begins at a multiple of its element size.
    for plain, (name, _) in plain_weights.items():
        if is_wrapped(name):
            module, exact = plain.removesuffix(".weight"), factors_of(state, name, plan.device)
            names = [wire_factor(module, kind) for kind in "AB"]
            sent = [round_weight(*named, factor_dtype, NEAREST) for named in zip(names, exact, strict=True)]
            if plan.arrival is not None and factor_dtype != torch.float32:
                rows = plan.arrival.rows(torch.Size((exact[1].shape[0], exact[0].shape[1])))
                plan.arrival.add("lora", *(plan.scaling * (b[rows].float() @ a.float()) for a, b in (exact, sent)))
            yield from zip(names, sent, strict=True)
    for plain, (name, tensor) in plain_weights.items():
        if name in trained:
            yield plain, unmerged(model, plain, name, tensor, plan)


def original_weights(model: torch.nn.Module, device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight that training leaves alone, the bases of LoRA layers among them: (plain name, tensor)."""
    trained = parts_of(model).trained
    for plain, (name, tensor) in plain_state(model).items():
        if name not in trained:
            yield plain, whole(tensor, device)
