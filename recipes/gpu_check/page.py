"""The page of a GPU check: ``report.md`` with a picture, and ``figures.json`` with every figure of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from recipes.demo.evidence import Check
from recipes.demo.verl_run import Step
from recipes.gpu_check.budget import DONE, FAILED, SKIPPED, Outcome
from recipes.gpu_check.device import GIB, Device
from recipes.gpu_check.evidence import CORRELATION, PROBS_DIFF_MAX, PROBS_DIFF_MEAN
from recipes.gpu_check.runs import RUNS
from recipes.gpu_check.versions import Version

#: column -> verl's metric, of which a median over the steps behind the first is shown
_COSTS = {
    "step, s": "timing_s/step",
    "generation, s": "timing_s/gen",
    "actor update, s": "timing_s/update_actor",
    "reference, s": "timing_s/ref",
    "weight sync, s": "timing_s/update_weights",
}
_PEAKS = {"allocated": "actor/perf/max_memory_allocated_gb", "reserved": "actor/perf/max_memory_reserved_gb"}
#: lines of a failed stage's error on the page
_LINES = 40


@dataclass
class Findings:
    """Everything the page shows.

    Attributes:
        device: what was checked.
        system: operating system and Python.
        versions: packages found, beside those wanted.
        notes: lines about the environment, e.g. of something that was replaced.
        shape: of the model, one line.
        minutes: that the check was given.
        outcomes: of the stages, by name.
        steps: of the runs that logged any, by name.
        checks: what had to hold.
        command: that was given.
    """

    device: Device
    system: str
    versions: list[Version]
    notes: list[str]
    shape: str
    minutes: float
    command: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether no stage has failed and every check holds; skipped stages are no failure."""
        failed = any(outcome.state == FAILED for outcome in self.outcomes.values())
        return not failed and all(check.holds for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line."""
        states = [outcome.state for outcome in self.outcomes.values()]
        broken = sum(not check.holds for check in self.checks)
        parts = [f"{len(self.checks) - broken} of {len(self.checks)} checks hold"]
        if failed := states.count(FAILED):
            parts.append(f"{failed} of {len(states)} stages failed")
        if skipped := states.count(SKIPPED):
            parts.append(f"{skipped} of {len(states)} stages were skipped")
        # A page without a check must not read like one on which all of them hold.
        word = "FAILED" if not self.holds else "PASSED" if self.checks else "NOTHING CHECKED"
        return f"{word}: {', '.join(parts)}"


def figures(findings: Findings) -> dict[str, Any]:
    """Every figure, as JSON can hold it; what is no number is null."""

    def finite(metrics: dict[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

    return {
        "verdict": findings.verdict,
        "command": findings.command,
        "device": asdict(findings.device),
        "system": findings.system,
        "versions": {v.package: {"found": v.found, "wanted": v.wanted} for v in findings.versions},
        "notes": findings.notes,
        "model": findings.shape,
        "stages": {name: asdict(o) | {"log": o.log and str(o.log)} for name, o in findings.outcomes.items()},
        "checks": [asdict(check) for check in findings.checks],
        "runs": {
            name: [{"step": step.number, "metrics": finite(step.metrics)} for step in steps]
            for name, steps in findings.steps.items()
        },
    }


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _of(steps: Sequence[Step], metric: str) -> list[float]:
    return [step.metrics[metric] for step in steps if step.number > 0 and metric in step.metrics]


def typical(steps: Sequence[Step], metric: str) -> float | None:
    """Median of a metric over the steps behind the first, which pays for compilation; None where there is none."""
    values = _of([step for step in steps if step.number > 1], metric)
    return median(values) if values else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> list[str]:
    """A Markdown table whose last ``numbers`` columns are set to the right."""
    rules = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(cells)} |" for cells in (head, rules, *rows)]


def _version_lines(findings: Findings) -> list[str]:
    rows = []
    for one in findings.versions:
        state = "" if one.fits else "**not installed**" if one.found is None else "**another one**"
        rows.append([one.package, one.found or "–", one.wanted or "–", state])
    return _table(["package", "found", "written for", ""], rows)


def _stage_lines(findings: Findings) -> list[str]:
    rows = []
    for outcome in findings.outcomes.values():
        text = outcome.state if outcome.state == DONE else f"**{outcome.state}**"
        why = outcome.why.splitlines()[0].replace("|", "\\|") if outcome.why else ""
        rows.append([outcome.name, text, why, f"{outcome.seconds:.0f}"])
    return _table(["stage", "", "why", "seconds"], rows, numbers=1)


def _failure_lines(findings: Findings) -> list[str]:
    lines = []
    for outcome in findings.outcomes.values():
        if outcome.state != FAILED:
            continue
        text = outcome.why.splitlines()
        shown = text if len(text) <= _LINES else [text[0], "…", *text[2 - _LINES :]]
        lines += ["", f"### {outcome.name} failed", ""]
        lines += [f"Its whole output is in `{outcome.log}`.", ""] if outcome.log else []
        # A fence longer than any in the text.
        lines += ["````text", *shown, "````"]
    return lines


def _fidelity_lines(findings: Findings) -> list[str]:
    def across(steps: Sequence[Step], metric: str, form: str) -> str:
        values = _of(steps, metric)
        if not values:
            return "–"
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"

    rows = []
    for name, steps in findings.steps.items():
        cells = [across(steps, f"hybrid_lora/update_{what}_{k}", ".3g") for k in ("lora", "full") for what in _SHOWN]
        rows.append(
            [
                RUNS[name].title,
                *cells,
                across(steps, PROBS_DIFF_MEAN, ".2g"),
                across(steps, PROBS_DIFF_MAX, ".2g"),
                across(steps, CORRELATION, ".4f"),
            ]
        )
    head = ["run", "arrived, LoRA", "noise, LoRA", "arrived, full", "noise, full"]
    head += ["rollout to trainer, mean", "largest", "correlation"]
    return _table(head, rows, numbers=7)


_SHOWN = ("arrived", "noise")


def _sync_lines(findings: Findings) -> list[str]:
    rows = []
    for name, steps in findings.steps.items():
        if RUNS[name].sync is None:
            continue
        proven = _of(steps, "hybrid_lora/sync_digest_ok")
        megabytes, changed = (
            typical(steps, "hybrid_lora/sync_bytes"),
            typical(steps, "hybrid_lora/sync_elements_changed"),
        )
        rows.append(
            [
                RUNS[name].title,
                f"{sum(value == 1 for value in proven)} of {len(_of(steps, 'timing_s/step'))}",
                _number(typical(steps, "hybrid_lora/sync_tensors"), ".0f"),
                _number(megabytes and megabytes / 1e6, ".2f"),
                _number(changed, ".2%"),
                _number(typical(steps, "hybrid_lora/sync_seconds"), ".2f"),
            ]
        )
    return _table(["run", "proven", "tensors", "MB", "elements that changed", "seconds"], rows, numbers=5)


def _cost_lines(findings: Findings) -> list[str]:
    rows = []
    lora = findings.steps.get("verl_lora", [])
    for name, steps in findings.steps.items():
        cells = [_number(typical(steps, metric), ".2f") for metric in _COSTS.values()]
        for metric in _PEAKS.values():
            # verl's figure is in units of 2^30 bytes, and only grows.
            values = [value for value in _of(steps, metric) if value > 0]
            cells.append(_number(max(values, default=None), ".2f"))
        rows.append([RUNS[name].title, *cells])
    lines = _table(["run", *_COSTS, "peak allocated, GiB", "peak reserved, GiB"], rows, numbers=len(_COSTS) + 2)
    ours = findings.steps.get("merge", [])
    ratios = []
    for what, metric in (("actor update", "timing_s/update_actor"), ("step", "timing_s/step")):
        mine, theirs = typical(ours, metric), typical(lora, metric)
        if mine and theirs:
            ratios.append(f"{what} {mine / theirs:.3f}")
    peaks = [max(_of(steps, _PEAKS["allocated"]), default=0.0) for steps in (ours, lora)]
    if all(peaks):
        ratios.append(f"peak of allocated memory {peaks[0] / peaks[1]:.3f}")
    if ratios:
        lines += ["", f"Hybrid-LoRA with `merge`, divided by verl's LoRA: {', '.join(ratios)}."]
    return lines


def draw(steps: dict[str, list[Step]], file: Path) -> bool:
    """How much of the updates arrived and how far rollout and trainer are apart, over the steps.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "update arrived, LoRA": "hybrid_lora/update_arrived_lora",
        "update arrived, full": "hybrid_lora/update_arrived_full",
        "rollout to trainer, mean |Δp|": PROBS_DIFF_MEAN,
    }
    if not any(metric in step.metrics for metric in panels.values() for run in steps.values() for step in run):
        return False
    figure = Figure(figsize=(7.0, 6.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    # One colour for a run in all panels, also where another run has no points.
    colours = dict(zip(RUNS, colormaps["tab10"].colors, strict=False))
    drawn = {}
    for axes, (label, metric) in zip(figure.subplots(len(panels), 1, sharex=True), panels.items(), strict=True):
        for name, run in steps.items():
            points = [(step.number, step.metrics[metric]) for step in run if metric in step.metrics]
            if points:
                (drawn[name],) = axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=colours[name])
        if "arrived" in label:
            axes.axhline(1.0, color="black", linewidth=0.6, linestyle="--")
        axes.set_ylabel(label, fontsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("training step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    titles = [RUNS[name].title.replace("`", "") for name in drawn]
    figure.legend(drawn.values(), titles, loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(file, metadata={"Software": None})
    return True


def _facts(findings: Findings) -> list[tuple[str, str]]:
    device = findings.device
    memory = f"{device.total / GIB:.1f} GiB, {device.free / GIB:.1f} free at the start"
    capability = f", compute capability {device.capability[0]}.{device.capability[1]}" if device.capability else ""
    took = sum(outcome.seconds for outcome in findings.outcomes.values())
    return [
        ("device", f"{device.name}, {memory}{capability}"),
        ("system", findings.system),
        ("model", f"random Qwen2 in bf16: {findings.shape}"),
        ("time", f"{took / 60:.1f} of {findings.minutes:g} minutes"),
        ("command", f"`{findings.command}`"),
    ]


def page(findings: Findings, picture: str | None) -> str:
    """The page as Markdown."""
    kind = "GPU check" if findings.device.kind == "cuda" else "GPU check, on a CPU: a test of the check itself"
    lines = [f"# {kind}: {findings.device.name}", "", f"**{findings.verdict}.**", ""]
    lines += _table(["", ""], _facts(findings))
    lines += ["", *(f"- {note}" for note in findings.notes)]
    lines += ["", "## Versions", "", *_version_lines(findings), "", "## Stages", "", *_stage_lines(findings)]
    lines += _failure_lines(findings)
    lines += ["", "## Checks", ""]
    rows = [[check.claim, check.seen, "holds" if check.holds else "**FAILED**"] for check in findings.checks]
    lines += _table(["claim", "seen", ""], rows) if rows else ["No run got far enough."]
    if findings.steps:
        lines += [
            "",
            "## How near the rollout's policy is to the trainer's",
            "",
            "Least and most over the steps. *Arrived* is the share of the exact update that is in the rollout engine's "
            "weights, *noise* what rounding added, as a share of it (`docs/sync-fidelity.md`). Probabilities of the "
            "sampled tokens, vLLM's against the trainer's.",
            "",
            *_fidelity_lines(findings),
            "",
            *([f"![arrived updates and differences over the steps]({picture})", ""] if picture else []),
            "## Weight sync",
            "",
            "Medians over the steps behind the first.",
            "",
            *_sync_lines(findings),
            "",
            "## What training costs, beside verl's LoRA",
            "",
            "Medians over the steps behind the first, and the peak of the trainer's process since it started, all as "
            "verl measures them (`timing_s/…`, `actor/perf/max_memory_…_gb`).",
            "",
            *_cost_lines(findings),
        ]
    return "\n".join(lines) + "\n"


def write(findings: Findings, folder: Path) -> Path:
    """``report.md``, ``figures.json`` and, where there is something to draw, ``curves.png``; returns the page."""
    drawn = draw(findings.steps, folder / "curves.png")
    (folder / "figures.json").write_text(json.dumps(figures(findings), indent=1) + "\n", encoding="utf-8")
    report = folder / "report.md"
    report.write_text(page(findings, "curves.png" if drawn else None), encoding="utf-8")
    return report
