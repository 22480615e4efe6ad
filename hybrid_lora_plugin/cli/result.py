"""What a command says about the allocation it wrote."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_lora_plugin.allocation import Allocation


def print_result(folder: Path, allocation: Allocation) -> None:
    """Say what was selected, where it lies and what to do next.

    Args:
        folder: the artifact's.
        allocation: that was written there.
    """
    from hybrid_lora_plugin.allocation.budget_modes import budget_mode
    from hybrid_lora_plugin.allocation.consensus import agreement_in_words
    from hybrid_lora_plugin.allocation.learning import learned_in_words
    from hybrid_lora_plugin.allocation.stability import in_words
    from hybrid_lora_plugin.allocation.stopping import stopping_in_words
    from hybrid_lora_plugin.allocation.trial_words import trial_in_words, trial_table

    full, modules = len(allocation.full_names), len(allocation.modules)
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
    total, chosen_by = allocation.model.candidate_parameters, allocation.selection.criterion
    print(budget_mode(allocation.budget.mode).summary(allocation.budget, total, modules, chosen_by))
    print(f"full fine-tuning: {full} of {modules} modules, LoRA on the other {modules - full}")
    allocated = f"+hybrid_lora=enabled hybrid_lora.allocation={shlex.quote(str(folder))}"
    print(f"next: python -m verl.trainer.main_ppo YOUR_ARGUMENTS {allocated}")
