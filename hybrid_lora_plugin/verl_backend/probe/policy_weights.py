"""What the policy probe sends to the rollout engine: plain weights merged from its SVD-LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hybrid_lora_plugin.probing.layers import SvdLoraLinear
from hybrid_lora_plugin.training.arrival import Arrival
from hybrid_lora_plugin.training.dtensor import whole
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding, round_weight


@torch.no_grad()
def merged_probe_weights(
    model: torch.nn.Module, dtype: torch.dtype, device, rounding: Rounding = NEAREST, arrival: Arrival | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream every weight of a model with centred SVD-LoRA on its candidates: ``W0 + (A diag(alpha e) B)ᵀ``.

    Args:
        model: the Hugging Face model that ``probing.svd_lora.attach`` changed, inside FSDP2 or unsharded.
        dtype: what the rollout engine computes in.
        device: where whole tensors are put together.
        rounding: of merged weights to ``dtype``.
        arrival: counts how much of the update is in what is sent.

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
        value = whole(tensor, device)
        module = name.removesuffix("base.weight")
        if module in probed:
            a, b, e, alpha = (whole(state[module + which], device).float() for which in ("A", "B", "e", "alpha"))
            gate = (alpha + probed[module].alpha_origin) * (e + probed[module].e_origin)
            # A is [d_in, r] and B [r, d_out] here, PEFT's factors are their transposes.
            merged = module + "weight"
            yield merged, merge_weight(value, a.T, (b * gate[:, None]).T, 1.0, dtype, rounding, merged, arrival)
        else:
            plain = name.replace(".base.", ".")
            yield plain, round_weight(plain, value, dtype, NEAREST)
