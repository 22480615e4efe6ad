"""What a trial found, in a table and in words."""

from __future__ import annotations

from hybrid_lora_plugin.allocation.schema import LossDifference, TrialCandidate, TrialRecord

#: What the intervals leave out; said wherever one is.
LEFT_OUT = "intervals are of the held-out rows alone: another seed, order of the rows or length may move more"


def difference_in_words(difference: LossDifference) -> str:
    """``-0.0123 [-0.0200, -0.0050]``, in nats a token."""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def trial_cells(record: TrialRecord) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of candidates, the control last."""
    head = ["candidate", "full modules", "trainable parameters"]
    head += [f"loss after {steps}" for steps in record.rounds] + ["against the best then", "dropped"]
    rows = [_cells(record, one) for one in record.candidates]
    if record.lora is not None:
        rows.append(_cells(record, record.lora))
    return head, rows


def _cells(record: TrialRecord, one: TrialCandidate) -> list[str]:
    losses = [f"{loss:.4f}" for loss in one.losses]
    if one.diverged:
        losses.append("diverged")
    losses += [""] * (len(record.rounds) - len(losses))
    if record.lora is not None and one.name == record.lora.name:
        against, dropped = "", "control"
        if record.against_lora is not None:
            against = f"chosen minus it {difference_in_words(record.against_lora)}"
    else:
        against = "" if one.difference is None else difference_in_words(one.difference)
        dropped = f"round {one.dropped}" if one.dropped else "chosen" if one.name == record.chosen else "no"
    name = " = ".join([one.name, *one.also])
    full = str(len(one.modules)) if one.modules else f"rank {one.rank}"
    return [name, full, f"{one.trainable_parameters:,}", *losses, against, dropped]


def trial_table(record: TrialRecord) -> list[str]:
    """The table for a terminal."""
    head, rows = trial_cells(record)
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows])
    return [line.rstrip() for line in lines]


def trial_markdown(record: TrialRecord) -> list[str]:
    """The same as lines of Markdown."""
    head, rows = trial_cells(record)
    marks = ["---", *["---:"] * (len(head) - 2), "---"]
    return [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]


def trial_in_words(record: TrialRecord | None) -> list[str]:
    """A sentence on the choice, and one on the control; none where there was no trial."""
    if record is None:
        return []
    best = min((one for one in record.candidates if not one.dropped and one.losses), key=lambda one: one.losses[-1])
    last = record.rounds[-1]
    if len(record.alike) > 1:
        others = " and ".join(record.alike)
        lines = [
            f"trial: not distinguished: after {last} steps {record.rows} held-out rows cannot tell {others} apart; "
            f"{record.chosen} is used, the first of them in trial.portfolio"
            + ("" if record.chosen == best.name else f" ({best.name} has the lowest loss)")
        ]
    else:
        rest = [one for one in record.candidates if not one.dropped and one.name != best.name]
        clear = next((one.difference for one in rest if one.difference is not None), None)
        said = f"; of the next one {difference_in_words(clear)} to it" if clear is not None else ""
        lines = [
            f"trial: the lowest held-out loss after {last} steps is that of {record.chosen}, {best.losses[-1]:.4f} "
            f"({record.start:.4f} before the first){said}"
        ]
    if record.against_lora is not None:
        difference = record.against_lora
        if difference.high < 0:
            said = "is better than"
        elif difference.low > 0:
            said = "is worse than"
        else:
            said = "is not distinguished from"
        lines.append(
            f"trial: what is used ({record.chosen}) {said} LoRA of the same size (rank {record.lora.rank}): "
            f"{difference_in_words(difference)} nats a token"
            + ("" if difference.high < 0 else "; on these rows, at these rates and this length, no gain is seen")
        )
    lines.append(f"trial: {LEFT_OUT}")
    return lines
