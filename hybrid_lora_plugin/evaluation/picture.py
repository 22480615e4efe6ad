"""Figures with their intervals, and the differences of two runs, as pictures."""

from __future__ import annotations

from pathlib import Path

from hybrid_lora_plugin.evaluation.comparison import RunComparison
from hybrid_lora_plugin.evaluation.measures import MEASURES
from hybrid_lora_plugin.evaluation.paired import LEVEL
from hybrid_lora_plugin.evaluation.paper import COLUMNS, TABLE_1
from hybrid_lora_plugin.evaluation.report import RunReport

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_OWN, _PAPER, _OURS, _UNCLEAR = "#0072b2", "#999999", "#e69f00", "#7f7f7f"


def draw_results(report: RunReport, file: Path) -> None:
    """Write a PNG: each benchmark's figure with its interval, and the paper's rows for a model of this size.

    Args:
        report: of the run.
        file: where to; the bytes depend on the report and the Matplotlib version only.
    """
    figure, axes = _figure(len(report.results))
    rows = TABLE_1.get(report.size or "", ())
    for place, result in enumerate(report.results):
        if result.name in COLUMNS:
            column = COLUMNS.index(result.name)
            for row in rows:
                ours = "Hybrid" in row.method
                axes.plot(
                    row.figures[column], place, "|", ms=11, mew=1.6 if ours else 1.0, color=_OURS if ours else _PAPER
                )
        value, low, high = (100 * share for share in (result.value, result.low, result.high))
        axes.plot([low, high], [place, place], color=_OWN, lw=2, solid_capstyle="butt", zorder=3)
        axes.plot(value, place, "o", ms=6, color=_OWN, zorder=4)
        axes.annotate(
            f"{value:.1f}", (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=7, color=_OWN
        )
    names = [f"{MEASURES[r.name].title}\n{MEASURES[r.name].name}, {r.problems} problems" for r in report.results]
    _finish(axes, names)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("%, with 95 % interval", fontsize=8)
    title = report.label if len(report.label) <= 60 else report.label[:59] + "…"
    if rows:
        title += f"\n| the paper's rows for {report.size}, its Hybrid-LoRA in orange"
    axes.set_title(title, fontsize=8.5, loc="left")
    figure.savefig(file, metadata={"Software": None})


def draw_comparison(comparison: RunComparison, file: Path) -> None:
    """Write a PNG: for each benchmark B minus A with its interval; what is not distinguished is grey."""
    figure, axes = _figure(len(comparison.benchmarks))
    for place, one in enumerate(comparison.benchmarks):
        difference = one.difference
        mean, low, high = (100 * share for share in (difference.mean, difference.low, difference.high))
        colour = _OWN if one.p < LEVEL else _UNCLEAR
        axes.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="butt")
        axes.plot(mean, place, "o", ms=6, color=colour)
        axes.annotate(
            f"{mean:+.1f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=7, color=colour
        )
    axes.axvline(0, color="black", lw=0.8)
    widest = max(abs(end) for end in axes.get_xlim())
    axes.set_xlim(-widest, widest)
    _finish(axes, [f"{MEASURES[one.name].title}\n{one.difference.problems} problems" for one in comparison.benchmarks])
    first, second = (label if len(label) <= 40 else label[:39] + "…" for label in comparison.labels)
    axes.set_xlabel(f"points, with 95 % interval: right of 0, {second} is better", fontsize=8)
    axes.set_title(f"{second} against {first}; grey: not distinguished", fontsize=8.5, loc="left")
    figure.savefig(file, metadata={"Software": None})


def _figure(rows: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 1.2 + 0.55 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finish(axes, names) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(labelsize=7, length=0)
    axes.grid(axis="x", color="#eeeeee", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
