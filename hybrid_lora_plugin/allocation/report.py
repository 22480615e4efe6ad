"""The artifact for people: what was probed, what it cost, what it decided and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.candidates import TYPE_ORDER

if TYPE_CHECKING:
    from hybrid_lora_plugin.allocation.artifact import Allocation, ModuleRecord


@dataclass(frozen=True)
class Census:
    """Parameters of the whole model under the allocation.

    Attributes:
        frozen: in no group: embeddings, norms, head and the base weights of the LoRA modules.
        full: fully fine-tuned.
        lora: adapter parameters ``r (d_in + d_out)`` summed over the LoRA modules.
    """

    frozen: int
    full: int
    lora: int

    @property
    def total(self) -> int:
        """All parameters, adapters included."""
        return self.frozen + self.full + self.lora

    def __str__(self) -> str:
        return (
            f"{self.frozen:,} frozen, {self.full:,} full, {self.lora:,} LoRA "
            f"({(self.full + self.lora) / self.total:.2%} of {self.total:,} trainable)"
        )


def write_report(allocation: Allocation, census: Census, file: Path) -> None:
    """Write ``report.md`` (Markdown, one table an idea).

    Args:
        allocation: the decision.
        census: the whole model under it.
        file: where to.
    """
    file.write_text("\n".join(_lines(allocation, census)) + "\n", encoding="utf-8")


def _lines(allocation: Allocation, census: Census) -> list[str]:
    model, criterion, budget, modules = allocation.model, allocation.criterion, allocation.budget, allocation.modules
    full = [module for module in modules if module.assignment == FULL]
    silent = [module.name for module in modules if not module.signal]
    lines = [
        f"# Allocation for {model.name_or_path}",
        "",
        f"{len(full)} of {len(modules)} candidate modules are fully fine-tuned, the other "
        f"{len(modules) - len(full)} get LoRA.",
        "",
        "## What was probed",
        "",
        "| setting | value |",
        "| --- | --- |",
        f"| model | {model.architecture}, {model.num_layers} layers, {model.candidate_parameters:,} candidate parameters |",
        f"| criterion | {criterion.name}, {criterion.direction} score first, normalise {criterion.normalise} |",
        f"| objective | {criterion.objective} |",
        f"| probe adapters | rank {criterion.rank}, init {criterion.init}, base in {criterion.dtype} |",
        f"| warm-up | {criterion.warmup_steps} steps of {criterion.batch_size} rows at lr {criterion.lr:g} |",
        f"| validation | T = {criterion.partitions} batches of {criterion.batch_size} rows, one random partition each |",
        f"| longest row | {criterion.max_length} tokens |",
        f"| seed | {criterion.seed} |",
    ]
    for source in criterion.data.get("files", []):
        lines.append(f"| data | {source['name']}, {source['rows']} rows, sha256 {source['sha256'][:16]}… |")
    lines += [
        "",
        "## Budget",
        "",
        "| | parameters | of the candidates |",
        "| --- | ---: | ---: |",
        f"| asked ({budget.mode}, overflow {budget.overflow}) | | {100 * budget.ratio:g} % |",
        f"| limit | {budget.limit:,} | {100 * budget.limit / model.candidate_parameters:.3f} % |",
        f"| used | {budget.used:,} | {100 * budget.used / model.candidate_parameters:.3f} % |",
        "",
        "## Census of the model to train",
        "",
        "| group | parameters |",
        "| --- | ---: |",
        f"| frozen | {census.frozen:,} |",
        f"| full fine-tuning | {census.full:,} |",
        f"| LoRA (rank {criterion.rank}) | {census.lora:,} |",
        "",
        "## Where full fine-tuning went",
        "",
        *_by_type_and_depth(modules, model.num_layers),
        "",
        "| module | parameters | mean | std | score |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| `{module.name}` | {module.parameters:,} | {module.mean:.4g} | {module.std:.4g} | {module.score:.4g} |"
            for module in full
        ),
        "",
    ]
    if silent:
        lines += [
            f"No signal (score exactly 0, never selected): {', '.join(f'`{name}`' for name in silent)}.",
            "",
        ]
    lines += [
        "## How far to trust it",
        "",
        "The Hybrid-Score is the paper's criterion, and it is unproven: in the study behind this project (a toy: a "
        "Qwen2 of 0.6 M parameters, six seeds, 10 % budget) choosing the lowest scores did worse than choosing "
        "modules at random at the same budget. That refutes nothing at your scale, and it is no evidence in favour. "
        "Compare with a random allocation before you rely on it.",
        "",
        "## How to use it",
        "",
        "Add to your verl command, with PATH the folder of this report:",
        "",
        "    python -m verl.trainer.main_ppo ... +hybrid_lora=enabled hybrid_lora.allocation=PATH",
    ]
    return lines


def _by_type_and_depth(modules: list[ModuleRecord], num_layers: int) -> list[str]:
    """Counts ``full/all`` per type for each third of the depth."""
    thirds = [range(k * num_layers // 3, (k + 1) * num_layers // 3) for k in range(3)]
    # A model of one or two layers has empty thirds; they are left out rather than shown as 0/0.
    thirds = [third for third in thirds if len(third)]

    def cell(type_: str, layers: range) -> str:
        here = [module for module in modules if module.type == type_ and module.layer in layers]
        return f"{sum(module.assignment == FULL for module in here)}/{len(here)}"

    heads = [f"layers {third[0]}–{third[-1]}" for third in thirds]
    lines = [f"| full/all | {' | '.join(heads)} | all layers |", "| --- |" + " ---: |" * (len(heads) + 1)]
    for type_ in TYPE_ORDER:
        cells = [cell(type_, third) for third in thirds]
        lines.append(f"| {type_} | {' | '.join(cells)} | {cell(type_, range(num_layers))} |")
    return lines
