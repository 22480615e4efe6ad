"""``lora_drop``, a module's share of the squared LoRA output (arXiv 2402.07721)."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.errors import ScoringError
from hybrid_lora_plugin.scoring.measurements import LORA_OUTPUT, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "lora_drop", direction="lowest", needs=(LORA_OUTPUT,), source="paper §4.4; LoRA-Drop, arXiv 2402.07721"
)
def score(measured: Measured) -> ModuleScores:
    """``I = g / Σ g`` over modules with ``g = Σ ||ΔW x||²`` over all batches, lowest first.

    Raises:
        ScoringError: no adapter puts out anything.
    """
    series = measured.series(LORA_OUTPUT)
    output = series.sum(dim=0)
    if not output.sum() > 0:
        raise ScoringError("lora_output: all are 0, so no adapter was trained; raise probe.warmup_steps")
    return ModuleScores.of_series(output / output.sum(), series)
