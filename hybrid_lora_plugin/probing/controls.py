"""One unmasked pass for the controls: LoRA-Drop, gradient norm and SNIP.

The gradient of a frozen weight is ``δᵀ x``, with x the module's input and δ the gradient of its output. It is formed
in a hook on δ, one module at a time, so the weights never hold a ``.grad`` and the memory is that of one gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.probing.forward import Batch, Passes, negative_log_likelihood
from hybrid_lora_plugin.probing.layers import SvdLoraLinear
from hybrid_lora_plugin.probing.recompute import is_recomputing
from hybrid_lora_plugin.probing.weight_gradients import wide

_MEASUREMENTS = ("lora_output", "gradient_norm", "snip")


class ControlPass:
    """Measures the warmed-up layers on validation batches, with all of them active.

    Per module m, for the mean response loss L of the whole batch and the frozen weight ``W [d_out, d_in]``:

    - ``lora_output``: ``Σ ||ΔW x||²`` over all tokens that are not padding (LoRA-Drop, arXiv 2402.07721);
    - ``gradient_norm``: ``||∂L/∂W||_F``;
    - ``snip``: ``Σ |W ⊙ ∂L/∂W|`` (Lee et al. 2018, arXiv 1810.02340).

    Between forward and backward the inputs of all M modules stay in memory. With several micro-batches each rank also
    keeps the float32 weight gradients of M / ranks modules until the last, since a norm of sums is no sum of norms.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SvdLoraLinear], passes: Passes) -> None:
        """For a model that ``layers`` is attached to; to be measured after ``prepare_scoring``.

        Args:
            model: whole on every rank, or sharded.
            layers: the M layers; the ``e`` of each requires a gradient, which makes δ exist even in the first decoder
                layer, whose inputs do not depend on any trained parameter.
            passes: how a batch is split.
        """
        self._model, self._layers, self._passes = model, list(layers.values()), passes
        self._earlier: dict[int, Tensor] = {}

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """One forward and backward pass of ``batch`` ``[B, S]``; leaves no gradients and no hooks behind.

        Returns:
            ``lora_output``, ``gradient_norm`` and ``snip``, each ``[M]`` float64 on the CPU, equal on all ranks.
        """
        ranks = self._passes.ranks
        size = (len(_MEASUREMENTS), len(self._layers))
        self._values = torch.zeros(size, dtype=torch.float64, device=ranks.device)
        # Once its own rows are used up, a rank repeats one to keep the others company; its tokens must not count.
        own_rows = len(range(ranks.rank, batch.rows, ranks.size))
        hooks = [layer.register_forward_hook(partial(self._on_output, i)) for i, layer in enumerate(self._layers)]
        try:
            for micro, last in self._passes.micro_batches(batch):
                self._last = last
                self._counted = micro.attention_mask.bool() & (own_rows > 0)  # [B', S']
                own_rows -= micro.rows
                (negative_log_likelihood(self._model, micro) / batch.response_tokens).backward()
        finally:
            for hook in hooks:
                hook.remove()
            self._earlier.clear()
            for layer in self._layers:
                for parameter in (layer.A, layer.B, layer.e, layer.alpha):
                    parameter.grad = None
        return dict(zip(_MEASUREMENTS, ranks.sum_(self._values).cpu(), strict=True))

    def _on_output(self, index: int, layer: SvdLoraLinear, inputs: tuple[Tensor], output: Tensor) -> None:
        if is_recomputing():
            return
        x = inputs[0].detach()  # [B', S', d_in]
        with torch.no_grad():
            branch = layer.branch(x)[self._counted]  # [tokens, d_out]
            self._values[0, index] += wide(branch).square().sum(dtype=torch.float64)
        # The gradient of the whole output equals that of the base's, which in the first layer requires none.
        output.register_hook(partial(self._on_gradient, index, layer, x))

    @torch.no_grad()
    def _on_gradient(self, index: int, layer: SvdLoraLinear, x: Tensor, delta: Tensor) -> None:
        gradient = wide(delta).flatten(0, -2).T @ wide(x).flatten(0, -2)  # [d_out, d_in]
        ranks = self._passes.ranks
        owner = index % ranks.size
        ranks.sum_to(gradient, owner)
        if ranks.rank != owner:
            return
        if index in self._earlier:
            gradient += self._earlier.pop(index)
        if not self._last:
            self._earlier[index] = gradient
            return
        self._values[1, index] = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        # Read here and not after the pass: a sharded model holds the whole weight only during the backward.
        gradient *= layer.base.weight
        self._values[2, index] = gradient.abs_().sum(dtype=torch.float64)
