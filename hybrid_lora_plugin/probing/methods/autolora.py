"""The probing run of criterion ``autolora``: selection scalars learned bi-level (AutoLoRA, arXiv 2403.09113).

AutoLoRA puts a softmax over the r components of a module, so the mean of a module's scalars is always 1 / r and says
nothing about the module. What it can say between modules is learned here: one scalar alpha per module, not normalised,
trained on validation batches, while A, B and e are trained on training batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.layers import attach
from hybrid_lora_plugin.probing.method import ProbeMethod, require_finite, warmup_rate
from hybrid_lora_plugin.probing.methods.svd_lora import check_trained
from hybrid_lora_plugin.probing.optimizer import NamedAdamW

#: Length of the finite-difference step in weight space (DARTS, arXiv 1806.09055 §2.3).
_STEP_LENGTH = 0.01


class AutoLoraMethod(ProbeMethod):
    """Serves ``autolora``. A step costs five forward and backward passes.

    In bfloat16 the finite difference of the second-order term is mostly rounding; with the default ``probe.lr`` the
    term is small beside the first-order one.

    Attributes:
        layers: the M layers by module name.
    """

    rows = 0

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], config: ProbeCommandConfig) -> None:
        """Freeze ``model`` and put a default ``SvdLoraLinear`` in the place of its M candidates; dropout is off."""
        probe = config.probe
        self.warmup_steps = probe.most_warmup_steps
        self.layers = attach(model.eval(), candidates, config.lora.rank, probe.seed)
        self._weights = {
            f"{name}.{which}": getattr(layer, which) for name, layer in self.layers.items() for which in ("A", "B", "e")
        }
        self._alphas = {f"{name}.alpha": layer.alpha for name, layer in self.layers.items()}
        self.replicated = [*self._weights.values(), *self._alphas.values()]
        self.lr, self._alpha_lr = warmup_rate(probe, "autolora"), probe.autolora.alpha_lr

    def start(self, passes: Passes) -> None:
        """Make two optimizers: A, B and e learn at ``probe.lr``, alpha at ``probe.autolora.alpha_lr``."""
        self._passes = passes
        self._weight_optimizer = NamedAdamW(self._weights, self.lr)
        self._alpha_optimizer = NamedAdamW(self._alphas, self._alpha_lr)

    def warm_up(self, batch: Batch, validation: Batch) -> float:
        """One step of alpha, then one of A, B and e at the new alpha (DARTS, Algorithm 1).

        Args:
            batch: ``[B, S]``, all that A, B and e learn from.
            validation: ``[B', S']``.

        Returns:
            The training loss before the step.

        Raises:
            ProbeError: the loss is NaN or infinite.
        """
        gradients, loss = self.alpha_gradients(batch, validation)
        require_finite(loss, self.step)
        self._update(self._alpha_optimizer, gradients)
        gradients, _ = self._gradients(batch, self._weights.values())
        self._update(self._weight_optimizer, gradients)
        self.step += 1
        return loss

    def alpha_gradients(self, batch: Batch, validation: Batch) -> tuple[list[Tensor], float]:
        """``∇_α L_val(w − ξ ∇_w L_tr(w, α), α)`` with ξ = ``probe.lr`` (DARTS Eq. 7, 8; AutoLoRA §3.3).

        The unrolled step is plain gradient descent, and the mixed second derivative is a central difference around w:
        ``∇_α L_val(w', α) − ξ [∇_α L_tr(w⁺, α) − ∇_α L_tr(w⁻, α)] / 2ε``, ``w± = w ± ε ∇_w' L_val(w', α)``. The
        official
        code differs: it unrolls an Adam step, takes the difference around w' and leaves out the factor ξ
        (``betty/hypergradient/darts.py``).

        Args:
            batch: training batch ``[B, S]``.
            validation: ``[B', S']``.

        Returns:
            M gradients ``[1]`` in candidate order, and the training loss at w.
        """
        weights = list(self._weights.values())
        start = [weight.detach().clone() for weight in weights]
        descent, loss = self._gradients(batch, weights)
        try:
            _shift(weights, start, descent, -self.lr)
            both, _ = self._gradients(validation, [*weights, *self._alphas.values()])
            direction, gradients = both[: len(weights)], both[len(weights) :]
            length = float(torch.stack([part.double().square().sum() for part in direction]).sum().sqrt())
            # Where the validation loss is flat in w, so is its dependence on alpha through w.
            if length > 0:
                epsilon = _STEP_LENGTH / length
                for sign in (1, -1):
                    _shift(weights, start, direction, sign * epsilon)
                    mixed, _ = self._gradients(batch, self._alphas.values())
                    for gradient, part in zip(gradients, mixed, strict=True):
                        gradient.sub_(part, alpha=sign * self.lr / (2 * epsilon))
        finally:
            _shift(weights, start)
        return gradients, loss

    def _gradients(self, batch: Batch, wanted: Sequence[nn.Parameter]) -> tuple[list[Tensor], float]:
        """Gradients of the loss of ``batch`` for the wanted parameters alone; no ``.grad`` outlives the call."""
        wanted = list(wanted)
        for parameter in self.replicated:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in wanted:
            parameter.requires_grad_(True)
        loss = self._passes.backward(batch, wanted)
        gradients = [parameter.grad for parameter in wanted]
        for parameter in wanted:
            parameter.grad = None
        return gradients, loss

    @staticmethod
    def _update(optimizer: NamedAdamW, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(optimizer.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        # The other group's step must not find these.
        optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """A, B, e and alpha with the moments of both optimizers; the parameter names keep them apart."""
        return self._weight_optimizer.tensors() | self._alpha_optimizer.tensors()

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``tensors`` gave after ``step`` steps."""
        self.step = step
        self._weight_optimizer.load(step, tensors)
        self._alpha_optimizer.load(step, tensors)

    def finish_warmup(self) -> None:
        """Drop the moments of both optimizers.

        Raises:
            ProbeError: alpha never moved, ``max|B|`` or ``max|e|`` is 0, or a parameter is not finite.
        """
        self._weight_optimizer.release()
        self._alpha_optimizer.release()
        alpha = self.results()["autolora_alpha"]
        if not alpha.isfinite().all():
            raise ProbeError(
                "probe.autolora.alpha_lr: the warm-up left NaN or inf in alpha; lower probe.autolora.alpha_lr"
            )
        check_trained(self.layers)
        if (alpha == 1).all():
            raise ProbeError(
                f"probe.warmup_steps: every alpha is still 1 after {self.step} warm-up steps, so no module differs; "
                f"give more probe.warmup_steps (500 in the paper) or a higher probe.autolora.alpha_lr"
            )

    def results(self) -> dict[str, Tensor]:
        """``autolora_alpha``: the learned scalars with their sign, ``[M]`` float64 on the CPU."""
        return {"autolora_alpha": torch.cat([alpha.detach().double().cpu() for alpha in self._alphas.values()])}


@torch.no_grad()
def _shift(
    weights: Sequence[nn.Parameter],
    start: Sequence[Tensor],
    direction: Sequence[Tensor] | None = None,
    length: float = 0,
) -> None:
    """Set the weights to ``start + length · direction``; always from ``start``, so nothing drifts."""
    for index, weight in enumerate(weights):
        weight.copy_(start[index])
        if direction is not None:
            weight.add_(direction[index], alpha=length)
