"""What a command says about the allocation it wrote."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_lora_plugin.allocation import Allocation


def budget_line(allocation: Allocation) -> str:
    """One line: what was asked, allowed and used, in the unit of the budget mode."""
    budget, total, count = allocation.budget, allocation.model.candidate_parameters, len(allocation.modules)
    if budget.mode == "fixed":
        return (
            f"budget: none, criterion {allocation.criterion.name} names the modules; they have {budget.used:,} of "
            f"{total:,} parameters ({100 * budget.ratio:.2f} %)"
        )
    if budget.mode == "total_trainable":
        return f"budget: {budget.limit:,} trainable parameters, LoRA included; used {budget.used:,}"
    whole, unit = (count, "modules") if budget.mode == "modules" else (total, "parameters")
    return (
        f"budget: {100 * budget.ratio:g} % of {whole:,} {unit} = {budget.limit:,}; "
        f"used {budget.used:,} ({100 * budget.used / whole:.2f} %)"
    )


def print_result(folder: Path) -> None:
    """Say what was decided and what to do next."""
    from hybrid_lora_plugin.allocation import load_allocation

    allocation = load_allocation(folder)
    full, lora = len(allocation.full_names), len(allocation.lora_names)
    # A choice without scores has no scores.png.
    pages = [name for name in ("report.md", "heatmap.png", "scores.png") if (Path(folder) / name).exists()]
    print(f"allocation written to {folder} ({', '.join(pages)})")
    print(budget_line(allocation))
    print(f"full fine-tuning: {full} of {full + lora} modules, LoRA on the other {lora}")
    allocated = f"+hybrid_lora=enabled hybrid_lora.allocation={shlex.quote(str(folder))}"
    print(f"next: python -m verl.trainer.main_ppo YOUR_ARGUMENTS {allocated}")
