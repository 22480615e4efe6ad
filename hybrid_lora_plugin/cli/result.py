"""What a command says about the allocation it wrote."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_lora_plugin.allocation import Allocation


def assigned_in_words(allocation: Allocation) -> str:
    """How many modules train in which way, and how many stay frozen, with their parameters."""
    full, modules = len(allocation.full_names), len(allocation.modules)
    if not (frozen := allocation.frozen_names):
        return f"full fine-tuning: {full} of {modules} modules, LoRA on the other {modules - full}"
    size = sum(module.parameters for module in allocation.modules if module.assignment == "frozen")
    return (
        f"full fine-tuning: {full} of {modules} modules, LoRA on {len(allocation.lora_names)}; {len(frozen)} stay "
        f"frozen, {size:,} parameters"
    )


def print_result(folder: Path, allocation: Allocation) -> None:
    """Say what was selected, where it lies and what to do next.

    Args:
        folder: the artifact's.
        allocation: that was written there.
    """
    from hybrid_lora_plugin.allocation.budget_modes import budget_mode
    from hybrid_lora_plugin.allocation.consensus import agreement_in_words
    from hybrid_lora_plugin.allocation.learning import learned_in_words
    from hybrid_lora_plugin.allocation.placement import placement_in_words
    from hybrid_lora_plugin.allocation.stability import in_words
    from hybrid_lora_plugin.allocation.stopping import stopping_in_words
    from hybrid_lora_plugin.allocation.trial_words import trial_in_words, trial_table

    # A choice without scores has no scores.png.
    pages = [name for name in ("report.md", "heatmap.png", "scores.png", "trial.png") if (Path(folder) / name).exists()]
    sure = f": {said}" if (said := in_words(allocation)) else ""
    print(f"allocation written to {folder} ({', '.join(pages)}){sure}")
    if learned := learned_in_words(allocation.probe):
        print(learned)
    if agreed := agreement_in_words(allocation):
        print(agreed)
    for line in stopping_in_words(allocation.probe):
        print(line)
    for line in [*(trial_table(allocation.trial) if allocation.trial else ()), *trial_in_words(allocation.trial)]:
        print(line)
    decided, chosen_by = allocation.decided_modules, allocation.selection.criterion
    mode = budget_mode(allocation.budget.mode)
    counted = decided if mode.limits else allocation.modules
    print(mode.summary(allocation.budget, sum(m.parameters for m in counted), len(counted), chosen_by))
    if allocation.selection.placement:
        print(f"placement: {placement_in_words(allocation.selection.placement)}")
    print(assigned_in_words(allocation))
    allocated = f"+hybrid_lora=enabled hybrid_lora.allocation={shlex.quote(str(folder))}"
    print(f"next: python -m verl.trainer.main_ppo YOUR_ARGUMENTS {allocated}")
