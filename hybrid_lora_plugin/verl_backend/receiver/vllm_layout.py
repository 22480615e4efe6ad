"""Where a plain weight and a LoRA factor lie in vLLM's model (vLLM 0.28 ``model_executor/layers/linear.py``).

vLLM packs q, k, v and gate, up into one parameter each and shards them over tensor-parallel workers; the layers' own
records say where a plain weight lies in there.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers import linear

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.live_weight import LiveWeight


class PackedModules:
    """Which of vLLM's modules holds a plain module, and at which place: it packs q, k, v and gate, up into one each."""

    def __init__(self, model: torch.nn.Module):
        self._owner = {
            part: (owner, index)
            for owner, parts in model.packed_modules_mapping.items()
            for index, part in enumerate(parts)
        }

    def find(self, module: str) -> tuple[str, int]:
        """(name of vLLM's module, place in it)."""
        parent, _, last = module.rpartition(".")
        owner, index = self._owner.get(last, (last, 0))
        return (f"{parent}.{owner}" if parent else owner), index


def find_live_weight(modules: dict[str, torch.nn.Module], packed: PackedModules, name: str) -> LiveWeight:
    """The live part of the plain weight ``name``.

    Args:
        modules: those of vLLM's model by name.
        packed: of the same model.
        name: plain Hugging Face name of a weight or bias.

    Raises:
        WeightSyncError: vLLM's model has no such weight in a layout known here.
    """
    prefix, _, leaf = name.rpartition(".")
    owner, index = packed.find(prefix)
    layer = modules.get(owner)
    layer = getattr(layer, "base_layer", layer)
    parameter = getattr(layer, leaf, None)
    if not isinstance(parameter, torch.Tensor):
        raise WeightSyncError(
            f"{name}: cannot be read back from the rollout engine's model, whose layout for it is unknown here; "
            "give a dense model of the Qwen2, Qwen3 or Llama family, without modules of your own",
            see="weight-in-an-unknown-layout",
        )
    value = parameter.detach()
    if isinstance(layer, linear.QKVParallelLinear):
        width = layer.head_size
        sizes = [layer.num_heads * width, layer.num_kv_heads * width, layer.num_kv_heads * _value_width(layer)]
        total = [layer.total_num_heads * width, layer.total_num_kv_heads * width]
        total.append(layer.total_num_kv_heads * _value_width(layer))
        rank = layer.tp_rank if index == 0 else layer.tp_rank // layer.num_kv_head_replicas
        view = value.narrow(0, sum(sizes[:index]), sizes[index])
        return LiveWeight(view, (total[index], *value.shape[1:]), 0, rank * sizes[index])
    if isinstance(layer, linear.MergedColumnParallelLinear):
        sizes = [size // layer.tp_size for size in layer.output_sizes]
        view = value.narrow(0, sum(sizes[:index]), sizes[index])
        return LiveWeight(view, (layer.output_sizes[index], *value.shape[1:]), 0, layer.tp_rank * sizes[index])
    if isinstance(layer, linear.ColumnParallelLinear):
        return LiveWeight(value, (layer.output_size, *value.shape[1:]), 0, layer.tp_rank * value.shape[0])
    if isinstance(layer, linear.RowParallelLinear) and leaf == "weight":
        return LiveWeight(value, (value.shape[0], layer.input_size), 1, layer.tp_rank * value.shape[1])
    if hasattr(layer, "shard_indices"):  # embedding and output head, padded at the end
        rows = layer.shard_indices
        view = value.narrow(0, 0, rows.num_org_elements)
        return LiveWeight(view, (layer.org_vocab_size, *value.shape[1:]), 0, rows.org_vocab_start_index)
    return LiveWeight(value, tuple(value.shape), None, 0)


def _value_width(layer) -> int:
    return getattr(layer, "v_head_size", layer.head_size)


def adapter_part(layer: Any, index: int, lora_a, lora_b, rows: int):
    """This worker's part of both factors, as ``lora/layers`` of vLLM shards them (without fully sharded LoRA)."""
    base = layer.base_layer
    if getattr(base, "tp_size", 1) == 1:
        return lora_a, lora_b
    if isinstance(base, linear.RowParallelLinear):
        width = base.input_size_per_partition
        return lora_a[:, base.tp_rank * width : (base.tp_rank + 1) * width], lora_b
    rank = base.tp_rank
    if isinstance(base, linear.QKVParallelLinear) and index > 0:
        rank //= base.num_kv_head_replicas
    return lora_a, lora_b[rank * rows : (rank + 1) * rows]
