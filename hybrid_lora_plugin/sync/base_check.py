"""That trainer and rollout engine hold the same original weights, proven once at the first sync.

Modes that do not send every weight rely on what the rollout engine loaded by itself: the weights that never train,
and the bases it merges into. The trainer sends one digest for each; the receiver digests its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hybrid_lora_plugin.sync.digest import digest_of
from hybrid_lora_plugin.sync.errors import WeightSyncError


def value_digest(tensor: torch.Tensor) -> str:
    """A digest of values rather than bits: equal for a bf16 tensor and for the same numbers held in fp32."""
    tensor = tensor.detach().cpu()
    half = tensor.to(torch.bfloat16)
    return digest_of(half if torch.equal(half.to(tensor.dtype), tensor) else tensor.float())


def base_digests(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """``value_digest`` of each (name, tensor); whole tensors, so with shards every rank must draw them."""
    return {name: value_digest(tensor) for name, tensor in weights if tensor.is_floating_point()}


def check_base(wanted: dict[str, str], original: Callable[[str], torch.Tensor], where: str) -> None:
    """Compare the trainer's digests with the receiver's checkpoint.

    Args:
        wanted: digest by plain name, from the trainer.
        original: the checkpoint's tensor of a name; raises KeyError where it has none.
        where: the checkpoint, for the message.

    Raises:
        WeightSyncError: naming the first weight that differs or is not there.
    """
    for name, digest in wanted.items():
        try:
            tensor = original(name)
        except KeyError:
            raise WeightSyncError(
                f"{name}: the trainer has this weight and the checkpoint of the rollout engine, {where}, has not; give "
                "hybrid_lora.sync=merge, which needs no checkpoint there"
            ) from None
        if value_digest(tensor) != digest:
            raise WeightSyncError(
                f"{name}: the rollout engine's checkpoint {where} holds other values than the trainer started from; "
                "start both from one checkpoint"
            )
