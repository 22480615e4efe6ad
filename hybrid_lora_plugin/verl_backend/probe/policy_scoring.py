"""What a policy probe measures in a step: verl's own passes of a mini-batch, under masks or with hooks on the modules.

Mini-batches have losses of their own, so the gradient of a step is the mean of theirs.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from verl.utils.device import get_device_id

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.layers import SvdLoraLinear
from hybrid_lora_plugin.probing.measure import draw_partition, sensitivities_of
from hybrid_lora_plugin.probing.methods.weight_gradient import signals_of, span, without
from hybrid_lora_plugin.probing.sketch import WIDTH, GradientSketch
from hybrid_lora_plugin.probing.weight_gradients import weight_gradients
from hybrid_lora_plugin.training.dtensor import whole
from hybrid_lora_plugin.verl_backend.probe.policy_schedule import GRADIENT_CRITERIA

#: One forward and backward pass of the mini-batch at hand, with the loss of the run; its outputs.
Pass = Callable[[], dict]


class StepScoring(abc.ABC):
    """Measures one step after the other."""

    @abc.abstractmethod
    def begin(self, first: int, partitions: int) -> None:
        """Before the first mini-batch of a step: it is scored under so many partitions, from number ``first``."""

    @abc.abstractmethod
    def add(self, one_pass: Pass, clear: Callable[[], None]) -> dict:
        """Take what a mini-batch has; ``clear`` drops all gradients. Returns the outputs of the last pass."""

    @abc.abstractmethod
    def finish(self) -> dict[str, list[Tensor]]:
        """Rows of the step by name, ``[M]`` or ``[M, k]`` on the CPU; equal on all ranks."""

    def measurements(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of all steps, ``[T, M, ...]`` by name, as measurements ``[T, M]`` float64."""
        return dict(rows)


def scoring_of(hybrid: HybridLoraConfig, layers: Mapping[str, SvdLoraLinear]) -> StepScoring:
    """For the criterion of the run."""
    if hybrid.criterion in GRADIENT_CRITERIA:
        return GradientScoring(hybrid, list(layers.values()))
    return MaskedScoring(hybrid, list(layers.values()))


class MaskedScoring(StepScoring):
    """``∂(L_A + L_B)/∂e`` under the complementary masks of Algorithm 1."""

    def __init__(self, hybrid: HybridLoraConfig, layers: Sequence[SvdLoraLinear]) -> None:
        self._seed, self._layers = hybrid.probe.seed, layers

    def begin(self, first: int, partitions: int) -> None:
        self._first, self._mini_batches = first, 0
        self._gradients = [
            [torch.zeros(layer.e.shape, device=get_device_id()) for layer in self._layers] for _ in range(partitions)
        ]

    def add(self, one_pass: Pass, clear: Callable[[], None]) -> dict:
        for offset, gradients in enumerate(self._gradients):
            in_bucket_a = draw_partition(self._seed, self._first + offset, len(self._layers))
            clear()
            try:
                for active in (~in_bucket_a, in_bucket_a):
                    for layer, on in zip(self._layers, active.tolist(), strict=True):
                        layer.active = on
                    outputs = one_pass()
            finally:
                for layer in self._layers:
                    layer.active = True
            for total, layer in zip(gradients, self._layers, strict=True):
                if layer.e.grad is not None:
                    total += whole(layer.e.grad, get_device_id())
        self._mini_batches += 1
        clear()
        return outputs

    def finish(self) -> dict[str, list[Tensor]]:
        values = [whole(layer.e, get_device_id()) + layer.e_origin for layer in self._layers]
        rows = []
        for gradients in self._gradients:
            pairs = [(e, gradient / self._mini_batches) for e, gradient in zip(values, gradients, strict=True)]
            rows.append(sensitivities_of(pairs))
        return {"sensitivities": rows}


class GradientScoring(StepScoring):
    """Sketches of the gradients of the frozen weights, one of each module and step; no gradient is kept.

    The gradient is the mean over the ranks, as FSDP would reduce it.
    """

    def __init__(self, hybrid: HybridLoraConfig, layers: Sequence[SvdLoraLinear]) -> None:
        self._layers, self._criterion = layers, hybrid.criterion
        self._width = min(WIDTH, max(layer.base.in_features * layer.base.out_features for layer in layers))
        self._sketches = [
            GradientSketch(
                (layer.base.out_features, layer.base.in_features),
                self._width,
                hybrid.probe.seed,
                index,
                torch.device(get_device_id()),
            )
            for index, layer in enumerate(layers)
        ]
        self._spans: list[tuple[Tensor, Tensor]] | None = None

    def begin(self, first: int, partitions: int) -> None:
        shape = (3, len(self._layers), self._width)
        self._sums, self._mini_batches = torch.zeros(shape, device=get_device_id()), 0
        # The adapters moved since the check before, and not while steps are scored.
        if self._criterion == "residual_gradient" and (self._spans is None or first == 0):
            self._spans = [
                (span(whole(layer.B, get_device_id()).T), span(whole(layer.A, get_device_id())))
                for layer in self._layers
            ]

    def add(self, one_pass: Pass, clear: Callable[[], None]) -> dict:
        sketch, sample, other = self._sums
        adapted = self._criterion == "gradient_norm"
        outputs = self._sketched(one_pass, sketch, sample, adapted)
        if self._spans is not None:
            outputs = self._sketched(one_pass, other, None, True, self._spans)
        self._mini_batches += 1
        clear()
        return outputs

    def _sketched(self, one_pass, sketch, sample, active, spans=None) -> dict:
        def take(index: int, delta: Tensor, x: Tensor) -> None:
            if spans is not None:
                outputs, inputs = spans[index]
                delta, x = without(delta, outputs), without(x, inputs)
            self._sketches[index].add_(sketch[index], None if sample is None else sample[index], delta, x)

        for layer in self._layers:
            layer.active = active
        try:
            with weight_gradients(self._layers, take):
                return one_pass()
        finally:
            for layer in self._layers:
                layer.active = True

    def finish(self) -> dict[str, list[Tensor]]:
        ranks = Ranks(torch.device(get_device_id()))
        sketch, sample, other = (ranks.sum_(self._sums) / (ranks.size * self._mini_batches)).cpu()
        if self._criterion == "gradient_norm":
            return {"gradient_norm": [torch.linalg.vector_norm(sketch.double(), dim=1)]}
        rows = {"gradient_sketch": [sketch], "gradient_signs": [sample.sign().to(torch.int8)]}
        return rows | ({"residual_sketch": [other]} if self._spans is not None else {})

    def measurements(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._criterion == "gradient_norm":
            return dict(rows)
        return signals_of(rows, [sketch.sampled for sketch in self._sketches])
