"""What is kept between an interruption and the same command: finished parts, each whole or not there.

In ``OUTPUT_DIR.partial``:

    settings.json       what is prepared: another thing is refused, not mixed in
    00012.json          part 12 is finished; rows that it read, dropped and found contaminated
    00012.questions     16 bytes for each question that it kept, and 8 of its answer
    00012.train.parquet, 00012.validation.parquet

Parts end at fixed row numbers, so an interruption changes no byte of the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.files import complete_file
from hybrid_lora_plugin.preparation.table import write_rows

#: Rows read in one part; also the rows of a group of the final files, at most.
PART_ROWS = 1000


@dataclass
class Part:
    """What became of the rows of one part.

    Attributes:
        config: the part of the data set that it is of.
        read: rows.
        ended: whether there are no more behind them.
        kept: split -> rows.
        dropped: reason -> rows.
        examples: reason -> the first row dropped for it, in words.
        contaminated: ``{row, question, hits}`` of each row that an evaluation set has too.
    """

    config: str
    read: int = 0
    ended: bool = False
    kept: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    contaminated: list[dict] = field(default_factory=list)


class PartialState:
    """The finished parts of one preparation.

    Attributes:
        folder: where they are.
        settings: of the preparation; those of its beginning where it goes on.
        parts: the finished ones, in order.
        resumed: whether there were some.
    """

    def __init__(self, folder: Path, settings: dict, free: tuple[str, ...] = ()) -> None:
        """Begin, or go on.

        Args:
            folder: ``OUTPUT_DIR.partial``.
            settings: everything that the result depends on.
            free: names among them that may differ.

        Raises:
            ConfigurationError: the folder is of another preparation, or is damaged.
        """
        self.folder, self.settings, self.parts = folder, settings, []
        file = folder / "settings.json"
        folder.mkdir(parents=True, exist_ok=True)
        # Before the first part nothing is lost by other settings.
        if file.exists() and self._file("json").exists():
            kept = self._read(file)
            different = sorted(name for name in {*kept, *settings} - {*free} if kept.get(name) != settings.get(name))
            if different:
                raise ConfigurationError(
                    f"output_dir: {folder} holds an unfinished preparation with another {' and '.join(different)}; "
                    f"give what it was begun with, or remove that folder to begin anew"
                )
            self.settings = kept
        elif {each.name.removesuffix(".tmp") for each in folder.iterdir() if not _is_of_part(each)} - {file.name}:
            raise ConfigurationError(f"output_dir: {folder} is no preparation that can go on; remove it")
        else:
            with complete_file(file) as unfinished:
                unfinished.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        while (finished := self._file("json")).exists():
            try:
                self.parts.append(Part(**self._read(finished)))
            except TypeError as error:
                raise ConfigurationError(f"output_dir: {finished} is damaged ({error}); remove {folder}") from error
        self.resumed = bool(self.parts)

    def questions(self) -> Iterator[tuple[bytes, bytes]]:
        """Question and answer, 16 and 8 bytes, of every row that the finished parts kept."""
        for number, _ in enumerate(self.parts):
            known = self._file("questions", number).read_bytes()
            yield from ((known[at : at + 16], known[at + 16 : at + 24]) for at in range(0, len(known), 24))

    def add(self, part: Part, rows: dict[str, list[dict]], questions: list[tuple[bytes, bytes]], form: str) -> None:
        """Finish a part.

        Args:
            part: what became of its rows.
            rows: split -> rows to write.
            questions: of these, as ``questions`` gives them.
            form: of the rows, ``rl`` or ``sft``.
        """
        for split, some in rows.items():
            if some:
                write_rows(self._file(f"{split}.parquet"), some, form)
        with complete_file(self._file("questions")) as unfinished:
            unfinished.write_bytes(b"".join(question + answer for question, answer in questions))
        # Last: a part is finished when this is there.
        with complete_file(self._file("json")) as unfinished:
            unfinished.write_text(json.dumps(asdict(part), ensure_ascii=False), encoding="utf-8")
        self.parts.append(part)

    def files(self, split: str) -> list[Path]:
        """The Parquet files of a split, in order."""
        found = (
            self._file(f"{split}.parquet", number) for number, part in enumerate(self.parts) if part.kept.get(split)
        )
        return list(found)

    def _file(self, ending: str, number: int | None = None) -> Path:
        return self.folder / f"{len(self.parts) if number is None else number:05d}.{ending}"

    def _read(self, file: Path) -> dict:
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigurationError(f"output_dir: {file} is damaged ({error}); remove {self.folder}") from error
        if not isinstance(value, dict):
            raise ConfigurationError(f"output_dir: {file} is damaged; remove {self.folder}")
        return value


def _is_of_part(file: Path) -> bool:
    return file.name[:5].isdigit() and file.name[5:6] == "."
