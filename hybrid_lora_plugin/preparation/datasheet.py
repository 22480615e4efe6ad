"""What is said beside the data: where each row came from, what was left out and why, and the digests of the files.

Three files: ``datasheet.json``, the same as ``README.md``, and ``contaminated.jsonl`` with every question that an
evaluation set has too. The counts of every part add up to the rows that were read, or nothing is written.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.config_data import DataCommandConfig
from hybrid_lora_plugin.files import file_sha256
from hybrid_lora_plugin.preparation import mixture
from hybrid_lora_plugin.preparation.contamination import SHARED_BY_MOST, EvaluationSets
from hybrid_lora_plugin.preparation.parts import Part, PartialState
from hybrid_lora_plugin.preparation.sets import DataSet

#: Examples of each evaluation set that are shown; all are in ``contaminated.jsonl``.
_SHOWN = 3


class Datasheet:
    """Makes the record of a preparation."""

    def __init__(self, chosen: DataSet, config: DataCommandConfig, state: PartialState, found: EvaluationSets) -> None:
        self._set, self._config, self._state, self._found = chosen, config, state, found

    def record(self, folder: Path) -> dict:
        """What ``datasheet.json`` holds.

        Args:
            folder: with the finished Parquet files.
        """
        settings = self._state.settings
        elsewhere = ("output_dir", "source", *(() if self._set.source == mixture.SOURCE else ("configs", "code_tests")))
        options = {name: value for name, value in asdict(self._config).items() if name not in elsewhere}
        return {
            "set": self._set.title,
            "data_source": self._set.source,
            "begun": settings["date"],
            "hybrid_lora_plugin": settings["version"],
            "options": options | {"decontaminate": settings["decontaminate"], "evaluation": settings["evaluation"]},
            "source": settings["source"],
            "code_tests": settings["code_tests"],
            "rows": {name or self._set.title: self._account(name) for name in self._set.parts},
            "total": self._account(None),
            "contamination": {
                "ngram": self._found.n,
                "ngrams_shared_by_more_problems_are_wording": SHARED_BY_MOST,
                "sets": [self._contamination(evaluation.name) for evaluation in self._found.sets],
            },
            "evaluation": settings["files of evaluation"],
            "files": [self._file(file) for file in sorted(folder.glob("*.parquet"))],
            "notes": [*self._set.notes, *self._general_notes()],
        }

    def _parts(self, config: str | None) -> list[Part]:
        return [part for part in self._state.parts if config is None or part.config == config]

    def _account(self, config: str | None) -> dict:
        """Rows of one part of the set, or of all: read, kept and dropped."""
        parts = self._parts(config)
        kept, dropped, examples = Counter(), Counter(), {}
        for part in parts:
            kept.update(part.kept)
            dropped.update(part.dropped)
            examples = part.examples | examples
        read = sum(part.read for part in parts)
        if read != kept.total() + dropped.total():
            raise AssertionError(f"{read} rows were read, but {kept} and {dropped} accounted for")
        account = {"read": read, "kept": dict(sorted(kept.items())), "dropped": dict(sorted(dropped.items()))}
        return account if config is None else account | {"first_dropped": dict(sorted(examples.items()))}

    def _contamination(self, name: str) -> dict:
        (evaluation,) = (each for each in self._found.sets if each.name == name)
        hits = [
            (part.config, row, hit)
            for part in self._state.parts
            for row in part.contaminated
            for hit in row["hits"]
            if hit["benchmark"] == name
        ]
        return {
            "name": name,
            "origin": self._state.settings["files of decontaminate"][name],
            "problems": evaluation.problems,
            "ngrams": evaluation.ngrams,
            "wording": evaluation.wording,
            "rows": len(hits),
            "rows_with_the_same_question": sum(not hit["text"] for _, _, hit in hits),
            "problems_found": len({hit["identity"] for _, _, hit in hits}),
            "examples": [
                {"part": config, "row": row["row"], "question": row["question"][:200], **hit}
                for config, row, hit in hits[:_SHOWN]
            ],
        }

    def _file(self, file: Path) -> dict:
        from pyarrow import parquet

        rows = parquet.read_metadata(file).num_rows
        return {"name": file.name, "rows": rows, "bytes": file.stat().st_size, "sha256": file_sha256(file)}

    def _general_notes(self) -> list[str]:
        if self._set.split != "train":
            return ["For evaluation: nothing is held out and nothing is compared with other sets."]
        notes = [
            "Of several rows with one question the first is kept. Where a later one had another answer, that is "
            "counted by itself, and the answer that was kept is the more doubtful for it.",
            "Compared with the evaluation sets are questions, not responses.",
        ]
        if not self._found.sets:
            notes.append("NOT decontaminated: no evaluation set was given (decontaminate=[]).")
        if self._config.validation:
            notes.append(
                f"Held out is a question whose hash with seed {self._config.seed} falls below "
                f"{self._config.validation}: the same ones whatever the order, the limit and the other options."
            )
        return notes


def write_datasheet(folder: Path, sheet: dict, parts: list[Part]) -> None:
    """Write the three files.

    Args:
        folder: of the data.
        sheet: from ``Datasheet.record``.
        parts: with what was found contaminated.
    """
    (folder / "datasheet.json").write_text(json.dumps(sheet, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(as_markdown(sheet), encoding="utf-8")
    if sheet["contamination"]["sets"]:
        with (folder / "contaminated.jsonl").open("w", encoding="utf-8") as stream:
            for part in parts:
                for row in part.contaminated:
                    stream.write(json.dumps({"part": part.config, **row}, ensure_ascii=False) + "\n")


def as_markdown(sheet: dict) -> str:
    """A datasheet as a page."""
    lines = [
        f"# {sheet['set']}, prepared",
        "",
        f"Format `{sheet['options']['format']}`, from {sheet['data_source']}, begun {sheet['begun']}, by "
        f"hybrid-lora-data {sheet['hybrid_lora_plugin']}. The same, for programs, is in datasheet.json.",
        "",
        *(f"- {note}" for note in sheet["notes"]),
        "",
        "## Files",
        "",
        "| file | rows | bytes | SHA-256 |",
        "| --- | ---: | ---: | --- |",
        *(f"| {each['name']} | {each['rows']:,} | {each['bytes']:,} | `{each['sha256']}` |" for each in sheet["files"]),
        "",
        "## Rows",
        "",
    ]
    names, total = list(sheet["rows"]), sheet["total"]
    accounts = [*sheet["rows"].values(), total]
    lines += [f"| | {' | '.join([*names, 'together'])} |", f"| --- |{' ---: |' * len(accounts)}"]
    lines.append(_line("**read**", [account["read"] for account in accounts]))
    for split in total["kept"]:
        lines.append(_line(f"kept, {split}", [account["kept"].get(split, 0) for account in accounts]))
    for reason in total["dropped"]:
        lines.append(_line(f"dropped: {reason}", [account["dropped"].get(reason, 0) for account in accounts]))
    lines += ["", "The first row of each reason:", ""]
    for name, account in sheet["rows"].items():
        lines += [f"- {name}, {reason}: {_plain(text)}" for reason, text in account["first_dropped"].items()]
    lines += ["", "## Read from", ""]
    for name, origin in sheet["source"].items():
        lines += [f"- {name or sheet['set']}: {_origin(each)}" for each in origin]
    for name, origin in sheet["evaluation"].items():
        lines += [f"- {name}, for evaluation: {_origin(each)}" for each in origin]
    lines += [f"- tests for code: {_origin(each)}" for each in sheet["code_tests"] or ()]
    if sheet["contamination"]["sets"]:
        lines += _contamination_lines(sheet["contamination"])
    lines += ["", "## Options", "", *(f"- `{name}={_typed(value)}`" for name, value in sheet["options"].items()), ""]
    return "\n".join(lines)


def _contamination_lines(record: dict) -> list[str]:
    lines = [
        "",
        "## Left out because an evaluation set has the question",
        "",
        f"A question is left out if it shares {record['ngram']} words in a row with a problem, or is the same but for "
        f"case and spaces. What more than {record['ngrams_shared_by_more_problems_are_wording']} problems of a set "
        "share is its wording and does not count. One row may be found in several sets. All are in contaminated.jsonl.",
        "",
        "| set | problems | n-grams | of its wording | rows left out | of them the same question | problems found |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    columns = ("problems", "ngrams", "wording", "rows", "rows_with_the_same_question", "problems_found")
    lines += [_line(each["name"], [each[column] for column in columns]) for each in record["sets"]]
    lines.append("")
    for each in record["sets"]:
        for example in each["examples"]:
            shared = f"shares “{_plain(example['text'])}”" if example["text"] else "is the same question"
            row = f"{example['part']} row {example['row'] + 1}".strip()
            lines.append(f"- {each['name']}, problem {example['identity']}: {row} {shared}")
    return lines


def _line(name: str, values: list[int]) -> str:
    return f"| {name} | {' | '.join(f'{value:,}' for value in values)} |"


def _typed(value: Any) -> str:
    """A value as on a command line."""
    return f"[{','.join(value)}]" if isinstance(value, list) else "null" if value is None else str(value)


def _origin(origin: dict) -> str:
    what = f"commit `{origin['commit']}`" if "commit" in origin else f"SHA-256 `{origin['sha256']}`"
    return f"{origin['name']}, {what}"


def _plain(text: str) -> str:
    """A text that Markdown leaves alone, in one line."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")[:300]
