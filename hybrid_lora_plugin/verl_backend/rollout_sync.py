"""What the engine sends to the rollout engine: plain weights under plain names, merged from the untouched base."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from hybrid_lora_plugin.probing.svd_lora import SvdLoraLinear
from hybrid_lora_plugin.training.apply import ADAPTER, is_adapter, plain_name
from hybrid_lora_plugin.training.merge import merge_weight


def _whole(tensor: torch.Tensor, device) -> torch.Tensor:
    """The full tensor on ``device``; for a DTensor a collective, so every rank must call it in the same order."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to(device, non_blocking=True).full_tensor()
    return tensor.detach().to(device)


@torch.no_grad()
def merged_weights(
    model: torch.nn.Module, scaling: float, dtype: torch.dtype, device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream every weight of a hybrid model as the plain model has it (sync mode ``merge``).

    LoRA modules become ``W0 + s·BA`` (fp32, rounded once), full modules and the rest are cast. One module's
    tensors are whole at a time; the model itself is never changed.

    Args:
        model: the PEFT model inside FSDP2, or unsharded.
        scaling: alpha / rank.
        dtype: what the rollout engine computes in.
        device: where whole tensors are put together.

    Yields:
        (plain Hugging Face name, tensor of ``dtype``); fresh storage where the value is a product or was sharded,
        so the receiver must not write to it.

    Raises:
        KeyError: an adapted layer lacks a factor under the name PEFT gives it.
    """
    state = model.state_dict()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for name, tensor in state.items():
        if is_adapter(name) or (tied and plain_name(name) == "lm_head.weight"):
            continue
        whole = _whole(tensor, device)
        if name.endswith(".base_layer.weight"):
            # A wrapped layer always has both factors; a name that changed must fail here, not send the bare base.
            factor = name.removesuffix(".base_layer.weight") + ".lora_{}." + ADAPTER + ".weight"
            lora_a, lora_b = (_whole(state[factor.format(kind)], device) for kind in "AB")
            yield plain_name(name), merge_weight(whole, lora_a, lora_b, scaling, dtype)
        else:
            yield plain_name(name), whole.to(dtype)


@torch.no_grad()
def merged_probe_weights(model: torch.nn.Module, dtype: torch.dtype, device) -> Iterator[tuple[str, torch.Tensor]]:
    """As ``merged_weights`` for a model with centred SVD-LoRA on its candidates: ``W0 + (A diag(alpha e) B)ᵀ``.

    Args:
        model: the Hugging Face model that ``probing.svd_lora.attach`` changed, inside FSDP2 or unsharded.
        dtype: what the rollout engine computes in.
        device: where whole tensors are put together.

    Yields:
        (plain Hugging Face name, tensor of ``dtype``).
    """
    state = model.state_dict()
    probed = {f"{name}.": layer for name, layer in model.named_modules() if isinstance(layer, SvdLoraLinear)}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        if (prefix + "." in probed and leaf in ("A", "B", "e", "alpha")) or (tied and name == "lm_head.weight"):
            continue
        whole = _whole(tensor, device)
        module = name.removesuffix("base.weight")
        if module in probed:
            a, b, e, alpha = (_whole(state[module + which], device).float() for which in ("A", "B", "e", "alpha"))
            gate = (alpha + probed[module].alpha_origin) * (e + probed[module].e_origin)
            # A is [d_in, r] and B [r, d_out] here, PEFT's factors are their transposes.
            yield module + "weight", merge_weight(whole, a.T, (b * gate[:, None]).T, 1.0, dtype)
        else:
            yield name.replace(".base.", "."), whole.to(dtype)
