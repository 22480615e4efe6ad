"""Rows of Mixture-of-Thoughts in its exact columns; questions and answers are our own."""

from __future__ import annotations

import json
from pathlib import Path

ORIGINS = {
    "math": "open-r1/OpenR1-Math-220k",
    "code": "open-r1/codeforces-cots",
    "science": "nvidia/Llama-Nemotron-Post-Training-Dataset",
}
_NAMES = ("Ada", "Emmy", "Sonja", "Maryam", "Sophie", "Grace", "Hypatia", "Karen")


def row(question: str, answer: str, part: str = "math", thoughts: str = "Let me see. Perhaps \\boxed{0}?") -> dict:
    """A row whose response thinks first and ends with ``answer``."""
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{answer}"},
    ]
    return {"messages": turns, "num_tokens": len(question) + len(answer), "source": ORIGINS[part]}


def sums(count: int, start: int = 0) -> list[dict]:
    """As many rows of math, each with another question and its right answer."""
    return [
        row(
            f"{_NAMES[n % len(_NAMES)]} has {n} marbles and finds {n % 7 + 2} bags of {n % 5 + 3} marbles on day {n}. "
            "How many marbles are there then?",
            f"So it is $\\boxed{{{n + (n % 7 + 2) * (n % 5 + 3)}}}$.",
        )
        for n in range(start, start + count)
    ]


CHOICE = "Which gas do plants take in?\nA: Oxygen\nB: Nitrogen\nC: Carbon dioxide,\nas all know\nD: Argon"

#: (part, row, what becomes of it): the reason for which it is dropped, or its kind, gold answer and options.
CASES = [
    ("math", row("How much is 6 times 7?", "It is $\\boxed{42}$."), ("math", "42", 0)),
    ("math", row("Halve three.", "First \\boxed{2}, no: $\\boxed{\\frac{3}{2}}$"), ("math", "\\frac{3}{2}", 0)),
    ("math", row("How much is 2 + 2?", "It is 4."), "no boxed answer"),
    ("math", row("How much is 2 + 3?", "It is \\boxed{5"), "no boxed answer"),
    ("math", row("Show it.", "As \\boxed{\\text{shown above by induction, which holds}}."), "an answer in words"),
    ("math", row("Divide one by nought.", "\\boxed{\\frac{1}{0}}"), "an answer that cannot be checked"),
    ("math", row("Who came first?", "\\boxed{\\text{Evelyn}}"), ("math", "\\text{Evelyn}", 0)),
    ("math", row("List them.", "\\boxed{" + "1, " * 90 + "2}"), "a long answer"),
    ("math", row("How much is 1 + 1? Answer as \\boxed{} here.", "\\boxed{2}"), "an instruction that is not known"),
    ("math", row("Pick. " + CHOICE, "\\boxed{(C)}"), ("letter", "C", 4)),
    ("math", row("Is it (A) 1 or (B) 2?", "\\boxed{B}"), "a letter without options"),
    ("math", row("Which?\nA. 1\nB. 2", "\\boxed{2}"), ("math", "2", 0)),
    ("science", row(CHOICE, "Thus \\boxed{C}", "science"), ("letter", "C", 4)),
    ("science", row("Again. " + CHOICE, "\\boxed{\\text{(B)}}", "science"), ("letter", "B", 4)),
    ("science", row("Or. " + CHOICE, "\\boxed{Nitrogen}", "science"), ("letter", "B", 4)),
    ("science", row("But. " + CHOICE, "\\boxed{E}", "science"), "an answer that is no option"),
    ("science", row("Which one is it?", "\\boxed{C}", "science"), "a letter without options"),
    ("science", row("What is the mass in kg?", "\\boxed{12.5}", "science"), ("math", "12.5", 0)),
    ("science", row("Tell of it.", "\\boxed{" + "x" * 70 + "}", "science"), "a long answer"),
    ("code", row("Write a program that sorts.", "```cpp\nint main() {}\n```", "code"), "code without tests"),
    ("math", {"messages": None, "num_tokens": 0, "source": ""}, "no conversation"),
    (
        "math",
        {"messages": [{"role": "user", "content": "Hm?"}], "num_tokens": 1, "source": ""},
        "no question and answer",
    ),
    (
        "math",
        {"messages": [*row("a", "\\boxed{1}")["messages"], *row("b", "\\boxed{1}")["messages"]]},
        "more than one question",
    ),
    ("math", row("Half \ud800 of it?", "\\boxed{1}"), "half a character"),
    ("math", ["no object"], "no conversation"),
]


def write_lines(file: Path, rows: list) -> Path:
    """A JSONL file of rows, in a folder that is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[dict], group: int = 100) -> Path:
    """A Parquet file of rows, ``group`` in a row group, as the hub has them."""
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)
    return file
