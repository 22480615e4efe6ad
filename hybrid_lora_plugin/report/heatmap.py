"""The score of every module, layers × types, with the fully fine-tuned ones marked (paper Figure 2)."""

from __future__ import annotations

import math
from pathlib import Path

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.allocation.consensus import times_chosen
from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.stability import EDGE, by_standing
from hybrid_lora_plugin.report.groups import present_types, short_type
from hybrid_lora_plugin.report.ranking import by_preference

_MARK, _SILENT, _PLAIN, _EDGE = "#ff2b2b", "#d9d9d9", "#dfe5ec", "#ffffffb0"


def draw_heatmap(allocation: Allocation, file: Path) -> None:
    """Write a PNG: one column a layer, one row a type, colour = the score, on a log10 scale if all are positive.

    Scores of both signs are drawn on a linear scale that is white at 0. A fully fine-tuned module has a red frame
    and a dot; one without signal is grey and hatched; one that other batches may choose or drop is cross-hatched. An
    allocation without scores shows the assignment only.

    Args:
        allocation: the modules with their scores.
        file: where to; the bytes depend on the allocation and the Matplotlib version only.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    layers, types = allocation.model.num_layers, present_types(allocation.modules)
    scored = by_preference(allocation)
    grid = np.full((len(types), layers), np.nan)
    values, label, colours = _colouring([module.score for module in scored])
    for module, value in zip(scored, values, strict=True):
        grid[types.index(module.type), module.layer] = value

    # A cell is 0.25 inch high and wide, so that 80 layers stay as readable as 28; of few layers it is wider.
    figure = Figure(figsize=(max(6.0, 0.25 * layers + 2.4), 0.25 * len(types) + 2.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(_SILENT if scored else _PLAIN)
    image = axes.imshow(grid, aspect="equal" if layers > 14 else "auto", interpolation="nearest", **colours)
    silent = marked = False
    undecided = {module.name for module in by_standing(allocation).get(EDGE, ())}
    for module in allocation.modules:
        column, row = module.layer, types.index(module.type)
        if scored and not module.signal:
            silent = True
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#888888", lw=0)
            )
        if module.name in undecided:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="xxx", edgecolor=_EDGE, lw=0))
        if module.assignment == FULL:
            marked = True
            axes.add_patch(Rectangle((column - 0.42, row - 0.42), 0.84, 0.84, fill=False, edgecolor=_MARK, lw=1.8))
            axes.plot(column, row, marker="o", ms=4.5, color=_MARK, markeredgecolor="white", markeredgewidth=0.7)
    seeds = len(allocation.agreement.seeds) if allocation.agreement else 0
    times = {name: count for name, count in times_chosen(allocation).items() if 0 < count < seeds}
    for module in allocation.modules:
        if module.name in times:
            place = (module.layer + 0.4, types.index(module.type) + 0.38)
            axes.text(*place, str(times[module.name]), fontsize=5, color="white", ha="right", va="bottom")
    step = 1 if layers <= 40 else 5
    axes.set_xticks(range(0, layers, step))
    axes.tick_params(labelsize=7)
    axes.set_yticks(range(len(types)), [short_type(type_) for type_ in types])
    axes.set_xticks([edge - 0.5 for edge in range(layers + 1)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(len(types) + 1)], minor=True)
    axes.grid(which="minor", color="white", lw=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("layer", fontsize=8)
    figure.suptitle(_title(allocation, bool(scored)), fontsize=8)
    if scored:
        bar = figure.colorbar(image, ax=axes, location="right", fraction=0.04, pad=0.01, shrink=0.75)
        bar.set_label(label, fontsize=7)
        bar.ax.tick_params(labelsize=6)
    legend = []
    if marked:
        frame = dict(marker="s", ls="", markerfacecolor="none", markeredgecolor=_MARK, markeredgewidth=1.5)
        legend.append(Line2D([], [], label="full fine-tuning", **frame))
    legend.append(Patch(facecolor="none" if scored else _PLAIN, edgecolor="#999999", label="LoRA (no frame)"))
    if silent:
        legend.append(Patch(facecolor=_SILENT, hatch="////", edgecolor="#888888", label="no signal (LoRA)"))
    if undecided:
        legend.append(Patch(facecolor="none", hatch="xxxx", edgecolor="#999999", label="on the edge"))
    if times:
        legend.append(Line2D([], [], ls="", marker="$n$", color="#999999", label=f"chosen by n of {seeds} seeds"))
    figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    # Without this the PNG names the Matplotlib version; nothing in it may change from run to run.
    figure.savefig(file, metadata={"Software": None})


def _colouring(scores: list[float]) -> tuple[list[float], str, dict]:
    """What to colour by, what to call it, and the colour scale."""
    if scores and min(scores) > 0:
        return [math.log10(score) for score in scores], "log10 score", dict(cmap="viridis")
    if scores and min(scores) < 0 < max(scores):
        # Green and purple, because the marks are red.
        bound = max(abs(score) for score in scores)
        return scores, "score", dict(cmap="PRGn", vmin=-bound, vmax=bound)
    return scores, "score", dict(cmap="viridis")


def _title(allocation: Allocation, scored: bool) -> str:
    model, selection = allocation.model, allocation.selection
    normalise = "" if selection.normalise == "none" else f", normalise {selection.normalise}"
    how = (
        f"'{selection.criterion}' score{normalise}, {selection.direction} first"
        if scored
        else f"choice '{selection.criterion}'"
    )
    # The budget may count modules or trainable parameters; the picture always states parameters of the full modules.
    return (
        f"{Path(model.name_or_path).name} ({model.architecture}): {how}\n"
        f"{len(allocation.full_names)} of {len(allocation.modules)} modules fully fine-tuned, "
        f"{100 * allocation.full_parameters / model.candidate_parameters:.2f} % of the candidate parameters"
    )
