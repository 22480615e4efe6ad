"""vLLM's side: weights and memory for keys and values on the GPU, and what it keeps in the host while it sleeps.

vLLM takes ``gpu_memory_utilization`` of a GPU: weights, what a forward pass of its largest batch needs, which it
measures when it starts, and the rest for keys and values. What that pass needs is estimated here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.plan.model import PlannedModel, text_config
from hybrid_lora_plugin.plan.run import HYBRID, RolloutRun, Run
from hybrid_lora_plugin.plan.training import itemsize

MIB = 1 << 20
#: what vLLM packs into one weight
_PACKED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
#: parameters of one dimension that every worker has whole: norms, and the bias behind a sum over workers
_WHOLE_BIAS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class RolloutMemory:
    """One rollout worker on its GPU, in bytes.

    Attributes:
        weights: of the model, and of the adapter where it runs one.
        working: of a forward pass, an estimate.
        cache: left for keys and values; below 0 where there is no room for any.
        per_token: of the cache for one token.
    """

    weights: float
    working: float
    cache: float
    per_token: int

    @property
    def cached_tokens(self) -> int:
        """Tokens that the cache has room for."""
        return max(0, int(self.cache // self.per_token))


def engine_sizes(model: PlannedModel, dtype: str, tensor_parallel: int) -> list[int]:
    """Bytes of every parameter of vLLM's model in one worker, in the order in which they are made."""
    sizes: dict[str, int] = {}
    tied = model.plain.get_output_embeddings().weight is model.plain.get_input_embeddings().weight
    for name, parameter in model.plain.named_parameters():
        name = plain_name(name)
        if tied and name.startswith("lm_head"):
            continue
        module, _, kind = name.rpartition(".")
        place, _, last = module.rpartition(".")
        elements = parameter.numel()
        if parameter.dim() > 1 or (last in _PACKED and kind == "bias"):
            elements = -(-elements // _workers_of(model.config, last, tensor_parallel))
        key = f"{place}.{_PACKED.get(last, last)}.{kind}"
        sizes[key] = sizes.get(key, 0) + elements * itemsize(dtype)
    return list(sizes.values())


def _workers_of(config: Any, last: str, tensor_parallel: int) -> int:
    """Workers that share one projection: of keys and values no more than there are heads of them."""
    if last in ("k_proj", "v_proj"):
        return min(tensor_parallel, _heads(config)[0])
    return tensor_parallel


def _heads(config: Any) -> tuple[int, int]:
    """Heads of keys and values, and elements of one."""
    text = text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return heads, size


def cache_bytes_per_token(config: Any, dtype: str, tensor_parallel: int) -> int:
    """Keys and values of one token in one worker, over all layers."""
    heads, size = _heads(config)
    return 2 * text_config(config).num_hidden_layers * max(1, heads // tensor_parallel) * size * itemsize(dtype)


def working_bytes(model: PlannedModel, rollout: RolloutRun) -> float:
    """An estimate of what a forward pass needs: its widest layer, and logits in fp32 with their probabilities."""
    text = text_config(model.config)
    wide = 3 * text.intermediate_size // rollout.tensor_parallel + 2 * text.hidden_size
    layer = rollout.max_batched_tokens * wide * itemsize(rollout.dtype)
    return max(layer, 2 * 4 * rollout.max_sequences * model.vocabulary)


def rollout_memory(model: PlannedModel, run: Run, gpu_bytes: float) -> RolloutMemory:
    """One worker that generates.

    Args:
        model: of the run.
        run: with a rollout engine.
        gpu_bytes: memory of a GPU.
    """
    rollout = run.rollout
    weights = float(sum(engine_sizes(model, rollout.dtype, rollout.tensor_parallel)))
    if rollout.adapter:
        weights += model.counts.lora * itemsize(rollout.dtype)
    working = working_bytes(model, rollout)
    per_token = cache_bytes_per_token(model.config, rollout.dtype, rollout.tensor_parallel)
    return RolloutMemory(weights, working, rollout.memory_share * gpu_bytes - weights - working, per_token)


# -- the host's memory ------------------------------------------------------------------------------------------------


def segments(sizes: list[int]) -> list[int]:
    """Bytes of the pieces of device memory that torch makes for tensors of these bytes, allocated one by one.

    One for each tensor from 10 MiB on, rounded up to 2 MiB, and of 20 MiB and 2 MiB for the smaller ones together
    (torch 2.11, ``c10/cuda/CUDACachingAllocator``).
    """
    pieces, free = [], {2 * MIB: 0, 20 * MIB: 0}
    for size in sizes:
        size = -(-size // 512) * 512
        if size >= 10 * MIB:
            pieces.append(-(-size // (2 * MIB)) * 2 * MIB)
            continue
        kind = 2 * MIB if size <= MIB else 20 * MIB
        if free[kind] < size:
            pieces.append(kind)
            free[kind] = kind
        free[kind] -= size
    return pieces


def page_locked(size: int) -> int:
    """Bytes that torch takes for a page-locked tensor of ``size`` bytes: the next power of two
    (``ATen/core/CachingHostAllocator.h``)."""
    return 1 << (size - 1).bit_length()


def asleep_bytes(model: PlannedModel, rollout: RolloutRun) -> int:
    """Page-locked memory of one worker that sleeps at level 1; 0 where it drops its weights or never sleeps."""
    if not rollout.sleeps or rollout.sleep_level != 1:
        return 0
    sizes = engine_sizes(model, rollout.dtype, rollout.tensor_parallel)
    return sum(map(page_locked, segments(sizes)))


def pinned_base_bytes(model: PlannedModel, run: Run) -> int:
    """Page-locked memory of one worker that keeps the originals it merges into; 0 where it keeps none."""
    if run.training != HYBRID or run.hybrid.sync != "receiver_merge" or run.hybrid.sync_base != "pinned":
        return 0
    lora = set(model.allocation.lora_names)
    weights = (c.in_features * c.out_features for c in model.candidates if c.name in lora)
    return sum(page_locked(itemsize(run.stored_dtype) * elements) for elements in weights)


def sequences_at_once(memory: RolloutMemory, tokens: int, rollout: RolloutRun) -> int:
    """Sequences of that length that one engine can generate at once."""
    return min(rollout.max_sequences, math.floor(memory.cached_tokens / max(1, tokens)))
