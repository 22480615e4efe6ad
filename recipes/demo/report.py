"""The demo's summary page: text in the terminal, ``report.md`` with pictures."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from hybrid_lora_plugin.allocation import Allocation
from recipes.demo.evidence import WITNESSES, Check, accuracy_of, reward_of
from recipes.demo.lora_run import LoraRun
from recipes.demo.verl_run import Step


@dataclass(frozen=True)
class Findings:
    """Everything the page shows.

    Attributes:
        steps: of the verl run, the initial validation as step 0.
        allocation: what it trained under.
        counts: one line, counts of frozen, full and LoRA parameters, as the engine counted them.
        dtype: of the rollouts.
        checks: the claims with their figures.
        seconds: wall time of each stage by name.
        peak_memory: bytes, the largest sum over the demo's processes that was seen; None if unknown.
        exported: the exported model.
        model: the base model, as the beginning of a sentence.
        lora: LoRA alone of the same size, where it was trained.
    """

    steps: list[Step]
    allocation: Allocation
    counts: str
    dtype: str
    checks: list[Check]
    seconds: dict[str, float]
    peak_memory: int | None
    exported: Path
    model: str
    lora: LoraRun | None = None


def draw_curves(steps: list[Step], dtype: str, file: Path, lora: LoraRun | None = None) -> None:
    """Reward and validation accuracy over the steps, below them the rollout-trainer difference and its limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    learning, proof = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    rewards = [(step.number, reward_of(step)) for step in steps if reward_of(step) is not None]
    accuracies = [(step.number, accuracy_of(step)) for step in steps if accuracy_of(step) is not None]
    learning.plot(*zip(*rewards, strict=True), color="tab:blue", label="mean reward of the rollouts (temperature 1)")
    learning.plot(*zip(*accuracies, strict=True), "o-", color="tab:orange", label="validation accuracy (greedy)")
    if lora is not None:
        beside = [(step.number, accuracy_of(step)) for step in lora.steps if accuracy_of(step) is not None]
        name = f"the same of LoRA alone, rank {lora.matched.rank}"
        learning.plot(*zip(*beside, strict=True), "o--", color="tab:gray", label=name)
    learning.set_ylim(0, 1.02)
    learning.set_ylabel("share correct")
    learning.legend(loc="best")
    learning.grid(alpha=0.3)
    name, limit = WITNESSES[dtype]
    differences = [(step.number, step.metrics[name]) for step in steps if name in step.metrics]
    label = "largest difference" if name.endswith("_max") else "mean difference"
    proof.semilogy(*zip(*differences, strict=True), "s-", markersize=3, color="tab:green", label=label)
    proof.axhline(limit, color="tab:red", linestyle="--", label=f"limit {limit:g}")
    proof.set_ylabel("|p vLLM − p trainer|")
    proof.set_xlabel("training step")
    proof.legend(loc="center right")
    proof.grid(alpha=0.3)
    figure.savefig(file, metadata={"Software": None})


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _facts(findings: Findings) -> list[tuple[str, str]]:
    allocation, steps = findings.allocation, findings.steps
    accuracies = [value for value in map(accuracy_of, steps) if value is not None]
    rewards = [value for value in map(reward_of, steps) if value is not None]
    budget, modules = allocation.budget, allocation.modules
    facts = [
        ("validation accuracy", f"{accuracies[0]:.3f} before, {accuracies[-1]:.3f} after"),
        *_lora_facts(findings.lora),
        ("mean reward", f"{rewards[0]:.3f} at the first step, {rewards[-1]:.3f} at the last"),
        (
            "allocation",
            f"{len(allocation.full_names)} of {len(modules)} modules fully tuned, {budget.used:,} of "
            f"{allocation.model.candidate_parameters:,} candidate parameters (budget {budget.ratio:.0%})",
        ),
        ("parameters", findings.counts),
        ("rollouts in", findings.dtype),
        ("wall time", ", ".join(f"{name} {_minutes(seconds)}" for name, seconds in findings.seconds.items())),
    ]
    if findings.peak_memory is not None:
        facts.append(("peak memory", f"{findings.peak_memory / 2**30:.1f} GiB over all processes (proportional share)"))
    return facts


def _lora_facts(lora: LoraRun | None) -> list[tuple[str, str]]:
    if lora is None:
        return []
    accuracies = [value for value in map(accuracy_of, lora.steps) if value is not None]
    said = (
        f"{accuracies[0]:.3f} before, {accuracies[-1]:.3f} after, with {lora.matched.parameters:,} trainable "
        f"parameters against {lora.matched.wanted:,.0f}, at a rate of {lora.lr:g}; one run of each says little"
    )
    return [(f"of LoRA alone, rank {lora.matched.rank}", said)]


def print_summary(findings: Findings) -> None:
    """The page for the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Hybrid-LoRA demo", show_header=False, title_justify="left")
    for name, value in _facts(findings):
        table.add_row(name, value)
    console.print(table)
    for check in findings.checks:
        mark = "[green]holds [/]" if check.holds else "[bold red]FAILED[/]"
        console.print(f"{mark} {check.claim}: {check.seen}", highlight=False)
    console.print()


def write_report(findings: Findings, folder: Path, heatmap: Path) -> Path:
    """``report.md``, ``curves.png`` and ``heatmap.png`` in ``folder``."""
    draw_curves(findings.steps, findings.dtype, folder / "curves.png", findings.lora)
    shutil.copyfile(heatmap, folder / "heatmap.png")
    full = [module for module in findings.allocation.modules if module.assignment == "full"]
    lines = [
        "# Hybrid-LoRA demo",
        "",
        f"{findings.model}, trained by GSPO in verl under a probed allocation, with vLLM rollouts, on CPU cores. It "
        "shows that the line works from probe to export. It says nothing about how well the method does on a real "
        "model.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _facts(findings)),
        f"| exported model | `{findings.exported}` |",
        "",
        "## Proof",
        "",
        "| claim | seen | |",
        "| --- | --- | --- |",
        *(f"| {c.claim} | {c.seen} | {'holds' if c.holds else '**FAILED**'} |" for c in findings.checks),
        "",
        "![reward, accuracy and sync proof](curves.png)",
        "",
        "## Allocation",
        "",
        "Fully tuned modules have a red frame; the colour is the score "
        f"({findings.allocation.selection.direction} first).",
        "",
        "![scores of all modules](heatmap.png)",
        "",
        "| fully tuned module | parameters | score |",
        "| --- | --- | --- |",
        *(f"| `{module.name}` | {module.parameters:,} | {module.score:.3g} |" for module in full),
        "",
    ]
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path
