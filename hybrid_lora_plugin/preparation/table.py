"""Rows and columns of the files that are written: of verl's reinforcement learning, and of the probe and SFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_lora_plugin.files import complete_file
from hybrid_lora_plugin.tasks.problem import Problem
from hybrid_lora_plugin.tasks.prompts import messages

if TYPE_CHECKING:
    import pyarrow

#: verl's column ``ability``, by kind; of a part of Mixture-of-Thoughts it is the part.
_ABILITIES = {"math": "math", "integer": "math", "letter": "multiple_choice", "code": "code"}


def schema(form: str) -> pyarrow.Schema:
    """The columns of a form, ``rl`` or ``sft``: the same whatever the rows, so that files can be read together."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int64()
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    about = [("split", text), ("index", number), ("identity", text), ("part", text), ("origin", text)]
    if form == "sft":
        return pyarrow.schema([("messages", turns), ("data_source", text), ("extra_info", pyarrow.struct(about))])
    return pyarrow.schema(
        [
            ("prompt", turns),
            ("data_source", text),
            ("ability", text),
            ("reward_model", pyarrow.struct([("style", text), ("ground_truth", text)])),
            (
                "extra_info",
                pyarrow.struct([*about, ("kind", text), ("options_count", number)]),
            ),
        ]
    )


def rl_row(problem: Problem, style: str, split: str, index: int, part: str = "", origin: str = "") -> dict:
    """A problem as verl reads it.

    Args:
        problem: with an answer that can be checked.
        style: of the prompt, ``io`` or ``cot``.
        split: ``train``, ``validation`` or ``test``.
        index: of its row in what was read.
        part: of the data set that it is from, where that has some.
        origin: what the data set says about where it has the row from.
    """
    return {
        "prompt": messages(problem, style),
        "data_source": problem.source,
        "ability": part or _ABILITIES[problem.kind],
        "reward_model": {"style": "rule", "ground_truth": problem.gold},
        "extra_info": {
            "split": split,
            "index": index,
            "identity": problem.identity,
            "part": part,
            "origin": origin,
            "kind": problem.kind,
            "options_count": len(problem.options),
        },
    }


def sft_row(
    turns: list[dict], source: str, identity: str, split: str, index: int, part: str = "", origin: str = ""
) -> dict:
    """A conversation as the probe and verl's SFT read it; arguments as of ``rl_row``."""
    about = {"split": split, "index": index, "identity": identity, "part": part, "origin": origin}
    return {"messages": turns, "data_source": source, "extra_info": about}


def write_rows(file: Path, rows: list[dict], form: str) -> None:
    """A Parquet file with one row group, there whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    with complete_file(file) as unfinished:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema(form)), unfinished, compression="zstd")


def join_files(files: list[Path], file: Path, form: str) -> int:
    """One Parquet file of several, a row group of each at a time; returns its rows."""
    from pyarrow import parquet

    rows = 0
    with parquet.ParquetWriter(file, schema(form), compression="zstd") as writer:
        for part in files:
            table = parquet.read_table(part, schema=schema(form))
            writer.write_table(table)
            rows += table.num_rows
    return rows
