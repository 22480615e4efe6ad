"""What a coverage-guided fuzz of the row readers calls, for a machine with time; the tests call it with some damage.

Any file is read or refused by a ``ProbeError`` of one line, and any row that is read becomes tokens or is refused so.
Anything else is a crash, which libFuzzer keeps as a file. With atheris, which is not needed for anything else:

    import sys, atheris
    with atheris.instrument_imports(include=["hybrid_lora_plugin.probing.data"]):
        from tests.support.fuzz_rows import one_input, seed_folder
    atheris.Setup([*sys.argv, seed_folder()], one_input)
    atheris.Fuzz()
"""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import cache
from pathlib import Path

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.rows import read_rows
from hybrid_lora_plugin.probing.data.tokens import RowTokenizer
from tests.support.tiny_models import make_char_tokenizer

NAMES = ("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.zst", "rows.parquet")


def seeds() -> list[bytes]:
    """An input of each form of file, to begin with."""
    import pyarrow
    from pyarrow import parquet

    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2", "tool_calls": [call]}]
    rows = [{"messages": turns * 2}, {"prompt": "a", "response": "b"}, {"prompt": turns[:1], "response": "<think>c"}]
    lines, array = "\n".join(map(json.dumps, rows)).encode(), json.dumps(rows, indent=1).encode()
    packed, table = pyarrow.BufferOutputStream(), pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(array)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), table)
    forms = [lines, array, gzip.compress(lines), packed.getvalue().to_pybytes(), table.getvalue().to_pybytes()]
    return [bytes([place]) + form for place, form in enumerate(forms)]


def seed_folder() -> str:
    """A folder with the seeds, a file each."""
    folder = Path(tempfile.mkdtemp())
    for place, seed in enumerate(seeds()):
        (folder / str(place)).write_bytes(seed)
    return str(folder)


@cache
def _setting():
    return Path(tempfile.mkdtemp()), make_char_tokenizer()


def one_input(data: bytes) -> None:
    """Read one file.

    Args:
        data: the number of its form in ``NAMES``, one byte, and its content.
    """
    folder, tokenizer = _setting()
    file = folder / NAMES[data[0] % len(NAMES) if data else 0]
    file.write_bytes(data[1:])
    try:
        rows, _ = read_rows([str(file)])
        tokens_of = RowTokenizer(tokenizer, train_on="all")
        for _, row in rows.read(range(len(rows))):
            tokens_of(row)
    except ProbeError as error:
        assert "\n" not in str(error), repr(str(error))
