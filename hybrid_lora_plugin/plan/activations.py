"""What a forward and a backward pass hold of activations: a few decoder layers run without memory, and extrapolated.

The layers are the model's own, with the adapters that the run trains, in the type that it computes in; autograd keeps
what it keeps on an accelerator. Attention is the one part that is not run: it stands as its fused kernels do, which
keep queries, keys, values, the output and one number of fp32 for each head and token, and never a [tokens, tokens]
matrix. Decoder layers are alike, so bytes grow by the same amount with each: two models of few layers give the line.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from hybrid_lora_plugin.candidates import meta_model
from hybrid_lora_plugin.config import BudgetConfig, HybridLoraConfig
from hybrid_lora_plugin.plan.live_bytes import LiveBytes
from hybrid_lora_plugin.plan.model import allocation_of, text_config, under_allocation, with_adapters
from hybrid_lora_plugin.plan.run import FULL, HYBRID, Run

_ATTENTION = "as_fused_kernels_store"
#: layers of the two models that a line is drawn through
_FEW = (2, 3)


@dataclass(frozen=True)
class Activations:
    """Bytes of the decoder layers on one GPU, for one micro-batch; weights and the logits are not among them.

    Attributes:
        kept: alive when the last layer has been computed and the loss is next; with a gradient also what the backward
            pass needs of every layer.
        peak: most bytes alive at any time from the embeddings to the end of the backward pass.
    """

    kept: int
    peak: int


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused attention kernels keep; what it gives has the right shape and no meaning."""

    @staticmethod
    def forward(context, query, key, value):
        out = query.clone()
        sums = torch.zeros(query.shape[:3], dtype=torch.float32, device=query.device)
        context.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(context, gradient):
        query, key, value, *_ = context.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def fused_attention(module, query, key, value, mask, **options):
    """As transformers wants it: ``[rows, tokens, heads, head size]``, and no weights."""
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


def register_attention(name: str = _ATTENTION, attention: Callable = fused_attention) -> str:
    """Make it known to transformers; returns its name for ``attn_implementation``."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention)
    return name


def layer_activations(config: Any, run: Run, tokens: int, gradient: bool) -> Activations:
    """Activations of all decoder layers for a micro-batch.

    Args:
        config: the Hugging Face config of the whole model.
        run: how it is trained, and whether activations are computed again.
        tokens: of the micro-batch on one GPU.
        gradient: whether a backward pass follows.
    """
    layers = text_config(config).num_hidden_layers
    few = [
        _of_few(config, layers_, run.training, run.lora_rank, run.checkpointing, run.compute_dtype, tokens, gradient)
        for layers_ in _FEW
    ]

    def at(name: str) -> int:
        first, second = (getattr(one, name) for one in few)
        return first + (layers - _FEW[0]) * (second - first)

    return Activations(at("kept"), at("peak"))


def _of_few(config, layers, training, rank, checkpointing, dtype, tokens, gradient) -> Activations:
    key = (training, rank, checkpointing, dtype, tokens, gradient)
    return _cached(config.to_json_string(use_diff=False), layers, *key, KeyedConfig(config))


class KeyedConfig:
    """A config that the cache's key already describes."""

    def __init__(self, config: Any):
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyedConfig)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=256)
def _cached(_, layers, training, rank, checkpointing, dtype, tokens, gradient, kept_out: KeyedConfig) -> Activations:
    model = few_layers(kept_out.config, layers, training, rank).to(getattr(torch, dtype))
    return measured(model, tokens, checkpointing, gradient)


def few_layers(config: Any, layers: int, training: str, rank: int) -> nn.Module:
    """The model on the meta device with that many decoder layers, trained as in a run.

    Under an allocation every layer stands for one with most adapters: which modules are fully tuned changes what is
    kept by the r columns of an adapter's product for each token, and nothing else.
    """
    config = deepcopy(config)
    text = text_config(config)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        # Windows of attention, which is not run.
        text.layer_types = (text.layer_types * layers)[:layers]
    model = meta_model(config)
    model.set_attn_implementation(register_attention())
    run = _adapters_of(rank)
    if training == HYBRID:
        # A few modules at least are fully tuned, whatever the shapes.
        budget = HybridLoraConfig(criterion="random", budget=BudgetConfig(ratio=0.2, overflow="skip"))
        return under_allocation(model, allocation_of(model, budget, "few layers")[0], run)
    return model if training == FULL else with_adapters(model, run)


def _adapters_of(rank: int) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(lora_rank=rank, lora_alpha=2 * rank, lora_targets="all-linear")


def measured(model: nn.Module, tokens: int, checkpointing: bool, gradient: bool, device: str = "meta") -> Activations:
    """Bytes that the decoder of ``model`` holds in one forward pass, and in the backward pass behind it.

    Args:
        model: as of ``few_layers``, on the meta device or with memory.
        tokens: of one packed row.
        checkpointing: of activations.
        gradient: whether a backward pass follows.
        device: where the model is.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.get_base_model().get_decoder()
    if checkpointing:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(gradient)
    for parameter in model.parameters():
        # FSDP reduces a layer's gradients and gives the whole ones up; ``training`` counts them.
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda trained: setattr(trained, "grad", None))
    weights = [*model.parameters(), *model.buffers()]
    dtype, width = weights[0].dtype, text_config(model.config).hidden_size
    live = LiveBytes(weights)
    with torch.set_grad_enabled(gradient), live:
        inputs = torch.zeros(1, tokens, width, dtype=dtype, device=device, requires_grad=gradient)
        positions = torch.arange(tokens, device=device)[None]
        hidden = decoder(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state
        kept = live.now()
        if gradient:
            hidden.backward(torch.ones_like(hidden))
    return Activations(kept, live.peak)
