"""A plan as a picture: for each phase a bar of a GPU's memory, part on part, beside what the GPU has."""

from __future__ import annotations

from pathlib import Path

from hybrid_lora_plugin.plan.planner import GIB, PARTS, Plan
from hybrid_lora_plugin.plan.table import TRAININGS

# Okabe and Ito's colours stay apart for colour-blind readers. The trainer's lasting state is blue and green, what
# passes is orange and red, the rollout engine's purple, and what nobody measured grey.
_COLOURS = {
    "frozen": "#0072b2",
    "trained": "#56b4e9",
    "gradients": "#009e73",
    "moments": "#7fcdb0",
    "reference": "#b3d9f2",
    "gathered": "#f0e442",
    "activations": "#e69f00",
    "logits": "#d55e00",
    "step": "#f4a582",
    "engine": "#8c6bb1",
    "working": "#e0c7ea",
    "cache": "#cc79a7",
    "transfer": "#5e4b8b",
    "reserve": "#bdbdbd",
}
#: GiB below which a part has no number of its own
_NUMBERED = 0.03


def draw_plan(plan: Plan, file: Path) -> None:
    """Write a PNG.

    Args:
        plan: of a run.
        file: where to; the bytes depend on the plan and the Matplotlib version only.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in PARTS if any(phase.parts.get(name) for phase in plan.phases)]
    limit = plan.machine.gpu_bytes / GIB
    figure = Figure(
        figsize=(9.5, 1.5 + 0.55 * len(plan.phases) + 0.22 * -(-len(names) // 4)), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    widest = max(limit, plan.fullest.total / GIB)
    places = range(len(plan.phases))
    left = [0.0] * len(plan.phases)
    for name in names:
        sizes = [phase.parts.get(name, 0) / GIB for phase in plan.phases]
        axes.barh(places, sizes, left=left, color=_COLOURS[name], height=0.62, label=PARTS[name], lw=0)
        for place, (start, size) in enumerate(zip(left, sizes, strict=True)):
            if size > _NUMBERED * widest:
                axes.text(start + size / 2, place, f"{size:.1f}", ha="center", va="center", fontsize=7)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, (phase, total) in enumerate(zip(plan.phases, left, strict=True)):
        over = total > limit
        axes.text(
            total + 0.008 * widest,
            place,
            f"{total:.1f}",
            va="center",
            fontsize=8,
            fontweight="bold",
            color="#d40000" if over else "black",
        )
        axes.text(0, place - 0.4, phase.moment, fontsize=6, color="#555555", va="center")
    axes.axvline(limit, color="#d40000", lw=1, ls="--")
    axes.text(limit, -0.62, f" the GPU has {limit:.0f} ", color="#d40000", fontsize=7, ha="right", va="center")
    axes.set_yticks(places, [phase.name for phase in plan.phases])
    axes.set_xlim(0, widest * 1.07)
    axes.set_ylim(len(plan.phases) - 0.55, -0.8)
    axes.set_xlabel("GiB on one GPU, at the fullest moment of each phase", fontsize=8)
    axes.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#eeeeee", lw=0.6)
    axes.set_axisbelow(True)
    figure.suptitle(
        f"{Path(plan.name).name}, {TRAININGS[plan.run.training]}, {plan.run.gpus} GPUs: planned, not measured",
        fontsize=9,
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    # Without this the PNG names the Matplotlib version; nothing in it may change from run to run.
    figure.savefig(file, metadata={"Software": None})
