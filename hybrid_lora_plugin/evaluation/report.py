"""The results of a run as JSON, and as the paper's Table 1 in Markdown with what has to be said beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrid_lora_plugin.evaluation.estimators import FEWEST
from hybrid_lora_plugin.evaluation.measures import MEASURES
from hybrid_lora_plugin.evaluation.paper import COLUMNS, TABLE_1
from hybrid_lora_plugin.evaluation.summary import BenchmarkResult

INTERVAL = (
    "95 % intervals are over problems of the same kind: Wilson's, for as many problems as the values of the repeats "
    "are worth."
)


@dataclass(frozen=True)
class RunReport:
    """What is said of a run.

    Attributes:
        label: what tables call it.
        settings: that the responses depend on, as recorded.
        results: one a benchmark.
        size: title of the part of the paper's Table 1 for models of this size; None where there is none.
        scored_by: versions that judged.
    """

    label: str
    settings: Mapping[str, Any]
    results: Sequence[BenchmarkResult]
    size: str | None
    scored_by: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain values; shares in [0, 1]."""
        results = {}
        for result in self.results:
            fields = asdict(result)
            fields["measure"] = MEASURES[result.name].name
            fields["fewest_points_of_a_paired_difference"] = result.fewest_points
            results[fields.pop("name")] = fields
        return {
            "label": self.label,
            "results": results,
            "interval": INTERVAL,
            "settings": dict(self.settings),
            "scored_by": dict(self.scored_by),
            "paper_rows": self.size,
        }

    def as_markdown(self) -> str:
        """Table 1 with this run first, the run's own table, and what a difference must be to mean anything."""
        parts = [f"# {self.label}", self._said_of_the_run(), "## As the paper's Table 1", *self._paper_table()]
        parts += ["## Each benchmark", *self._own_table(), *self._counts(), "## What a difference means"]
        return "\n\n".join([*parts, *self._differences()]) + "\n"

    def _said_of_the_run(self) -> str:
        settings = self.settings
        sampling = ", ".join(f"{name} {value}" for name, value in settings["sampling"].items())
        return (
            f"Model `{settings['model']}`, prompt `{settings['prompt']}`, {sampling}; at most "
            f"{settings['max_response_length']} tokens a response; vLLM {settings['engine']['vllm']}. Every response "
            "is in `responses/`, every judgement in `judgements/`."
        )

    # -- tables ---------------------------------------------------------------------------------------------------

    def _paper_table(self) -> list[str]:
        extra = [result.name for result in self.results if result.name not in COLUMNS]
        by_name = {result.name: result for result in self.results}
        names = [*COLUMNS, *extra]
        head = ["approach", "parameter-efficient", "tunable"]
        head += [f"{MEASURES[name].title} {MEASURES[name].name}" for name in names]
        own = [_figure(by_name[name]) if name in by_name else "–" for name in names]
        rows = [[f"**{_cell(self.label)}**", "", "", *own]]
        for row in TABLE_1.get(self.size or "", ()):
            figures = [f"{figure:.1f}" for figure in row.figures]
            rows.append([f"paper: {row.approach}", row.method, row.tunable, *figures, *("–" for _ in extra)])
        about = "In %; in brackets the 95 % interval."
        if self.size is None:
            about += " The paper has no row for a model of this size."
        else:
            about += (
                f" The paper's rows are those of {self.size}, which this model has the size of; they are figures from "
                "the paper, not of this project. It gives neither its prompts nor a limit of length, and no intervals."
            )
        return [_table(head, rows), about]

    def _own_table(self) -> list[str]:
        head = ["benchmark", "problems", "repeats × k", "figure", "95 % interval", "each repeat", "unbiased", "pass@1"]
        head.append("tokens")
        rows = []
        for result in self.results:
            asked = str(result.problems) if result.problems == result.of else f"first {result.problems} of {result.of}"
            each = ", ".join(f"{100 * value:.1f}" for value in result.per_repeat) if result.repeats > 1 else "–"
            if result.repeat_deviation is not None:
                each += f" (± {100 * result.repeat_deviation:.1f})"
            rows.append(
                [
                    f"{MEASURES[result.name].title} {MEASURES[result.name].name}",
                    asked,
                    f"{result.repeats} × {result.k}",
                    f"{100 * result.value:.1f}",
                    f"{100 * result.low:.1f} to {100 * result.high:.1f}",
                    each,
                    f"{100 * result.unbiased:.1f}",
                    f"{100 * result.per_response:.1f}",
                    f"{result.tokens:,.0f}",
                ]
            )
        about = (
            "figure: a problem counts where any of its k responses is right, as in the paper, the mean over the "
            "repeats. unbiased: pass@k from all responses of a problem. pass@1: the share of right responses. "
            f"{INTERVAL}"
        )
        return [_table(head, rows), about]

    def _counts(self) -> list[str]:
        head = ["benchmark", "responses", "right", "no answer found", "judging timed out", "cut by the limit"]
        head.append("prompt too long")
        rows = [
            [MEASURES[result.name].title, *(f"{value:,}" for value in asdict(result.counts).values())]
            for result in self.results
        ]
        return [_table(head, rows), "What has no answer, timed out or was not asked counts as wrong."]

    def _differences(self) -> list[str]:
        head = ["benchmark", "to a published figure", "to a run on the same problems"]
        rows = [
            [
                MEASURES[result.name].title,
                f"more than {100 * result.distinguishable:.1f} points",
                f"{FEWEST} problems, {result.fewest_points:.1f} points"
                if result.problems >= FEWEST
                else f"nothing: {result.problems} problems are too few",
            ]
            for result in self.results
        ]
        about = (
            "A published figure comes without results for each problem and has an interval of its own, so a difference "
            "must be the larger. Two runs on the same problems are compared problem by problem "
            "(`hybrid-lora-eval compare=[A,B]`): there, at the very least, "
            f"{FEWEST} problems must turn out differently, all in one run's favour; each that goes the other way asks "
            "for more."
        )
        return [_table(head, rows), about]


def _figure(result: BenchmarkResult) -> str:
    said = f"**{100 * result.value:.1f}** [{100 * result.low:.1f}, {100 * result.high:.1f}]"
    return said if result.problems == result.of else f"{said} of the first {result.problems}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def as_text(report: RunReport) -> str:
    """The figures in a few aligned lines, for a terminal."""
    width = max(len(MEASURES[result.name].title) for result in report.results)
    lines = []
    for result in report.results:
        counts = result.counts
        odd = [
            f"{count:,} {what}"
            for count, what in (
                (counts.unparsed, "without an answer"),
                (counts.timed_out, "timed out"),
                (counts.cut, "cut"),
                (counts.not_asked, "with too long a prompt"),
            )
            if count
        ]
        lines.append(
            f"{MEASURES[result.name].title:<{width}}  {MEASURES[result.name].name:<8}  {100 * result.value:5.1f}  "
            f"[{100 * result.low:.1f}, {100 * result.high:.1f}]"
            f"  {counts.responses:,} response{'s' if counts.responses > 1 else ''}"
            + (f", {', '.join(odd)}" if odd else "")
        )
    return "\n".join(lines)
