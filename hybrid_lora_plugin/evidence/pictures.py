"""A comparison as pictures; the bytes depend on the results and the Matplotlib version only."""

from __future__ import annotations

import statistics
from pathlib import Path

from hybrid_lora_plugin.evidence.arms import FULL, LORA, PlannedArm
from hybrid_lora_plugin.evidence.comparison import Comparison
from hybrid_lora_plugin.evidence.intervals import CONTRADICTED, SUPPORTED
from hybrid_lora_plugin.evidence.picks import left, picked
from hybrid_lora_plugin.report.groups import present_types, short_type

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_BETTER, _WORSE, _UNCLEAR = "#0072b2", "#d55e00", "#7f7f7f"
#: of what an arm leaves frozen in every start
_FROZEN = "#bdbdbd"
_LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#000000")
#: strips side by side, and inches and cells between and of them
_STRIPS, _CELL, _BETWEEN = 4, 0.13, (3, 2.2)
#: cells that a strip is wide at least
_NARROWEST = 10


def draw_forest(comparison: Comparison, file: Path) -> None:
    """Write a PNG: each arm's difference to ``random`` over all starts with its interval; primary arms are bold."""
    rows = [row for row in comparison.rows(comparison.study.cells) if row.against_random is not None]
    figure, axes = _figure(7.5, 1.3 + 0.22 * len(rows))
    primary = {one.arm.name for one in comparison.primaries}
    colours = {SUPPORTED: _BETTER, CONTRADICTED: _WORSE}
    for place, row in enumerate(rows):
        found = row.against_random
        colour = colours.get(found.verdict, _UNCLEAR)
        if found.low is not None:
            axes.plot([found.low, found.high], [place, place], color=colour, lw=2, solid_capstyle="butt")
        axes.plot(found.mean, place, "o", ms=5 if row.arm.name in primary else 3.5, color=colour)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.arm.name for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.arm.name in primary else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(labelsize=7, length=0)
    axes.grid(axis="x", color="#eeeeee", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    side = "left" if comparison.study.prepared.lower_is_better else "right"
    axes.set_xlabel(f"{comparison.study.prepared.measure} minus that of random: {side} of 0 is better", fontsize=8)
    axes.set_title(f"{comparison.study.plan.name}; grey: not distinguished; bold: primary", fontsize=8.5, loc="left")
    _save(figure, file)


def draw_curves(comparison: Comparison, file: Path) -> None:
    """Write a PNG: a panel for each base and task, the mean held-out value over starts and draws at each step."""
    from matplotlib.lines import Line2D

    study, arms = comparison.study, _shown(comparison)
    rows, columns = len(study.plan.bases), len(study.plan.tasks)
    figure, panels = _figure(1.2 + 2.9 * columns, 0.9 + 2.3 * rows, rows, columns)
    for row, base in enumerate(study.plan.bases):
        for column, task in enumerate(study.plan.tasks):
            axes, lowest = panels[row][column], []
            for arm, colour in zip(arms, _LINES, strict=False):
                points = _mean_curve(comparison, arm, base, task)
                axes.plot(*zip(*points, strict=True), color=colour, lw=1.2)
                lowest += [value for _, value in points]
            if min(lowest) > 0 and max(lowest) > 10 * min(lowest):
                axes.set_yscale("log")
            mark = "" if comparison.has_gap((base, task)) else " (no gap shown)"
            axes.set_title(f"{base} / {task}{mark}", fontsize=8, loc="left")
            axes.tick_params(which="both", labelsize=7)
            axes.grid(color="#eeeeee", lw=0.6)
            if row == rows - 1:
                axes.set_xlabel("step", fontsize=8)
            if column == 0:
                axes.set_ylabel(study.prepared.measure, fontsize=8)
    legend = [Line2D([], [], color=colour, label=arm.name) for arm, colour in zip(arms, _LINES, strict=False)]
    figure.legend(handles=legend, loc="outside lower center", ncols=min(4, len(legend)), fontsize=7, frameon=False)
    _save(figure, file)


def _shown(comparison: Comparison) -> list[PlannedArm]:
    """The arms of the primary comparisons, LoRA and full fine-tuning: as many as there are colours."""
    names = [name for one in comparison.primaries for name in (one.arm.name, one.other.name)] + [LORA, FULL]
    found = {arm.name: arm for arm in comparison.study.arms}
    return [found[name] for name in dict.fromkeys(names) if name in found][: len(_LINES)]


def _mean_curve(comparison: Comparison, arm: PlannedArm, base: str, task: str) -> list[tuple[int, float]]:
    """Mean over the runs that have a value at a step; a curve that diverged ends earlier than the others."""
    values: dict[int, list[float]] = {}
    for start in comparison.study.starts(comparison.seeds):
        if (start.base, start.task) == (base, task):
            for outcome in comparison.outcomes(arm, start):
                for step, value in outcome.curve:
                    values.setdefault(step, []).append(value)
    return [(step, statistics.fmean(values[step])) for step in sorted(values)]


def draw_picks(comparison: Comparison, base: str, file: Path) -> bool:
    """Write a PNG: for each selecting arm a strip of types × layers, dark where it tunes a module fully in every start.

    What it leaves frozen in every start is grey.

    Returns:
        Whether there was an arm to draw.
    """
    import numpy as np
    from matplotlib.colors import ListedColormap

    study = comparison.study
    arms = [arm for arm in study.arms if arm.selects]
    if not arms:
        return False
    candidates = study.prepared.candidates[base]
    types, layers = present_types(candidates), max(one.layer for one in candidates) + 1
    rows, columns = -(-len(arms) // _STRIPS), min(_STRIPS, len(arms))
    # All strips are in one panel: axes of their own take seconds to lay out.
    # Of few layers a cell is wider, so that names of arms have room.
    cell = max(1.0, _NARROWEST / layers)
    wide, high = cell * layers + _BETWEEN[0], len(types) + _BETWEEN[1]
    figure, axes = _figure(0.6 + _CELL * wide * columns, 0.6 + _CELL * high * rows)
    some_frozen = False
    for place, arm in enumerate(arms):
        x, top = place % columns * wide, place // columns * high
        shares = picked(comparison, arm, base)
        grid = np.full((len(types), layers), np.nan)
        still, frozen = np.full((len(types), layers), np.nan), left(comparison, arm, base)
        for one in candidates:
            grid[types.index(one.type), one.layer] = shares[one.name]
            if frozen.get(one.name) == 1:
                still[types.index(one.type), one.layer] = 1
        edges = x + cell * np.arange(layers + 1), top + np.arange(len(types) + 1)
        axes.pcolormesh(*edges, grid, cmap="Blues", vmin=0, vmax=1, edgecolors="#e6e6e6", linewidth=0.5)
        if not np.isnan(still).all():
            axes.pcolormesh(*edges, still, cmap=ListedColormap([_FROZEN]), edgecolors="#e6e6e6", linewidth=0.5)
            some_frozen = True
        axes.text(x, top - 0.3, arm.name, fontsize=6.5, va="bottom")
        if place % columns == 0:
            for at, type_ in enumerate(types):
                axes.text(x - 0.2, top + at + 0.55, short_type(type_), fontsize=5, ha="right", va="center")
    axes.set_xlim(-2, columns * wide)
    axes.set_ylim(rows * high - _BETWEEN[1] + 0.5, -1.8)
    axes.set_axis_off()
    grey = ", grey frozen" if some_frozen else ""
    axes.set_title(
        f"{base}: layers from left to right, by share of starts\n"
        f"in which a module is fully tuned: white 0, blue 1{grey}",
        fontsize=8,
        loc="left",
    )
    _save(figure, file)
    return True


def _figure(width: float, height: float, rows: int = 0, columns: int = 0):
    """A figure with one panel, or with rows of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False) if rows else figure.subplots()


def _save(figure, file: Path) -> None:
    # Without this the PNG names the Matplotlib version; nothing in it may change from run to run.
    figure.savefig(file, metadata={"Software": None})
