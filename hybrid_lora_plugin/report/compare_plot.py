"""A comparison as one picture: a strip of layers × types for each allocation, and how much pairs share."""

from __future__ import annotations

from pathlib import Path

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.report.compare import Comparison
from hybrid_lora_plugin.report.groups import present_types, short_type

_LORA, _FULL, _FULL_IN_ALL = "#e6e6e6", "#2f6db5", "#e0560b"
# Inches. Everything is placed by hand, so that a cell has one size whatever the depth.
_CELL, _LEFT, _RIGHT, _TOP, _BOTTOM = 0.155, 0.55, 0.3, 0.62, 0.75
_TITLE, _PAIR, _BETWEEN = 0.42, 0.62, 0.75


def draw_comparison(comparison: Comparison, file: Path) -> None:
    """Write a PNG: strips to the left, a matrix of Jaccard (colour, upper number) and Spearman to the right.

    Args:
        comparison: from ``compare``.
        file: where to; the bytes depend on the comparison and the Matplotlib version only.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    model, modules = comparison.allocations[0].model, comparison.allocations[0].modules
    types, count = present_types(modules), len(comparison.allocations)
    strip_width = _CELL * max(model.num_layers, 24)
    strip_height = _CELL * len(types)
    side = max(1.6, _PAIR * count)
    # The matrix has a colour-free margin for its letters, a title above and a note below.
    width = _LEFT + strip_width + _BETWEEN + side + _RIGHT
    height = _TOP + max(count * (strip_height + _TITLE), side + _TITLE + 0.5) + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)

    def place(left: float, top: float, wide: float, high: float):
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    for index in range(count):
        top = _TOP + index * (strip_height + _TITLE) + _TITLE / 2
        _draw_strip(place(_LEFT, top, strip_width, strip_height), comparison, index, types)
    _draw_matrix(place(_LEFT + strip_width + _BETWEEN, _TOP + _TITLE / 2, side, side), comparison)

    figure.text(
        0.1 / width,
        1 - 0.2 / height,
        f"{Path(model.name_or_path).name} ({model.architecture}): what {count} allocations fully fine-tune",
        fontsize=9,
        va="center",
    )
    legend = [
        Patch(facecolor=_FULL_IN_ALL, label=f"full in all {count} ({len(comparison.full_in_all)} modules)"),
        Patch(facecolor=_FULL, label="full"),
        Patch(facecolor=_LORA, label="LoRA"),
    ]
    figure.legend(
        handles=legend,
        loc="lower left",
        bbox_to_anchor=(0.1 / width, 0.05 / height),
        ncols=3,
        fontsize=7,
        frameon=False,
    )
    # Without this the PNG names the Matplotlib version; nothing in it may change from run to run.
    figure.savefig(file, metadata={"Software": None})


def _draw_strip(axes, comparison: Comparison, index: int, types: list[str]) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap

    allocation = comparison.allocations[index]
    layers, in_all = allocation.model.num_layers, comparison.full_in_all
    grid = np.full((len(types), layers), np.nan)
    for module in allocation.modules:
        full = module.assignment == FULL
        grid[types.index(module.type), module.layer] = (2 if module.name in in_all else 1) if full else 0
    # A type that a layer does not have stays white.
    axes.pcolormesh(
        np.arange(layers + 1) - 0.5,
        np.arange(len(types) + 1) - 0.5,
        grid,
        cmap=ListedColormap([_LORA, _FULL, _FULL_IN_ALL]),
        vmin=0,
        vmax=2,
        edgecolors="white",
        linewidth=0.8,
    )
    axes.invert_yaxis()
    axes.set_xlim(-0.5, layers - 0.5)
    step = 1 if layers <= 12 else 2 if layers <= 40 else 5
    axes.set_xticks(range(0, layers, step))
    axes.set_yticks(range(len(types)), [short_type(type_) for type_ in types])
    axes.tick_params(labelsize=6, length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    label = comparison.labels[index]
    # A longer one, with the name of a folder, would run into the matrix.
    label = label if len(label) <= 48 else label[:47] + "…"
    axes.set_title(
        f"{comparison.letters[index]}  {label}: {len(allocation.full_names)} of {len(allocation.modules)} modules full",
        fontsize=7.5,
        loc="left",
        pad=3,
    )


def _draw_matrix(axes, comparison: Comparison) -> None:
    import numpy as np

    count = len(comparison.allocations)
    grid = np.full((count, count), np.nan)
    for (i, j), pair in comparison.pairs.items():
        # Jaccard is undefined only if neither allocation has a full module.
        grid[i, j] = grid[j, i] = pair.overlap.jaccard if pair.overlap.jaccard is not None else np.nan
    axes.set_facecolor("#f4f4f4")
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    for (i, j), pair in comparison.pairs.items():
        jaccard, rank = pair.overlap.jaccard, pair.ranks.value
        first = "–" if jaccard is None else f"{jaccard:.2f}"
        # Adding 0 turns the -0.0 of a rounded small negative into 0.0.
        second = "–" if rank is None else f"{round(rank, 2) + 0.0:.2f}"
        for x, y in ((i, j), (j, i)):
            colour = "white" if (jaccard or 0) > 0.55 else "black"
            axes.text(x, y - 0.16, first, ha="center", va="center", fontsize=8, color=colour)
            axes.text(x, y + 0.2, f"ρ {second}", ha="center", va="center", fontsize=6.5, color=colour)
    for i, allocation in enumerate(comparison.allocations):
        axes.text(i, i, f"{len(allocation.full_names)}\nfull", ha="center", va="center", fontsize=6.5, color="#555555")
    axes.set_xticks(range(count), comparison.letters)
    axes.set_yticks(range(count), comparison.letters)
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.set_title("pairs", fontsize=7.5, loc="left", pad=3)
    axes.set_xlabel("colour, upper number: Jaccard\nof the full modules\nρ: Spearman of the preference", fontsize=6.5)
