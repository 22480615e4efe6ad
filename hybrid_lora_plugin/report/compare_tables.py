"""A comparison as tables, in aligned plain text for a terminal or in Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.report.compare import Comparison
from hybrid_lora_plugin.report.ranking import chosen_by_rule

_WIDTH = 100


@dataclass(frozen=True)
class Table:
    """A title, rows of cells under a head, and notes below."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def comparison_tables(comparison: Comparison, paths: Sequence[str | Path]) -> list[Table]:
    """The tables of a comparison.

    Args:
        comparison: from ``compare``.
        paths: where each allocation was read from.
    """
    return [
        _key(comparison, paths),
        _overlaps(comparison),
        _orders(comparison),
        _measures(comparison),
        _counts(comparison),
        _shared_by_group(comparison),
    ]


def as_text(tables: Sequence[Table]) -> str:
    """Plain text: columns aligned, the first two of the key to the left; at most 100 columns for six allocations."""
    return "\n\n".join("\n".join(_text_lines(table)) for table in tables)


def as_markdown(tables: Sequence[Table]) -> str:
    """Markdown, a heading and a table each."""
    parts = []
    for table in tables:
        rule = ["---"] + ["---:"] * (len(table.head) - 1)
        lines = [f"## {table.title}", ""]
        # A label or a folder may hold the sign that separates cells.
        for row in (table.head, rule, *table.rows):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        parts.append("\n".join([*lines, *(f"\n{note}" for note in table.notes)]))
    return "\n\n".join(parts)


def _text_lines(table: Table) -> list[str]:
    rows = [table.head, *table.rows]
    if table.title == _KEY_TITLE:
        # Names and folders are as long as their owner made them; the end of a path tells most.
        rows = [[row[0], _shorten(row[1], 36), *row[2:]] for row in rows]
        taken = sum(max(len(row[k]) for row in rows) + 2 for k in range(len(table.head) - 1))
        rows = [[*row[:-1], _shorten(row[-1], max(12, _WIDTH - taken), keep_end=True)] for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(table.head))]
    lines = [table.title]
    for row in rows:
        to_left = range(len(row)) if table.title == _KEY_TITLE else (0,)
        cells = [
            cell.ljust(w) if k in to_left else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines + [line for note in table.notes for line in textwrap.wrap(note, _WIDTH)]


def _shorten(text: str, width: int, keep_end: bool = False) -> str:
    if len(text) <= width:
        return text
    return "…" + text[1 - width :] if keep_end else text[: width - 1] + "…"


_KEY_TITLE = "Allocations"


def _key(comparison: Comparison, paths: Sequence[str | Path]) -> Table:
    rows = []
    for letter, label, allocation, path in zip(
        comparison.letters, comparison.labels, comparison.allocations, paths, strict=True
    ):
        full = [module for module in allocation.modules if module.assignment == FULL]
        share = sum(module.parameters for module in full) / allocation.model.candidate_parameters
        order = "by rule" if chosen_by_rule(allocation) else f"{allocation.selection.direction} first"
        rows.append([letter, label, order, str(len(full)), f"{100 * share:.2f} %", str(path)])
    model, modules = comparison.allocations[0].model, comparison.allocations[0].modules
    note = (
        f"{len(modules)} candidate modules with {model.candidate_parameters:,} parameters; "
        f"{len(comparison.full_in_all)} are full in every allocation."
    )
    return Table(_KEY_TITLE, ["", "criterion", "order", "full", "parameters", "folder"], rows, [note])


def _matrix(comparison: Comparison, cell, diagonal) -> list[list[str]]:
    """Rows of a symmetric matrix; ``cell`` is given a pair, ``diagonal`` an allocation."""
    rows = []
    for i, letter in enumerate(comparison.letters):
        cells = [
            diagonal(allocation) if i == j else cell(comparison.pairs[min(i, j), max(i, j)])
            for j, allocation in enumerate(comparison.allocations)
        ]
        rows.append([letter, *cells])
    return rows


def _overlaps(comparison: Comparison) -> Table:
    rows = _matrix(
        comparison,
        lambda pair: f"{pair.overlap.shared} ({pair.overlap.chance:.1f})",
        lambda allocation: str(len(allocation.full_names)),
    )
    return Table(
        "Modules full in both",
        ["", *comparison.letters],
        rows,
        ["In brackets: what random choices of the same sizes share on average, |A| |B| / M."],
    )


def _orders(comparison: Comparison) -> Table:
    rows = _matrix(comparison, lambda pair: _number(pair.ranks.value), lambda allocation: "")
    notes = ["1 is the same order of preference for full fine-tuning, whichever end of its score a criterion prefers."]
    counts = [pair.ranks.modules for pair in comparison.pairs.values() if pair.ranks.value is not None]
    if counts:
        bound = 1.96 / math.sqrt(min(counts) - 1)
        over = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        notes.append(f"Over {over} modules; 95 of 100 unrelated orders lie within about ±{min(bound, 1.0):.2f}.")
    notes += dict.fromkeys(f"–: {pair.ranks.reason}." for pair in comparison.pairs.values() if pair.ranks.reason)
    return Table("Spearman rank correlation of the order of preference", ["", *comparison.letters], rows, notes)


def _measures(comparison: Comparison) -> Table:
    rows = []
    for title, pair in _titled_pairs(comparison):
        over = pair.overlap
        shares = (over.jaccard, over.of_smaller, over.jaccard_parameters, over.of_smaller_parameters)
        chances = [f"{over.chance:.1f}", f"{pair.chance_within_types:.1f}"]
        rows.append([title, str(over.shared), *chances, *map(_number, shares)])
    head = ["pair", "shared", "chance", "same types", "Jaccard", "of smaller", "Jaccard, par.", "of smaller, par."]
    notes = [
        "same types: what random choices with each allocation's number per type share on average.",
        "of smaller: shared, as a share of the smaller set. par.: modules counted by their parameters.",
    ]
    return Table("Every pair", head, rows, notes)


def _counts(comparison: Comparison) -> Table:
    rows = [
        [letter, *(str(len(names & set(allocation.full_names))) for names in comparison.groups.values())]
        for letter, allocation in zip(comparison.letters, comparison.allocations, strict=True)
    ]
    rows.append(["of", *(str(len(names)) for names in comparison.groups.values())])
    return Table("Full modules per component, type and depth third", ["", *_group_heads(comparison)], rows, [])


def _shared_by_group(comparison: Comparison) -> Table:
    rows = [
        [title, *(f"{over.shared}/{_chance(over.chance)}" for over in pair.groups.values())]
        for title, pair in _titled_pairs(comparison)
    ]
    return Table(
        "Shared per component, type and depth third",
        ["pair", *_group_heads(comparison)],
        rows,
        ["shared/chance, chance being that of random choices with these numbers within the group."],
    )


def _group_heads(comparison: Comparison) -> list[str]:
    return ["attn" if title == "attention" else title for title in comparison.groups]


def _titled_pairs(comparison: Comparison):
    letters = comparison.letters
    return [(f"{letters[i]} {letters[j]}", pair) for (i, j), pair in comparison.pairs.items()]


def _number(value: float | None) -> str:
    # Adding 0 turns the -0.0 of a rounded small negative into 0.0.
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"


def _chance(mean: float) -> str:
    """Short enough for twelve columns."""
    return f"{mean:.1f}" if mean < 9.95 else f"{mean:.0f}"
