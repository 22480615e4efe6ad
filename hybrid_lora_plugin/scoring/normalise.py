"""What can be divided out of a score: the module's shape, the size of its probe update, or its type.

``sqrt_dims`` and ``delta_norm`` divide what was measured, before any criterion sees it; ``type_zscore`` acts on
the finished scores. None of them is in the paper: its score grows with module width, which these take out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.errors import ScoringError


def sqrt_dims(candidates: Sequence[Candidate]) -> Tensor:
    """``sqrt(d_in · d_out)`` of each module, ``[M]`` float64.

    Raises:
        ScoringError: the dimensions of a module are not known.
    """
    for candidate in candidates:
        if candidate.in_features < 1 or candidate.out_features < 1:
            raise ScoringError(
                f"normalise: 'sqrt_dims' needs the dimensions of {candidate.name}, which an artifact of an earlier "
                f"version does not hold; probe again, or use normalise=none"
            )
    return torch.tensor([c.in_features * c.out_features for c in candidates], dtype=torch.float64).sqrt()


def delta_norm(norms: Tensor, candidates: Sequence[Candidate]) -> Tensor:
    """The Frobenius norm of each module's probe update, ``[M]`` float64, checked to divide by.

    Raises:
        ScoringError: a norm is not above 0: that module was not trained.
    """
    bad = (norms <= 0).nonzero().flatten().tolist()
    if bad:
        raise ScoringError(
            f"normalise: 'delta_norm' cannot divide by {norms[bad[0]]:g}, the norm of the update of "
            f"{candidates[bad[0]].name} ({len(bad)} such modules); raise probe.warmup_steps, or use normalise=none"
        )
    return norms


def type_zscore(scores: Tensor, candidates: Sequence[Candidate]) -> Tensor:
    """``(score − mean) / std`` within each module type, population std, 0 where the std is 0.

    Args:
        scores: ``[M]`` float64.
        candidates: the M modules.

    Returns:
        ``[M]`` float64.
    """
    result = torch.zeros_like(scores)
    for type_ in {candidate.type for candidate in candidates}:
        members = torch.tensor([index for index, candidate in enumerate(candidates) if candidate.type == type_])
        values = scores[members]
        std = (values - values.mean()).square().mean().sqrt()
        # Equal scores may leave a rounded std of 1e-17, which would blow up what is no difference at all.
        if values.max() > values.min() and std > 0:
            result[members] = (values - values.mean()) / std
    return result
