"""The score of every module, layers × types, with the fully fine-tuned ones marked (paper Figure 2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.candidates import TYPE_ORDER

if TYPE_CHECKING:
    from hybrid_lora_plugin.allocation.artifact import Allocation


def draw_heatmap(allocation: Allocation, file: Path) -> None:
    """Write a PNG: one column a layer, one row a type, colour = log10 of the score.

    A fully fine-tuned module has a red frame and a dot; one without signal is grey and hatched.

    Args:
        allocation: the modules with their scores.
        file: where to; the bytes depend on the allocation and the Matplotlib version only.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    layers = allocation.model.num_layers
    types = [type_ for type_ in TYPE_ORDER if any(module.type == type_ for module in allocation.modules)]
    grid = np.full((len(types), layers), np.nan)
    for module in allocation.modules:
        if module.signal and module.score > 0:
            grid[types.index(module.type), module.layer] = math.log10(module.score)

    # A cell is 0.25 inch high and wide, so that 80 layers stay as readable as 28; of few layers it is wider.
    figure = Figure(figsize=(max(6.0, 0.25 * layers + 2.4), 0.25 * len(types) + 2.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(grid, cmap="viridis", aspect="equal" if layers > 14 else "auto", interpolation="nearest")
    silent = marked = False
    for module in allocation.modules:
        column, row = module.layer, types.index(module.type)
        if not module.signal:
            silent = True
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#888888", lw=0)
            )
        if module.assignment == FULL:
            marked = True
            axes.add_patch(Rectangle((column - 0.42, row - 0.42), 0.84, 0.84, fill=False, edgecolor="#ff2b2b", lw=1.8))
            axes.plot(
                column, row, marker="o", markersize=4.5, color="#ff2b2b", markeredgecolor="white", markeredgewidth=0.7
            )
    step = 1 if layers <= 40 else 5
    axes.set_xticks(range(0, layers, step))
    axes.tick_params(labelsize=7)
    axes.set_yticks(range(len(types)), [type_.removesuffix("_proj") for type_ in types])
    axes.set_xticks([edge - 0.5 for edge in range(layers + 1)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(len(types) + 1)], minor=True)
    axes.grid(which="minor", color="white", lw=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("layer", fontsize=8)
    model, criterion, budget = allocation.model, allocation.criterion, allocation.budget
    figure.suptitle(
        f"{Path(model.name_or_path).name} ({model.architecture}): '{criterion.name}' score, {criterion.direction} first\n"
        f"{len(allocation.full_names)} of {len(allocation.modules)} modules fully fine-tuned, "
        f"{100 * budget.used / model.candidate_parameters:.2f} % of the candidate parameters",
        fontsize=8,
    )
    bar = figure.colorbar(image, ax=axes, location="right", fraction=0.04, pad=0.01, shrink=0.75)
    bar.set_label("log10 score", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    legend = []
    if marked:
        legend.append(
            Line2D(
                [], [], marker="s", ls="", markerfacecolor="none", markeredgecolor="#ff2b2b", label="full fine-tuning"
            )
        )
    legend.append(Line2D([], [], marker="s", ls="", color="#35608d", label="LoRA (no frame)"))
    if silent:
        legend.append(Patch(facecolor="#d9d9d9", hatch="////", edgecolor="#888888", label="no signal (LoRA)"))
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    # Without this the PNG names the Matplotlib version; nothing in it may change from run to run.
    figure.savefig(file, metadata={"Software": None})
