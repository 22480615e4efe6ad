"""The report of a comparison, from its raw results alone: no date, no time, no name of a machine or folder is in it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.evidence.arms import MATCHED_STEPS
from hybrid_lora_plugin.evidence.comparison import Cell, Comparison, Row
from hybrid_lora_plugin.evidence.intervals import SUPPORTED, Difference
from hybrid_lora_plugin.evidence.picks import baselines_in_words, frozen_content, frozen_table, picks_table
from hybrid_lora_plugin.evidence.pictures import draw_curves, draw_forest, draw_picks
from hybrid_lora_plugin.evidence.protocol import ZEROTH
from hybrid_lora_plugin.evidence.results import canonical
from hybrid_lora_plugin.evidence.study import Study
from hybrid_lora_plugin.files import complete_file

NO_GAP = "°"


def write_report(study: Study, digest: str, plan_text: str) -> None:
    """Write ``report.md``, ``report.json`` and the pictures into the study's folder.

    Args:
        study: with the compared runs, or with all of them for some seeds.
        digest: of what is frozen.
        plan_text: YAML of the plan.

    Raises:
        ConfigurationError: of no seed all runs are there.
    """
    comparison = Comparison(study)
    folder = study.folder
    draw_forest(comparison, folder / "forest.png")
    draw_curves(comparison, folder / "curves.png")
    pictures = []
    for base in study.plan.bases:
        if draw_picks(comparison, base, folder / picks_file(base)):
            pictures.append(picks_file(base))
    _write(folder / "report.json", canonical(_content(comparison, digest)) + "\n")
    _write(folder / "report.md", report_text(comparison, digest, plan_text, pictures))


def _write(file: Path, text: str) -> None:
    with complete_file(file) as unfinished:
        unfinished.write_text(text)


def picks_file(base: str) -> str:
    """File of the picture of what arms picked on a base."""
    return "picks-" + "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in base) + ".png"


def report_text(comparison: Comparison, digest: str, plan_text: str, pictures: Sequence[str] = ()) -> str:
    """The whole of ``report.md``."""
    study, numbers = comparison.study, _Numbers(comparison)
    sections = [
        _opening(comparison, digest),
        _gap(comparison, numbers),
        _primary(comparison, numbers),
        _tables(comparison, numbers),
        ["## What each arm picked", "", *picks_table(comparison), "", *(f"![picks]({name})" for name in pictures)],
        *([frozen] if (frozen := frozen_table(comparison)) else []),
        _rates(comparison),
        _runs(comparison),
        _reading(comparison),
        ["## Plan", "", f"Digest: `{digest}`.", "", "```yaml", plan_text.strip("\n"), "```"],
        ["## Results depend on", "", "```json", json.dumps(study.prepared.identity, indent=1, sort_keys=True), "```"],
    ]
    return "\n".join(line for section in sections for line in (*section, ""))


class _Numbers:
    """Numbers as tables show them: with as many decimals as the held-out values call for."""

    def __init__(self, comparison: Comparison) -> None:
        study = comparison.study
        largest = max(
            abs(comparison.value(arm, start)) for arm in study.arms for start in study.starts(comparison.seeds)
        )
        self._decimals = min(6, max(0, 3 - math.floor(math.log10(largest)))) if largest else 3

    def value(self, value: float | None) -> str:
        """A held-out value; a dash for None."""
        return "–" if value is None else f"{value:.{self._decimals}f}"

    def signed(self, value: float) -> str:
        """A difference, whose minus is one and not a hyphen."""
        # Adding 0 turns the -0.0 of a rounded small negative into 0.0.
        return f"{round(value, self._decimals) + 0.0:+.{self._decimals}f}".replace("-", "−")

    def interval(self, found: Difference) -> str:
        """A difference with its interval."""
        if found.low is None:
            return f"{self.signed(found.mean)} [one seed]"
        return f"{self.signed(found.mean)} [{self.signed(found.low)}, {self.signed(found.high)}]"


def _place(place: Cell) -> str:
    return " / ".join(place)


def _percent(level: float) -> str:
    return f"{100 * level:.4g} %"


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")


def _opening(comparison: Comparison, digest: str) -> list[str]:
    study, plan = comparison.study, comparison.study.plan
    better = "lower" if study.prepared.lower_is_better else "higher"
    lines = [f"# {plan.name}", ""]
    if comparison.missing:
        lines += [
            f"**INCOMPLETE**: of seeds {comparison.missing} runs are missing; this is what seeds {comparison.seeds} "
            "say.",
            "",
        ]
    lines += _gap_in_words(comparison)
    lines += [
        "",
        f"{_count(study.arms, 'arm')} on {_count(plan.bases, 'base')} ({', '.join(plan.bases)}) and "
        f"{_count(plan.tasks, 'task')} ({', '.join(plan.tasks)}), {_count(comparison.seeds, 'seed')} each, "
        f"{plan.steps} steps. Held-out value: "
        f"`{study.prepared.measure}`, {better} is better. Plan and learning rates were frozen before the first "
        f"compared run under `{digest}`.",
        *_edges_in_words(study),
    ]
    return lines


def _edges_in_words(study: Study) -> list[str]:
    """A warning where many arms did not run at their best rates, as far as the grid can tell."""
    tuned = [study.tuned(arm, *place) for arm in study.arms for place in study.cells]
    at_edge = sum(bool(one.edges) for one in tuned)
    if 4 * at_edge < len(tuned):
        return []
    return [
        "",
        f"**Rates at the edge**: {at_edge:,} of {len(tuned):,} choices of learning rates are the lowest or the highest "
        "that was tried, so better ones may lie beyond, for some arms more than for others. Widen `rates` before you "
        "rely on what follows.",
    ]


def _gap_in_words(comparison: Comparison) -> list[str]:
    if not comparison.gaps:
        return [
            "**Nobody looked for a gap**: the plan compares no LoRA with no full fine-tuning, so it is not known "
            "whether a selection could help at all."
        ]
    without = [place for place in comparison.gaps if not comparison.has_gap(place)]
    if not without:
        return [
            "**There is a gap**: full fine-tuning is better than LoRA on every base and task, so a selection of "
            "modules can help."
        ]
    consequence = "no selection of modules can be expected to help there"
    if len(without) == len(comparison.gaps):
        return [
            "**There is no gap**: full fine-tuning is not better than LoRA on any base and task, as far as these seeds "
            f"can tell: {consequence}. Read what follows as noise until a gap is shown."
        ]
    return [
        f"**There is no gap on {', '.join(map(_place, without))}**: full fine-tuning is not better than LoRA there, as "
        f"far as these seeds can tell: {consequence}. Verdicts there are marked {NO_GAP}. On the other bases and tasks "
        "there is one."
    ]


def _gap(comparison: Comparison, numbers: _Numbers) -> list[str]:
    lines = ["## Is there a gap", ""]
    if not comparison.gaps:
        return [*lines, "The plan lacks `lora` or `full`."]
    lines += [
        f"`full` minus `lora`, each at its own rates; {_percent(comparison.study.plan.level)} interval.",
        "",
        "| base / task | difference | full better in | gap |",
        "| --- | ---: | ---: | --- |",
    ]
    for place, found in [*comparison.gaps.items(), (("all",), comparison.pooled_gap)]:
        said = "yes" if found.verdict == SUPPORTED else "not shown"
        lines.append(f"| {_place(place)} | {numbers.interval(found)} | {found.better} of {found.starts} | {said} |")
    return lines


def _primary(comparison: Comparison, numbers: _Numbers) -> list[str]:
    lines = ["## Primary comparisons", ""]
    count = len(comparison.primaries)
    level = comparison.primaries[0].pooled.level
    shared = f", as {count} comparisons share {_percent(comparison.study.plan.level)}" if count > 1 else ""
    lines += [f"Over all bases and tasks, with {_percent(level)} intervals{shared}.", ""]
    gaps = [comparison.has_gap(place) for place in comparison.study.cells]
    for one in comparison.primaries:
        mark = f" {NO_GAP}" if not any(gaps) else ""
        found = one.pooled
        lines.append(
            f"- `{one.arm.name}` is better than `{one.other.name}`: **{found.verdict}**{mark}, "
            f"{numbers.interval(found)}, better in {found.better} of {found.starts}."
        )
    lines += [
        "",
        f"By base and task, with {_percent(comparison.study.plan.level)} intervals that are not shared:",
        "",
        "| base / task | arm | against | difference | better in | verdict |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for one in comparison.primaries:
        for place, found in one.by_cell.items():
            mark = "" if comparison.has_gap(place) else f" {NO_GAP}"
            lines.append(
                f"| {_place(place)} | {one.arm.name} | {one.other.name} | {numbers.interval(found)} | "
                f"{found.better} of {found.starts} | {found.verdict}{mark} |"
            )
    return [*lines, "", f"{NO_GAP} no gap between LoRA and full fine-tuning is shown there."]


def _tables(comparison: Comparison, numbers: _Numbers) -> list[str]:
    cells = comparison.study.cells
    lines = ["## All arms", "", "![forest](forest.png)", ""]
    lines += ["### Over all bases and tasks", "", *_table(comparison.rows(cells), numbers), ""]
    if len(cells) > 1:
        for place in cells:
            mark = "" if comparison.has_gap(place) else f" {NO_GAP}"
            lines += [f"### {_place(place)}{mark}", "", *_table(comparison.rows([place]), numbers), ""]
    return [*lines, "![curves](curves.png)"]


def _table(rows: Sequence[Row], numbers: _Numbers) -> list[str]:
    lines = [
        "| arm | mean | sd | median | against random | better in | trainable | FLOPs | diverged |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        against = row.against_random
        said = ("–", "–") if against is None else (numbers.interval(against), f"{against.better} of {against.starts}")
        lines.append(
            f"| {row.arm.name} | {numbers.value(row.mean)} | {numbers.value(row.sd)} | {numbers.value(row.median)} | "
            f"{said[0]} | {said[1]} | {row.trainable:,.0f} | {row.flops:.3e} | {row.diverged} of {row.runs} |"
        )
    return lines


def _rates(comparison: Comparison) -> list[str]:
    study = comparison.study
    zeroth = any(arm.kind == ZEROTH for arm in study.arms)
    kinds = "full / lora / zeroth" if zeroth else "full / lora"
    lines = [
        "## Learning rates",
        "",
        f"Chosen by the tuning seeds, `{kinds}`; `*` is the lowest or the highest rate that was tried, so that a "
        "better one may lie beyond.",
        "",
        "| arm | " + " | ".join(map(_place, study.cells)) + " |",
        "| --- |" + " --- |" * len(study.cells),
    ]
    for arm in study.arms:
        said = []
        for base, task in study.cells:
            tuned = study.tuned(arm, base, task)
            parts = [
                "–" if not rate else f"{rate:g}" + ("*" if name in tuned.edges else "")
                for name, rate in (
                    ("full", tuned.rates.full),
                    ("lora", tuned.rates.lora),
                    *([("zeroth", tuned.rates.zeroth)] if zeroth else []),
                )
            ]
            said.append(" / ".join(parts) + (f" ({tuned.diverged} of {tuned.runs} diverged)" if tuned.diverged else ""))
        lines.append(f"| {arm.name} | " + " | ".join(said) + " |")
    matched = []
    for arm in study.arms:
        if arm.role == "lora_matched":
            for base in study.plan.bases:
                found = study.matched_rank(arm, base)
                passes = "" if found.parameters <= found.wanted else ", which pass it even at rank 1"
                matched.append(
                    f"- `{arm.name}` on {base}: rank {found.rank}, {found.parameters:,} trainable parameters against a "
                    f"mean of {found.wanted:,.0f}{passes}."
                )
        if arm.role in MATCHED_STEPS:
            for base, task in study.cells:
                matched.append(f"- `{arm.name}` on {base} / {task}: {study.steps(arm, base, task)} steps.")
    given = [arm.name for arm in study.arms if any(study.tuned(arm, *place).value is None for place in study.cells)]
    if given:
        lines += ["", f"Not tuned, since the plan gives one pair of rates: {', '.join(f'`{name}`' for name in given)}."]
    return [*lines, "", *matched] if matched else lines


def _runs(comparison: Comparison) -> list[str]:
    study = comparison.study
    outcomes = [
        (arm, outcome)
        for arm in study.arms
        for start in study.starts(comparison.seeds)
        for outcome in comparison.outcomes(arm, start)
    ]
    diverged = [arm.name for arm, outcome in outcomes if outcome.diverged]
    lines = [
        "## Runs",
        "",
        f"{len(outcomes):,} compared, {len(diverged):,} of them diverged. Arms that chose the same modules at a start "
        f"share a run there. {len(study.results):,} different runs were done, tuning included.",
    ]
    if diverged:
        told = ", ".join(f"{name} {diverged.count(name)}" for name in dict.fromkeys(diverged))
        lines += ["", f"Diverged: {told}. Each counts with the held-out value of its base."]
    return lines


def _reading(comparison: Comparison) -> list[str]:
    plan = comparison.study.plan
    zeroth = [
        "- *trainable* counts what gets a gradient: of `zeroth_order` the adapters, and not the weights under them, "
        "which move too. `lora_passes` is LoRA with as many more steps as the two forward passes a direction cost.",
    ]
    per = {"task": "each base and task", "base": "each base, over all tasks", "arm": "all bases and tasks at once"}
    return [
        "## How to read this",
        "",
        "- Arms are paired: at one start they have the same base, data, order of data and adapter init.",
        "- `random` and `random_stratified` are means over their draws at each start.",
        "- A difference is the arm minus the other; *better in* counts starts. Intervals resample whole seeds "
        f"({plan.resamples:,} times) and are widened for their small number; bases and tasks are not resampled, so "
        "that nothing is said of others.",
        f"- Rates were chosen for every arm by itself, for {per[plan.tuning.per]}, on seeds {plan.seeds.tune}, which "
        "are not compared.",
        *baselines_in_words(comparison),
        "- *sd* is over seeds within a base and task.",
        "- Only the primary comparisons were fixed as such before the runs. The others are exploratory: of forty arms "
        "two pass a 95 % interval by chance.",
        "- FLOPs are those of training, by the protocol's formula; probing is not in them.",
        *(zeroth if any(arm.kind == ZEROTH for arm in comparison.study.arms) else []),
    ]


def _content(comparison: Comparison, digest: str) -> dict[str, Any]:
    """The tables for programs."""
    study = comparison.study

    def row(one: Row) -> dict[str, Any]:
        against = one.against_random
        return {
            "arm": one.arm.name,
            "mean": one.mean,
            "sd": one.sd,
            "median": one.median,
            "against_random": None if against is None else against.__dict__,
            "trainable": one.trainable,
            "flops": one.flops,
            "diverged": one.diverged,
            "runs": one.runs,
        }

    return {
        "name": study.plan.name,
        "sha256": digest,
        "measure": study.prepared.measure,
        "lower_is_better": study.prepared.lower_is_better,
        "seeds": comparison.seeds,
        "missing_seeds": comparison.missing,
        "gaps": {_place(place): found.__dict__ for place, found in comparison.gaps.items()},
        "primary": [
            {
                "arm": one.arm.name,
                "against": one.other.name,
                "pooled": one.pooled.__dict__,
                "by_cell": {_place(place): found.__dict__ for place, found in one.by_cell.items()},
            }
            for one in comparison.primaries
        ],
        "pooled": [row(one) for one in comparison.rows(study.cells)],
        "by_cell": {_place(place): [row(one) for one in comparison.rows([place])] for place in study.cells},
        "values": {
            arm.name: {
                f"{start.base} / {start.task} / {start.seed}": comparison.value(arm, start)
                for start in study.starts(comparison.seeds)
            }
            for arm in study.arms
        },
        **({"frozen": frozen} if (frozen := frozen_content(comparison)) else {}),
    }
