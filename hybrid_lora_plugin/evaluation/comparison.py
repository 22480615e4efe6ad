"""Two evaluations of the same problems, benchmark by benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evaluation.folder import EvaluationFolder
from hybrid_lora_plugin.evaluation.measures import MEASURES
from hybrid_lora_plugin.evaluation.paired import LEVEL, RESAMPLES, PairedDifference, holm, paired_difference, verdict
from hybrid_lora_plugin.evaluation.records import in_order
from hybrid_lora_plugin.evaluation.run import Task, recorded_tasks
from hybrid_lora_plugin.evaluation.summary import values_of


@dataclass(frozen=True)
class BenchmarkComparison:
    """One benchmark of A and B.

    Attributes:
        name: of the benchmark.
        first, second: figures of A and B, in [0, 1].
        difference: B minus A.
        p: of its test, raised for the number of benchmarks (``paired.holm``).
        verdict: in words.
    """

    name: str
    first: float
    second: float
    difference: PairedDifference
    p: float
    verdict: str


@dataclass(frozen=True)
class RunComparison:
    """A and B.

    Attributes:
        labels: what they are called.
        benchmarks: that both have.
        notes: what else differs between the runs, and what one of them lacks; a line each.
    """

    labels: tuple[str, str]
    benchmarks: list[BenchmarkComparison]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain values; shares in [0, 1], differences B minus A."""
        return {
            "labels": list(self.labels),
            "benchmarks": {one.name: asdict(one) for one in self.benchmarks},
            "notes": self.notes,
        }

    def rows(self) -> list[list[str]]:
        """Cells of a table below ``HEAD``."""
        return [
            [
                f"{MEASURES[one.name].title} {MEASURES[one.name].name}",
                str(one.difference.problems),
                f"{100 * one.first:.1f}",
                f"{100 * one.second:.1f}",
                f"{100 * one.difference.mean:+.1f}",
                f"{100 * one.difference.low:+.1f} to {100 * one.difference.high:+.1f}",
                f"{one.difference.better} / {one.difference.worse}",
                _chance(one.p),
                one.verdict,
            ]
            for one in self.benchmarks
        ]


HEAD = ["benchmark", "problems", "A", "B", "B − A", "95 % interval", "B better / worse", "p", "verdict"]
ABOUT = (
    f"95 % interval: a bootstrap over problems, {RESAMPLES:,} draws that keep each problem's pair together. p: exact "
    "test of the signs of the problems' differences, McNemar's for one repeat, raised after Holm for several "
    f"benchmarks; below {LEVEL} a difference is called one. What is not distinguished is not shown to be equal."
)


def compare_runs(folders: Sequence[EvaluationFolder], labels: tuple[str, str]) -> RunComparison:
    """Compare two finished evaluations.

    Args:
        folders: A and B.
        labels: what they are called.

    Raises:
        ConfigurationError: they have no benchmark in common, or not the same problems or k in one, or one is not
            finished.
    """
    tasks = [{task.name: task for task in recorded_tasks(folder)} for folder in folders]
    common = [name for name in MEASURES if name in tasks[0] and name in tasks[1]]
    if not common:
        raise ConfigurationError(
            f"compare: {folders[0].path} has {', '.join(tasks[0])} and {folders[1].path} has {', '.join(tasks[1])}; "
            "give two evaluations of the same benchmarks"
        )
    for name in common:
        _require_comparable(name, folders, tasks[0][name], tasks[1][name])
    values = [[_values(folder, tasks[i][name]) for name in common] for i, folder in enumerate(folders)]
    differences = [paired_difference(first, second) for first, second in zip(*values, strict=True)]
    chances = holm([difference.p for difference in differences])
    benchmarks = [
        BenchmarkComparison(
            name,
            float(sum(first) / len(first)),
            float(sum(second) / len(second)),
            difference,
            p,
            verdict(difference, p, *labels),
        )
        for name, first, second, difference, p in zip(common, *values, differences, chances, strict=True)
    ]
    return RunComparison(labels, benchmarks, _notes(folders, tasks, common))


def _require_comparable(name: str, folders: Sequence[EvaluationFolder], first: Task, second: Task) -> None:
    recorded = [folder.settings()["benchmarks"][name] for folder in folders]
    for what in ("problems", "k"):
        if recorded[0][what] != recorded[1][what]:
            said = "other problems" if what == "problems" else f"k = {second.k} in place of {first.k}"
            raise ConfigurationError(
                f"compare: {name} of {folders[1].path} has {said}; evaluate both on the same problems"
            )


def _values(folder: EvaluationFolder, task: Task):
    judgements = folder.judgements(task.name).records
    identities = [problem.identity for problem in task.problems]
    try:
        rows = in_order(judgements, identities, task.samples)
    except KeyError as error:
        raise ConfigurationError(
            f"compare: {task.name} of {folder.path} is not finished; give the command that began it again"
        ) from error
    return values_of([[one.correct for one in row] for row in rows], task.k)


def _notes(folders, tasks: Sequence[Mapping[str, Task]], common: Sequence[str]) -> list[str]:
    notes = []
    for i, letter in enumerate("AB"):
        if alone := [name for name in tasks[i] if name not in common]:
            notes.append(f"Only {letter} has {', '.join(alone)}.")
    settings = [folder.settings()["settings"] for folder in folders]
    differing = [
        f"`{name}` ({settings[0].get(name)} and {settings[1].get(name)})"
        for name in sorted(settings[0].keys() | settings[1].keys())
        if name not in ("model", "weights") and settings[0].get(name) != settings[1].get(name)
    ]
    if differing:
        notes.append(f"The runs differ in more than the model: {', '.join(differing)}.")
    for name in common:
        if tasks[0][name].repeats != tasks[1][name].repeats:
            notes.append(f"{name}: {tasks[0][name].repeats} repeats in A and {tasks[1][name].repeats} in B.")
    return notes


def as_markdown(comparison: RunComparison) -> str:
    """The table, what it means, and the notes."""
    first, second = comparison.labels
    rule = ["---"] + ["---:"] * (len(HEAD) - 2) + ["---"]
    rows = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (HEAD, rule, *comparison.rows())
    ]
    title = f"# {second} (B) against {first} (A)"
    return "\n\n".join([title, "\n".join(rows), f"In %. {ABOUT}", *comparison.notes]) + "\n"


def as_text(comparison: RunComparison) -> str:
    """Aligned lines for a terminal."""
    rows = [HEAD, *comparison.rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, len(HEAD) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([f"A: {comparison.labels[0]}", f"B: {comparison.labels[1]}", "", *lines, "", *comparison.notes])


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
