"""How many parameters of the whole model are frozen, full and adapter under an allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_lora_plugin.allocation.budget import FULL, LORA
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.report.page import ParameterCounts

if TYPE_CHECKING:
    from hybrid_lora_plugin.allocation.storage import Allocation


def parameter_counts_of(allocation: Allocation) -> ParameterCounts:
    """Count the parameters of the model that an allocation describes, adapters at the rank of the probe.

    Raises:
        AllocationError: the artifact was written before it recorded what this takes.
    """
    if allocation.model.parameters < 1 or any(c.in_features < 1 or c.out_features < 1 for c in allocation.candidates):
        raise AllocationError(
            "model.parameters: the parameters of the model and the dimensions of its modules are not recorded, as in an "
            "artifact of an earlier version; probe again with hybrid-lora-probe"
        )
    full = sum(module.parameters for module in allocation.modules if module.assignment == FULL)
    lora = sum(
        candidate.lora_parameters(allocation.criterion.rank)
        for candidate, module in zip(allocation.candidates, allocation.modules, strict=True)
        if module.assignment == LORA
    )
    return ParameterCounts(frozen=allocation.model.parameters - full, full=full, lora=lora)
