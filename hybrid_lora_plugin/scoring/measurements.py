"""What a probing run measured, by name, and the one door through which a criterion reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import NORMALISATIONS, ControlConfig
from hybrid_lora_plugin.errors import ScoringError
from hybrid_lora_plugin.scoring import normalise

# Series, [T, M] float64: one row a validation batch.
SENSITIVITIES = "sensitivities"  # mean_j |e_j ∂L/∂e_j| of the SVD-LoRA probe under masks (Eq. 12)
FULL_SENSITIVITIES = "full_sensitivities"  # mean |D ⊙ ∂L/∂D| of full deltas D under masks (Hybrid-LoRA-4)
LORA_OUTPUT = "lora_output"  # Σ over tokens of ||ΔW x||² (LoRA-Drop)
GRADIENT_NORM = "gradient_norm"  # ||∂L/∂W||_F of the frozen weight
SNIP = "snip"  # Σ |W ⊙ ∂L/∂W| of the frozen weight
PERTURBATION = "perturbation"  # L(without m) − L (Eq. 9); may be negative
LOOKAHEAD = "lookahead"  # L − L(weight of m moved along minus the sign of its gradient); may be negative
GRADIENT_SIGNAL = "gradient_signal"  # pseudo-values of ||E G||² of the frozen weight's gradient; may be negative
GRADIENT_ENERGY = "gradient_energy"  # ||G||²
SIGN_AGREEMENT = "sign_agreement"  # mean over entries of sign G times the sign that most batches have
RESIDUAL_SIGNAL = "residual_signal"  # as gradient_signal, of what the warmed-up adapter cannot follow
FEATURE_NORM = "feature_norm"  # mean over tokens of ||W z|| over that of a random input of the same norm (PLoP)
# One value a module, [M] float64.
ALPHA = "alpha"  # learned α of the SVD-LoRA probe, signed (Eq. 8)
DELTA_NORM = "delta_norm"  # ||α A diag(e) B||_F after the warm-up, or ||D||_F of a full delta
ADALORA_RANK = "adalora_rank"  # rank left after AdaLoRA's pruning
ADALORA_IMPORTANCE = "adalora_importance"  # Σ_j S_j of AdaLoRA's triplets
AUTOLORA_ALPHA = "autolora_alpha"  # selection scalar learned on validation batches, signed
TRIAL = "trial"  # 1 in the modules of the candidate that a trial chose, 0 in the others


@dataclass(frozen=True)
class Measured:
    """Measurements of the M candidates, and what shapes how they are read.

    Attributes:
        candidates: the M modules, in the order of the last dimension of every tensor.
        tensors: measurements by name, ``[T, M]`` or ``[M]``.
        control: options of the criteria that need no measurement.
        normalise: one of ``config.NORMALISATIONS``; ``sqrt_dims`` and ``delta_norm`` divide everything read here.
    """

    candidates: Sequence[Candidate]
    tensors: Mapping[str, Tensor]
    control: ControlConfig = field(default_factory=ControlConfig)
    normalise: str = "none"

    def series(self, name: str) -> Tensor:
        """A measurement ``[T, M]`` float64, checked, divided as ``normalise`` says.

        Raises:
            ScoringError: missing, of another shape, NaN or infinite, or nothing to divide by.
        """
        return self._checked(name, dimensions=2) / self._divisor()

    def values(self, name: str) -> Tensor:
        """A measurement ``[M]`` float64, checked, divided as ``normalise`` says; raises as ``series``."""
        return self._checked(name, dimensions=1) / self._divisor()

    def require(self, name: str, criterion: str) -> None:
        """Raise ``ScoringError`` unless ``name`` was measured; ``criterion`` is what to probe with to have it."""
        if name not in self.tensors:
            raise ScoringError(
                f"criterion: this artifact does not hold {name!r} (it holds "
                f"{', '.join(sorted(self.tensors)) or 'no measurement'}); probe with criterion={criterion}"
            )

    def _divisor(self) -> Tensor:
        if self.normalise not in NORMALISATIONS:
            raise ScoringError(f"normalise: {self.normalise!r}; choose one of {', '.join(NORMALISATIONS)}")
        if self.normalise == "sqrt_dims":
            return normalise.sqrt_dims(self.candidates)
        if self.normalise == "delta_norm":
            if DELTA_NORM not in self.tensors:
                raise ScoringError(
                    "normalise: this artifact does not hold 'delta_norm'; probe with criterion=hybrid, or use "
                    "normalise=none"
                )
            return normalise.delta_norm(self._checked(DELTA_NORM, dimensions=1), self.candidates)
        return torch.ones(len(self.candidates), dtype=torch.float64)

    def _checked(self, name: str, dimensions: int) -> Tensor:
        if name not in self.tensors:
            raise ScoringError(f"{name}: was not measured; name it in `needs` of the criterion, and probe with it")
        tensor, modules = self.tensors[name], len(self.candidates)
        wanted = f"[T, {modules}]" if dimensions == 2 else f"[{modules}]"
        if tensor.ndim != dimensions or tensor.shape[-1] != modules or tensor.numel() == 0:
            raise ScoringError(f"{name}: shape {list(tensor.shape)}; give {wanted}, a column a module")
        bad = (~torch.isfinite(tensor)).reshape(-1, modules).any(dim=0).nonzero().flatten().tolist()
        if bad:
            raise ScoringError(
                f"{name}: NaN or infinity in {len(bad)} of {modules} modules, first {self.candidates[bad[0]].name}; "
                f"lower probe.lr or use model.dtype=float32"
            )
        return tensor.double()
