"""A coverage-guided fuzz of the row readers, for a machine with time; the tests draw a few hundred cases of the kind.

    pip install atheris
    python -m tests.support.fuzz_rows -max_total_time=600 [libFuzzer options]

Any file is read or refused by a ``ProbeError`` of one line, and any row that is read becomes tokens or is refused so.
Anything else is a crash, which libFuzzer keeps as a file.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

NAMES = ("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.zst", "rows.parquet")


def main() -> None:
    """Fuzz until libFuzzer ends."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["hybrid_lora_plugin.probing.data"]):
        from hybrid_lora_plugin.errors import ProbeError
        from hybrid_lora_plugin.probing.data.rows import read_rows
        from hybrid_lora_plugin.probing.data.tokens import RowTokenizer
    from tests.support.tiny_models import make_char_tokenizer

    folder, tokenizer = Path(tempfile.mkdtemp()), make_char_tokenizer()

    def one_input(data: bytes) -> None:
        name = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
        (folder / name).write_bytes(data[1:])
        try:
            rows, _ = read_rows([str(folder / name)])
            tokens_of = RowTokenizer(tokenizer, train_on="all")
            for _, row in rows.read(range(len(rows))):
                tokens_of(row)
        except ProbeError as error:
            assert "\n" not in str(error), repr(str(error))

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
