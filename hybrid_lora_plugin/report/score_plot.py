"""Does the score separate, or is it a continuum: all modules by score, and mean against standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.allocation.schema import Allocation, ModuleRecord
from hybrid_lora_plugin.report.groups import present_types, short_type
from hybrid_lora_plugin.report.ranking import by_preference, find_cut

# Colours that stay apart for colour-blind readers (Okabe and Ito). No model has a fused type beside its parts.
_COLOURS = {
    "q_proj": "#0072b2",
    "k_proj": "#56b4e9",
    "v_proj": "#009e73",
    "qkv_proj": "#0072b2",
    "o_proj": "#e69f00",
    "in_proj": "#a6761d",
    "in_proj_qkv": "#a6761d",
    "in_proj_z": "#d9b365",
    "in_proj_b": "#f0e442",
    "in_proj_a": "#b2df8a",
    "out_proj": "#222222",
    "gate_proj": "#cc79a7",
    "up_proj": "#8c6bb1",
    "gate_up_proj": "#cc79a7",
    "down_proj": "#7f7f7f",
}
_RING = "#d40000"


def draw_scores(allocation: Allocation, file: Path) -> None:
    """Write a PNG: modules in order of preference with the cut, and their moments over T batches.

    A bar spans the middle 90 % of a module's scores in draws of the batches (``allocation.stability``).

    The second panel is left out where no module has a spread. An allocation without scores (see
    ``ranking.by_preference``) has nothing to draw and gets no file.

    Args:
        allocation: the modules with their scores.
        file: where to; the bytes depend on the allocation and the Matplotlib version only.
    """
    modules = by_preference(allocation)
    if not modules:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with_moments = any(module.std != 0 for module in modules)
    panels = 2 if with_moments else 1
    figure = Figure(figsize=(11.0 if with_moments else 7.0, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, width_ratios=(1.3, 1)[:panels])[0]
    _draw_order(axes[0], allocation, modules)
    if with_moments:
        _draw_moments(axes[1], allocation, modules)
    for panel in axes:
        # A range within one decade is labelled at minor ticks.
        panel.tick_params(which="both", labelsize=7)
        panel.grid(color="#eeeeee", lw=0.6)
        panel.set_axisbelow(True)

    types = present_types(modules)
    legend = [Line2D([], [], marker="o", ls="", ms=4.5, color=_COLOURS[t], label=short_type(t)) for t in types]
    legend.append(Line2D([], [], label="full fine-tuning", **_ring_style()))
    if allocation.stability is not None:
        legend.append(Line2D([], [], color="#b0b0b0", lw=0.9, label="90 % of draws"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=7, frameon=False)
    silent = len(allocation.modules) - len(modules)
    figure.suptitle(
        f"{Path(allocation.model.name_or_path).name} ({allocation.model.architecture}): {_score_name(allocation)} of "
        f"{len(modules)} modules" + (f", {silent} without signal left out" if silent else ""),
        fontsize=8.5,
    )
    # Without this the PNG names the Matplotlib version; nothing in it may change from run to run.
    figure.savefig(file, metadata={"Software": None})


def _draw_order(axes, allocation: Allocation, modules: Sequence[ModuleRecord]) -> None:
    places, scores = range(1, len(modules) + 1), [module.score for module in modules]
    _draw_bounds(axes, allocation, modules)
    _scatter(axes, places, scores, modules)
    cut = find_cut(allocation)
    if cut is not None:
        axes.axvline(cut.place + 0.5, color=_RING, lw=0.9, ls="--")
        axes.annotate(
            f"cut: {cut.place - cut.passed_over} full",
            (cut.place + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            # Past the middle the words would leave the panel to the right.
            **(dict(ha="left") if cut.place < 0.75 * len(modules) else dict(ha="right")),
            va="top",
            fontsize=7,
            color=_RING,
        )
    _scale(axes, axes.set_yscale, scores)
    axes.set_xlabel(f"modules, {allocation.selection.direction} score first", fontsize=8)
    axes.set_ylabel(_score_name(allocation), fontsize=8)


def _draw_bounds(axes, allocation: Allocation, modules: Sequence[ModuleRecord]) -> None:
    """What other draws of the batches gave for each score."""
    stability = allocation.stability
    if stability is None:
        return
    place = {module.name: index for index, module in enumerate(allocation.modules)}
    low, high = ([bounds[place[m.name]] for m in modules] for bounds in (stability.low, stability.high))
    lowest = min(module.score for module in modules)
    if lowest > 0:
        # A draw without spread has a score of 0, which has no place on a logarithmic scale.
        low = [max(value, lowest / 10) for value in low]
    axes.vlines(range(1, len(modules) + 1), low, high, color="#b0b0b0", lw=0.7, zorder=1)


def _draw_moments(axes, allocation: Allocation, modules: Sequence[ModuleRecord]) -> None:
    means, stds = [module.mean for module in modules], [module.std for module in modules]
    _scatter(axes, means, stds, modules)
    _scale(axes, axes.set_xscale, means)
    _scale(axes, axes.set_yscale, stds)
    axes.set_xlabel("mean over the validation batches", fontsize=8)
    axes.set_ylabel("standard deviation", fontsize=8)


def _scatter(axes, x: Sequence[float], y: Sequence[float], modules: Sequence[ModuleRecord]) -> None:
    # One call for all types: points of one type would otherwise cover those of another.
    axes.scatter(x, y, s=15, c=[_COLOURS[module.type] for module in modules], lw=0, zorder=2)
    full = [index for index, module in enumerate(modules) if module.assignment == FULL]
    axes.plot([x[i] for i in full], [y[i] for i in full], zorder=3, **_ring_style())


def _scale(axes, set_scale, values: Sequence[float]) -> None:
    """Logarithmic where all values are positive; linear, or symlog if a few dwarf the rest, where they are not."""
    if min(values) > 0:
        set_scale("log")
        return
    sizes = sorted(abs(value) for value in values if value != 0)
    middle = sizes[len(sizes) // 2]
    if sizes[-1] > 100 * middle:
        set_scale("symlog", linthresh=middle)
        # The margins were taken on the linear scale and would cut the outermost points in half.
        axes.margins(0.05)
        axes.autoscale()


def _score_name(allocation: Allocation) -> str:
    selection = allocation.selection
    return f"'{selection.criterion}' score" + ("" if selection.normalise == "none" else f" ({selection.normalise})")


def _ring_style() -> dict:
    return dict(marker="o", ls="", ms=6.5, markerfacecolor="none", markeredgecolor=_RING, markeredgewidth=0.7)
