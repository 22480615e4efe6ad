"""The probing run of criterion ``full_pruning``: full deltas on every candidate, scored by Algorithm 1's masks.

The paper's Hybrid-LoRA-4 starts from full fine-tuning and prunes modules to LoRA, without a formula. Here
``D = W − W₀`` of all modules is trained and takes the place of the LoRA branch; a component is then an entry of D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.layers import replace
from hybrid_lora_plugin.probing.measure import draw_partition, masked_gradients, sensitivities_of
from hybrid_lora_plugin.probing.method import OneOptimizerMethod, warmup_rate
from hybrid_lora_plugin.probing.optimizer import NamedAdamW


class FullDeltaLinear(nn.Module):
    """``y = base(x) + x D``, with a switch that disables the second term.

    The base is frozen and keeps its dtype; ``D [d_in, d_out]`` is float32 and starts at 0. It stays apart from the base
    because a bfloat16 weight would round steps of 1e-6 away.

    Attributes:
        active: whether ``x D`` takes part; set by the masks of Algorithm 1.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.active = True
        self.D = nn.Parameter(torch.zeros(base.in_features, base.out_features, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., d_in] -> [..., d_out]`` in the dtype of ``x``."""
        y = self.base(x)
        return y + x @ self.D.to(x.dtype) if self.active else y


class FullDeltaMethod(OneOptimizerMethod):
    """Serves ``full_pruning``.

    Every D has a gradient at once and two AdamW moments: with D itself four times the candidates' parameters in
    float32, as in full fine-tuning.

    Attributes:
        layers: the M layers by module name.
    """

    rate_option = "probe.full_lr"

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], config: ProbeCommandConfig) -> None:
        """Freeze ``model`` and put a ``FullDeltaLinear`` in the place of its M candidates; dropout is off."""
        probe = config.probe
        self.warmup_steps, self.rows = probe.most_warmup_steps, probe.most_partitions
        model.requires_grad_(False).eval()
        self.layers = {candidate.name: FullDeltaLinear(model.get_submodule(candidate.name)) for candidate in candidates}
        for name, layer in self.layers.items():
            replace(model, name, layer)
        self.replicated = [layer.D for layer in self.layers.values()]
        self._seed, self.lr = probe.seed, warmup_rate(probe, "full_delta")

    @classmethod
    def check_ranks(cls, size: int) -> None:
        """Refuse several processes: the deltas and their moments are not sharded.

        Raises:
            ProbeError: ``size`` is above 1.
        """
        if size > 1:
            raise ProbeError(
                f"criterion: full_pruning keeps whole deltas with their AdamW moments and cannot share them over "
                f"{size} processes; run it on one process or choose another criterion, e.g. hybrid"
            )

    def start(self, passes: Passes) -> None:
        """Make the deltas trainable."""
        self._passes = passes
        self._optimizer = NamedAdamW({f"{name}.D": layer.D for name, layer in self.layers.items()}, self.lr)

    def finish_warmup(self) -> None:
        """Drop the AdamW moments.

        Raises:
            ProbeError: ``max|D|`` over all modules is 0, or one is not finite.
        """
        self._optimizer.release()
        largest = torch.stack([layer.D.detach().abs().max() for layer in self.layers.values()]).max().item()
        if not math.isfinite(largest):
            raise ProbeError(f"probe.full_lr: the warm-up left {largest} in D; lower probe.full_lr")
        if largest == 0:
            raise ProbeError(
                "probe.warmup_steps: max|D| is 0 after the warm-up, so every sensitivity would be 0; "
                "give probe.warmup_steps of at least 1 (500 in the paper)"
            )

    def score(self, row: int, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """``full_sensitivities``: ``s = mean |D ⊙ ∂(L_A + L_B)/∂D|`` (Eq. 11, 12, with D for e), and the mean loss.

        Args:
            row: which partition.
            batch: validation batch ``[B, S]``.

        Returns:
            ``[M]`` float64 on the CPU by name, and the mean of the two losses.
        """
        partition = draw_partition(self._seed, row, len(self.layers))
        loss = masked_gradients(list(self.layers.values()), self.replicated, self._passes, batch, partition)
        sensitivities = sensitivities_of([(delta, delta.grad) for delta in self.replicated])
        # A full gradient is too much memory to keep for nothing.
        self._optimizer.zero_grad()
        return {"full_sensitivities": sensitivities}, loss

    def results(self) -> dict[str, Tensor]:
        """``delta_norm``: ``||D||_F``, ``[M]`` float64 on the CPU."""
        norms = [torch.linalg.vector_norm(delta.detach(), dtype=torch.float64) for delta in self.replicated]
        return {"delta_norm": torch.stack(norms).cpu()}
