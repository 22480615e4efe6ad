"""FSDP1: what one rank holds of each full module's parameters, which lie flat and are cut anywhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from hybrid_lora_plugin.names import FSDP1_INFIX
from hybrid_lora_plugin.training.arrival import TrainedPiece


def flat_pieces(model: torch.nn.Module, originals: Mapping[str, torch.Tensor]) -> dict[str, TrainedPiece]:
    """Pieces of this rank by name in ``state_dict()``; a parameter of which it holds nothing has none.

    Args:
        model: a hybrid model inside FSDP1, with ``use_orig_params`` or without.
        originals: of a ``BaseSnapshot`` of that model, by the names that its full modules' parameters have there: with
            ``use_orig_params`` their own, else that of the flat parameter of their unit.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pieces = {}
    for unit, module in model.named_modules():
        if not isinstance(module, FullyShardedDataParallel) or module._handle is None:
            continue
        flat = module._handle.flat_param
        for place, info in enumerate(flat._shard_param_infos):
            # Without use_orig_params there are no parameters but the flat one.
            held = flat if flat._params is None else flat._params[place]
            original = originals.get(names.get(id(held)))
            if original is None or not info.in_shard:
                continue
            part = slice(0, info.numel_in_shard)
            if flat._params is None:
                part = slice(info.offset_in_shard, info.offset_in_shard + info.numel_in_shard)
            name = f"{unit}.{flat._fqns[place]}".replace(FSDP1_INFIX, "").removeprefix(".")
            pieces[name] = TrainedPiece(held, original.reshape(-1)[part], info.intra_param_start_idx, part)
    return pieces
