"""The held-out loss of each candidate of a trial, from the common start to the round after which it was dropped."""

from __future__ import annotations

from pathlib import Path

from hybrid_lora_plugin.allocation.schema import TrialCandidate, TrialRecord

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#7f7f7f")
_CONTROL = "#000000"


def draw_trial(record: TrialRecord | None, file: Path) -> None:
    """Write a PNG: a line a candidate over its optimizer steps, a cross where it was dropped; nothing without a trial.

    The second panel has the same losses minus the lowest one of each round, the control's among them.

    Args:
        record: of the trial.
        file: where to; the bytes depend on the record and the Matplotlib version only.
    """
    if record is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, gaps = figure.subplots(1, 2)
    everyone = [*record.candidates, *([record.lora] if record.lora is not None else [])]
    lowest = [
        min(one.losses[number] for one in everyone if len(one.losses) > number) for number in range(len(record.rounds))
    ]
    for number, one in enumerate(everyone):
        colour = _CONTROL if one is record.lora else _COLOURS[number % len(_COLOURS)]
        style = "--" if one is record.lora else "-" if number < len(_COLOURS) else ":"
        _draw(losses, record, one, [0, *record.rounds], [record.start, *one.losses], colour, style)
        above = [loss - least for loss, least in zip(one.losses, lowest, strict=False)]
        _draw(gaps, record, one, record.rounds, above, colour, style)
    losses.set_ylabel("held-out loss, nats a token", fontsize=8)
    gaps.set_ylabel("above the lowest of the round", fontsize=8)
    for panel in (losses, gaps):
        panel.set_xlabel("optimizer steps", fontsize=8)
        panel.set_xticks([0, *record.rounds])
        panel.tick_params(labelsize=7)
        panel.grid(color="#eeeeee", lw=0.6)
        panel.set_axisbelow(True)
    losses.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{record.chosen} is used; a cross: dropped or diverged", fontsize=8.5)
    # Without this the PNG names the Matplotlib version; nothing in it may change from run to run.
    figure.savefig(file, metadata={"Software": None})


def _draw(
    axes, record: TrialRecord, one: TrialCandidate, steps: list[int], values: list[float], colour: str, style: str
) -> None:
    chosen = one.name == record.chosen
    label = one.name + (" (used)" if chosen else " (control)" if one is record.lora else "")
    steps = steps[: len(values)]
    axes.plot(steps, values, color=colour, ls=style, lw=2.0 if chosen else 1.0, marker="o", ms=3, label=label)
    if one.dropped or one.diverged:
        axes.plot(steps[-1:], values[-1:], color=colour, marker="x", ms=7, ls="")
