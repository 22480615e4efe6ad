"""The probing run of the paper: SVD-style LoRA on every candidate, warmed up, then scored (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.controls import ControlPass
from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.layers import SvdLoraLinear, attach
from hybrid_lora_plugin.probing.measure import batch_sensitivities, draw_partition, perturbation, prepare_scoring
from hybrid_lora_plugin.probing.method import OneOptimizerMethod, warmup_rate
from hybrid_lora_plugin.probing.optimizer import NamedAdamW

_PARAMETERS = ("A", "B", "e", "alpha")


class SvdLoraMethod(OneOptimizerMethod):
    """Serves the hybrid family, ``alpha``, ``lora_drop``, ``gradient_norm``, ``snip`` and ``perturbation``.

    Attributes:
        layers: the M layers by module name.
    """

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], config: ProbeCommandConfig) -> None:
        probe = config.probe
        self.warmup_steps, self.rows = probe.most_warmup_steps, probe.most_partitions
        self.layers = attach(model, candidates, config.lora.rank, probe.seed, probe.init)
        self._named = {
            f"{name}.{which}": getattr(layer, which) for name, layer in self.layers.items() for which in _PARAMETERS
        }
        self.replicated = list(self._named.values())
        # Dropout is off throughout.
        self._model, self._probe = model.eval(), probe
        self.lr = warmup_rate(probe, "svd_lora")
        self._perturb = config.criterion == "perturbation"

    def start(self, passes: Passes) -> None:
        self._passes = passes
        self._optimizer = NamedAdamW(self._named, self.lr)
        self._controls = ControlPass(self._model, self.layers, passes) if self._probe.controls else None

    def finish_warmup(self) -> None:
        self._optimizer.release()
        check_trained(self.layers)
        self.prepare_scoring()

    def prepare_scoring(self) -> None:
        prepare_scoring(self._model, self.layers)

    def score(self, row: int, batch: Batch) -> tuple[dict[str, Tensor], float]:
        partition = draw_partition(self._probe.seed, row, len(self.layers))
        sensitivities, loss = batch_sensitivities(self.layers, self._passes, batch, partition)
        measured = {"sensitivities": sensitivities}
        # What does not depend on the partition is measured once a batch.
        if row % self._probe.partitions_per_batch == 0:
            if self._controls is not None and self.measure_controls:
                measured |= self._controls.measure(batch)
            if self._perturb:
                measured["perturbation"] = perturbation(self.layers, self._passes, batch)
        return measured, loss

    def results(self) -> dict[str, Tensor]:
        return results_of(self.layers)


def results_of(layers: Mapping[str, SvdLoraLinear]) -> dict[str, Tensor]:
    """``alpha`` (Eq. 8, signed) and ``delta_norm`` of warmed-up layers, each ``[M]`` float64 on the CPU."""
    return {
        "alpha": torch.stack([layer.scale.detach().double().squeeze().cpu() for layer in layers.values()]),
        "delta_norm": torch.stack([layer.delta_norm().cpu() for layer in layers.values()]),
    }


def check_trained(layers: Mapping[str, SvdLoraLinear], rate: str = "probe.lr") -> None:
    """Refuse adapters whose sensitivities would all be 0 by construction; ``rate`` is the option to lower if NaN.

    Raises:
        ProbeError: ``max|B|`` or ``max|e|`` over all modules is 0, or a parameter is not finite.
    """
    for which, attribute in (("A", "A"), ("B", "B"), ("e", "coefficients"), ("alpha", "scale")):
        # Of a tensor: Python's max would pass over a NaN.
        values = [getattr(layer, attribute).detach().abs().max() for layer in layers.values()]
        largest = torch.stack(values).max().item()
        if not math.isfinite(largest):
            raise ProbeError(f"{rate}: the warm-up left {largest} in {which}; lower {rate}")
        if largest == 0 and which in ("B", "e"):
            raise ProbeError(
                f"probe.warmup_steps: max|{which}| is 0 after the warm-up, so every sensitivity would be 0; "
                f"give probe.warmup_steps of at least 1 (500 in the paper)"
            )
