"""What one pass of a probe holds beside the base: its own layers run on tensors without memory, and extrapolated.

Two models of few decoder layers give the line, as in ``activations``, with the layers that a probe puts on every module
and the hooks that its measurements use. Attention is not run; it stands as fused kernels do, with keys and values
repeated for every head, as transformers does where rows are padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import find_candidates, meta_model
from hybrid_lora_plugin.plan.activations import Activations, KeyedConfig, fused_attention, register_attention
from hybrid_lora_plugin.plan.live_bytes import LiveBytes
from hybrid_lora_plugin.plan.model import text_config
from hybrid_lora_plugin.probing.distributed import decoder_layers
from hybrid_lora_plugin.probing.layers import SvdLoraLinear, attach, replace
from hybrid_lora_plugin.probing.methods.full_delta import FullDeltaLinear
from hybrid_lora_plugin.probing.recompute import is_recomputing, recompute_activations
from hybrid_lora_plugin.probing.weight_gradients import wide

#: what is put on the modules
SVD, DELTA, NOTHING = "svd", "delta", "nothing"
#: what is made of each module's weight gradient in the backward pass
NORM, SKETCH = "norm", "sketch"
_ATTENTION = "as_fused_kernels_store_repeated"
_FEW = (2, 3)


@dataclass(frozen=True)
class ProbePass:
    """One kind of pass.

    Attributes:
        layers: ``SVD``, ``DELTA`` or ``NOTHING``. rank: of the adapters.
        trained: the parameters of a layer that get a gradient, e.g. ``("e",)``; none: a forward pass alone.
        tokens: of the pass, padding included. dtype: of the base.
        checkpointing: of activations.
        weight_gradients: ``NORM`` or ``SKETCH``, where each module's input is held for it; "" otherwise.
    """

    layers: str
    rank: int
    trained: tuple[str, ...]
    tokens: int
    dtype: str
    checkpointing: bool
    weight_gradients: str = ""


def probe_activations(config: Any, of: ProbePass, trust_remote_code: bool = False) -> Activations:
    """Bytes of all decoder layers in a pass; the base, the probe's parameters and the logits are not among them.

    Args:
        config: the Hugging Face config of the whole model.
        of: the pass.
        trust_remote_code: as in transformers.
    """
    layers = text_config(config).num_hidden_layers
    text = config.to_json_string(use_diff=False)
    few = [_of_few(text, count, of, trust_remote_code, KeyedConfig(config)) for count in _FEW]

    def at(name: str) -> int:
        first, second = (getattr(one, name) for one in few)
        return first + (layers - _FEW[0]) * (second - first)

    return Activations(at("kept"), at("peak"))


def _repeated(module, query, key, value, mask, **options):
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) if groups > 1 else states for states in (key, value))
    return fused_attention(module, query, key, value, mask, **options)


@lru_cache(maxsize=256)
def _of_few(_, layers: int, of: ProbePass, trust_remote_code: bool, keyed: KeyedConfig) -> Activations:
    config = deepcopy(keyed.config)
    text = text_config(config)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        # Windows of attention, which is not run.
        text.layer_types = (text.layer_types * layers)[:layers]
    model = meta_model(config, trust_remote_code).to(getattr(torch, of.dtype)).eval().requires_grad_(False)
    model.set_attn_implementation(register_attention(_ATTENTION, _repeated))
    candidates = find_candidates(model)
    if of.layers == SVD:
        attach(model, candidates, of.rank, seed=0)
        # Drawn on the host.
        model.to("meta")
    elif of.layers == DELTA:
        for candidate in candidates:
            replace(model, candidate.name, FullDeltaLinear(model.get_submodule(candidate.name)))
    if of.checkpointing:
        recompute_activations(decoder_layers(model, candidates))
    return measured(model, [model.get_submodule(candidate.name) for candidate in candidates], of)


def measured(model: nn.Module, modules: list[nn.Module], of: ProbePass, device: str = "meta") -> Activations:
    """The same of one model as it is, on the meta device or with memory."""
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (SvdLoraLinear, FullDeltaLinear)):
                parameter.requires_grad_(name in of.trained)
                # Counted with the optimizer, and gone with each call here.
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda trained: setattr(trained, "grad", None))
    decoder, width = model.get_decoder(), text_config(model.config).hidden_size
    weights = [*model.parameters(), *model.buffers()]
    live = LiveBytes(weights)
    gradient = bool(of.trained)
    with torch.set_grad_enabled(gradient), _weight_gradients(modules, of), live:
        dtype = getattr(torch, of.dtype)
        inputs = torch.zeros(1, of.tokens, width, dtype=dtype, device=device, requires_grad=gradient)
        positions = torch.arange(of.tokens, device=device)[None]
        hidden = decoder(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state
        kept = live.now()
        if gradient:
            hidden.backward(torch.ones_like(hidden))
    return Activations(kept, live.peak)


@contextmanager
def _weight_gradients(modules: list[nn.Module], of: ProbePass) -> Iterator[None]:
    """What the hooks of the controls or of sketches do to memory, one module after the other."""

    def on_output(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not is_recomputing():
            if of.weight_gradients == NORM:
                with torch.no_grad():
                    wide(module.branch(inputs[0])).square().sum(dtype=torch.float64)
            output.register_hook(partial(on_gradient, inputs[0].detach()))

    @torch.no_grad()
    def on_gradient(x: Tensor, delta: Tensor) -> None:
        delta, x = wide(delta).flatten(0, -2), wide(x).flatten(0, -2)
        if of.weight_gradients == SKETCH:
            delta, x = delta * delta[:1], x * x[:1]
        delta.T @ x

    hooks = [module.register_forward_hook(on_output) for module in modules] if of.weight_gradients else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
