"""Gradients of frozen weights, one module and one micro-batch at a time.

The gradient of a frozen weight is ``δᵀ x``, with x the module's input and δ the gradient of its output. A hook hands
both on, so no weight ever holds a ``.grad``, and whoever takes them decides what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.probing.recompute import is_recomputing

Take = Callable[[int, Tensor, Tensor], None]


@contextmanager
def weight_gradients(layers: Sequence[nn.Module], take: Take) -> Iterator[None]:
    """While passes run forward and backward, give ``take`` what the gradient of each layer's weight is made of.

    Between forward and backward the inputs of these layers stay in memory.

    Args:
        layers: modules with one input ``[B', S', d_in]`` and an output ``[B', S', d_out]`` that requires a gradient.
        take: index of the layer, ``δ [tokens, d_out]``, ``x [tokens, d_in]``, at least float32. Summed over
            micro-batches and ranks ``δᵀ x`` is the gradient ``[d_out, d_in]``.
    """

    def on_output(index: int, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not is_recomputing():
            output.register_hook(partial(on_gradient, index, inputs[0].detach()))

    @torch.no_grad()
    def on_gradient(index: int, x: Tensor, delta: Tensor) -> None:
        take(index, wide(delta).flatten(0, -2), wide(x).flatten(0, -2))

    hooks = [layer.register_forward_hook(partial(on_output, index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: bfloat16 sums keep two digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
