"""The probing run of criterion ``adalora``: adapters whose components are pruned to a budget (arXiv 2303.10512).

Formulas and their order follow the official code, ``loralib/loralib/adalora.py`` of QingruZhang/AdaLoRA, whose steps
count from 0; here step t is the t-th optimizer step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import AdaLoraConfig, ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.layers import attach
from hybrid_lora_plugin.probing.method import ProbeMethod, require_finite, warmup_rate
from hybrid_lora_plugin.probing.methods.svd_lora import check_trained
from hybrid_lora_plugin.probing.optimizer import NamedAdamW


@dataclass(frozen=True)
class BudgetSchedule:
    """How many components all modules keep together, by optimizer step from 1 (AdaLoRA Eq. 12).

    Attributes:
        initial, target: b0 and bT, components of all M modules.
        start: last step before pruning begins.
        end: first step at which the budget is ``target``; after it every step prunes, and importance is frozen.
        interval: steps between two prunings up to ``end``.
    """

    initial: int
    target: int
    start: int
    end: int
    interval: int

    def budget(self, step: int) -> int:
        """``bT + (b0 − bT)(1 − (t − start) / (end − start))³``, rounded down."""
        if step <= self.start:
            return self.initial
        if step >= self.end:
            return self.target
        left = 1 - (step - self.start) / (self.end - self.start)
        return int(self.target + (self.initial - self.target) * left**3)

    def prunes(self, step: int) -> bool:
        """Whether components are pruned after this step."""
        return step > self.end or (step > self.start and step % self.interval == 0)

    def learns(self, step: int) -> bool:
        """Whether importance is updated after this step; then it stays, so the last mask stays as well."""
        return step < self.end

    def reaches_target(self, steps: int) -> bool:
        """Whether a warm-up of ``steps`` learns importance and then prunes to the target at least once."""
        return self.learns(1) and any(self.prunes(step) for step in range(self.end, steps + 1))


def schedule_of(steps: int, modules: int, settings: AdaLoraConfig) -> BudgetSchedule:
    """The schedule of a warm-up.

    Args:
        steps: ``probe.warmup_steps``.
        modules: M.
        settings: ``probe.adalora``.
    """
    return BudgetSchedule(
        initial=settings.initial_rank * modules,
        target=settings.target_rank * modules,
        start=round(settings.start * steps),
        end=steps - round(settings.final * steps),
        interval=settings.interval,
    )


def keep_most_important(importance: Tensor, budget: int) -> Tensor:
    """Which components survive a global threshold at the ``(M r − budget)``-th smallest importance.

    Args:
        importance: ``[M, r]``.
        budget: how many to keep.

    Returns:
        bool ``[M, r]``. What equals the threshold goes, so ties can leave fewer than ``budget``.
    """
    pruned = importance.numel() - budget
    if pruned <= 0:
        return torch.ones_like(importance, dtype=torch.bool)
    return importance > torch.kthvalue(importance.flatten(), pruned).values


def orthogonality(matrices: Sequence[Tensor]) -> Tensor:
    """Mean over the matrices ``[r, d]`` of ``||P Pᵀ − I||_F``, not squared: a scalar (``compute_orth_regu``)."""
    norms = [torch.linalg.matrix_norm(p @ p.T - torch.eye(len(p), dtype=p.dtype, device=p.device)) for p in matrices]
    return torch.stack(norms).mean()


class AdaLoraMethod(ProbeMethod):
    """Serves ``adalora``.

    The official scale ``lora_alpha / (r + 1e-5)`` is the constant ``lora.alpha / initial_rank``, held in the layers'
    frozen ``alpha``.

    Attributes:
        layers: the M layers by module name.
    """

    rows = 0

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], config: ProbeCommandConfig) -> None:
        """Freeze ``model`` and put an ``SvdLoraLinear`` with AdaLoRA's values in the place of its M candidates.

        Raises:
            ProbeError: the warm-up is too short for the schedule, or no importance could arise.
        """
        probe, settings = config.probe, config.probe.adalora
        self.warmup_steps = probe.warmup_steps
        self._schedule = schedule_of(probe.warmup_steps, len(candidates), settings)
        _require_schedule(probe.warmup_steps, len(candidates), settings)
        self.layers = attach(model.eval(), candidates, settings.initial_rank, probe.seed, "adalora")
        for layer in self.layers.values():
            nn.init.constant_(layer.alpha, config.lora.alpha / settings.initial_rank).requires_grad_(False)
        self._trained = {
            f"{name}.{which}": getattr(layer, which) for name, layer in self.layers.items() for which in ("A", "B", "e")
        }
        self.replicated = [*self._trained.values(), *(layer.alpha for layer in self.layers.values())]
        self._settings, self.lr = settings, warmup_rate(probe, "adalora")

    def start(self, passes: Passes) -> None:
        """Make A, B and e trainable at ``probe.adalora.lr``, with importance 0."""
        self._passes = passes
        self._optimizer = NamedAdamW(self._trained, self.lr)
        self._importance = {name: torch.zeros_like(parameter) for name, parameter in self._trained.items()}
        self._uncertainty = {name: torch.zeros_like(parameter) for name, parameter in self._trained.items()}
        self._kept = torch.ones(
            len(self.layers), self._settings.initial_rank, dtype=torch.bool, device=passes.ranks.device
        )

    def warm_up(self, batch: Batch, validation: Batch) -> float:
        """One AdamW step on ``batch`` ``[B, S]``, then importance and mask; ``validation`` is not used.

        Returns:
            The response loss before the step, without the penalty.

        Raises:
            ProbeError: the loss is NaN or infinite.
        """
        self._optimizer.zero_grad()
        loss = self._passes.backward(batch, list(self._trained.values()))
        require_finite(loss, self.step, "probe.adalora.lr")
        # The penalty has no data: its gradient is the same on every rank, and is added once to what was summed.
        matrices = [matrix for layer in self.layers.values() for matrix in (layer.A.T, layer.B)]
        (self._settings.orthogonal * orthogonality(matrices)).backward()
        self._optimizer.step()
        self.step += 1
        if self._schedule.learns(self.step):
            self._update_importance()
        if self._schedule.prunes(self.step):
            self._prune(self._schedule.budget(self.step))
        return loss

    @torch.no_grad()
    def _update_importance(self) -> None:
        beta = self._settings.beta
        for name, parameter in self._trained.items():
            # The new value times the gradient of the old one, penalty included, as in the official code.
            now = (parameter * parameter.grad).abs()
            average = self._importance[name].mul_(beta).add_(now, alpha=1 - beta)
            self._uncertainty[name].mul_(beta).add_((now - average).abs(), alpha=1 - beta)

    def triplet_importance(self) -> Tensor:
        """``S_j = s(e_j) + mean_i s(A_ij) + mean_o s(B_jo)`` ``s`` importance × uncertainty: ``[M, r]`` float64."""

        def smoothed(name: str) -> Tensor:
            # In float64: the products of two small averages come near the end of float32.
            return self._importance[name].double() * self._uncertainty[name].double()

        return torch.stack(
            [
                smoothed(f"{name}.e") + smoothed(f"{name}.A").mean(dim=0) + smoothed(f"{name}.B").mean(dim=1)
                for name in self.layers
            ]
        )

    @torch.no_grad()
    def _prune(self, budget: int) -> None:
        self._kept = keep_most_important(self.triplet_importance(), budget)
        for layer, kept in zip(self.layers.values(), self._kept, strict=True):
            layer.e.masked_fill_(~kept, 0)

    def tensors(self) -> dict[str, Tensor]:
        """A, B, e and their moments, both averages under ``importance/`` and ``uncertainty/``, the mask as ``kept``."""
        averages = {f"importance/{name}": average for name, average in self._importance.items()}
        averages |= {f"uncertainty/{name}": average for name, average in self._uncertainty.items()}
        return self._optimizer.tensors() | averages | {"kept": self._kept}

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``tensors`` gave after ``step`` steps."""
        self.step = step
        self._optimizer.load(step, tensors)
        for name in self._trained:
            self._importance[name].copy_(tensors[f"importance/{name}"])
            self._uncertainty[name].copy_(tensors[f"uncertainty/{name}"])
        self._kept.copy_(tensors["kept"])

    def finish_warmup(self) -> None:
        """Drop the AdamW moments.

        Raises:
            ProbeError: ``max|B|`` or ``max|e|`` over all modules is 0, or a parameter or an importance is not finite.
        """
        self._optimizer.release()
        check_trained(self.layers, "probe.adalora.lr")
        if not self.triplet_importance().isfinite().all():
            raise ProbeError("probe.adalora.lr: the warm-up left NaN or inf in the importance; lower probe.adalora.lr")

    def results(self) -> dict[str, Tensor]:
        """``adalora_rank``, the components the last mask kept, and ``adalora_importance``, ``Σ_j S_j``.

        Ranks have many ties, which the importance breaks. Each is ``[M]`` float64 on the CPU.
        """
        return {
            "adalora_rank": self._kept.sum(dim=1).double().cpu(),
            "adalora_importance": self.triplet_importance().sum(dim=1).cpu(),
        }


def _require_schedule(steps: int, modules: int, settings: AdaLoraConfig) -> None:
    if settings.beta == 0:
        raise ProbeError("probe.adalora.beta: 0 makes every uncertainty 0 and ranks nothing; give 0.85 (AdaLoRA §4)")

    def enough(steps: int) -> bool:
        return schedule_of(steps, modules, settings).reaches_target(steps)

    if not enough(steps):
        raise ProbeError(
            f"probe.warmup_steps: {steps} steps end before probe.adalora has pruned to target_rank; "
            f"give at least {next(filter(enough, itertools.count(steps + 1)))} (500 in the paper)"
        )
