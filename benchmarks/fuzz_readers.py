"""Coverage-guided fuzzing of what reads people's files: artifacts, rows, headers of weights, records of checkpoints.

    python -m benchmarks.fuzz_readers [--seconds 60] [--seed 0] [--reader NAME ...] [--output FILE]

A file is drawn from a corpus, changed in a few bytes or words, and read. One that reaches a line of the readers that
none before reached joins the corpus. A reader may return or raise an error of this package; anything else is a finding,
and its file is kept beside the output. Lines are counted by ``sys.settrace`` in the modules named below and no others.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from hybrid_lora_plugin.allocation.storage import load_allocation
from hybrid_lora_plugin.checkpoint_tensors import stored_tensors
from hybrid_lora_plugin.errors import HybridLoraError
from hybrid_lora_plugin.probing.data.rows import read_rows
from hybrid_lora_plugin.training.checkpoint import load_description
from hybrid_lora_plugin.training.recorded_base import read_base_weights

PACKAGE = str(Path(load_allocation.__code__.co_filename).parent.parent)
#: parts of the package whose lines count
WATCHED = ("/allocation/", "/probing/data/", "/checkpoint_tensors.py", "/training/checkpoint.py", "/recorded_base.py")
WORDS = [
    b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"99999999999999999999", b'""', b"{}", b"[]", b"{",
    b"]", b'"', b"\\ud800", b"\xff", b"\x00", b"\n", b"\r\n", b"\xef\xbb\xbf", b'"schema_version": 1', b"/", b"..",
    b'"assignment": "full"', b'"messages"', b'"prompt"', b'"response"', b'"content"', b'"role"', b'"tool_calls"',
]  # fmt: skip


def of_artifact(folder: Path) -> None:
    load_allocation(folder / "allocation.json")


def of_rows(folder: Path) -> None:
    rows, _ = read_rows([str(folder / "rows.jsonl")])
    for _ in rows.read(range(len(rows))):
        pass


def of_header(folder: Path) -> None:
    stored_tensors(folder)


def of_description(folder: Path) -> None:
    load_description(folder)


def of_base(folder: Path) -> None:
    read_base_weights(folder)


#: reader, and the file that it reads
READERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "artifact": (of_artifact, "allocation.json"),
    "rows": (of_rows, "rows.jsonl"),
    "weights": (of_header, "model.safetensors"),
    "index": (of_header, "model.safetensors.index.json"),
    "description": (of_description, "trainables.json"),
    "base": (of_base, "base_weights.json"),
}


def seeds() -> dict[str, list[bytes]]:
    """Good files of each kind."""
    import torch
    from safetensors.torch import save

    from hybrid_lora_plugin.allocation.storage import allocation_text
    from tests.support.allocations import decide_for, draw_measurements
    from tests.support.tiny_models import tiny_qwen2_config

    allocation = decide_for(tiny_qwen2_config(50, layers=1), draw_measurements(7))
    old = Path("tests/data/allocation_v1/allocation.json")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "a", "response": "b"}, {"messages": turns}, {"prompt": turns[:1], "response": "b"}]
    description = {
        "base_model": "m", "rank": 4, "alpha": 8, "global_step": 1, "rollout_dtype": "bfloat16",
        "rounding_mode": "stochastic", "rounding_seed": 0, "base_dtype": None, "schema_version": 3,
    }  # fmt: skip
    index = {"metadata": {}, "weight_map": {"w": "model-1.safetensors"}}
    return {
        "artifact": [allocation_text(allocation).encode(), *([old.read_bytes()] if old.exists() else [])],
        "rows": ["".join(json.dumps(row) + "\n" for row in rows).encode()],
        "weights": [save({"w": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)})],
        "index": [json.dumps(index).encode()],
        "description": [json.dumps(description).encode()],
        "base": [json.dumps({"w": 16 * "0"}).encode()],
    }


def mutated(data: bytes, other: bytes, random_: random.Random) -> bytes:
    """One to four changes of a file: a byte, a word, a part removed, repeated or taken from another file."""
    for _ in range(random_.randint(1, 4)):
        at = random_.randint(0, len(data))
        end = min(len(data), at + random_.choice((1, 2, 8, 64)))
        how = random_.randrange(6)
        if how == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << random_.randrange(8))]) + data[at + 1 :]
        elif how == 1:
            data = data[:at] + random_.choice(WORDS) + data[end:]
        elif how == 2:
            data = data[:at] + data[end:]
        elif how == 3:
            data = data[:end] + data[at:]
        elif how == 4:
            start = random_.randint(0, len(other))
            data = data[:at] + other[start : start + 40] + data[end:]
        else:
            data = (
                data[:at]
                if random_.random() < 0.2
                else data[:at] + random_.randbytes(random_.randint(1, 4)) + data[at:]
            )
    return data


class Lines:
    """Lines of the watched modules that ran while entered."""

    def __enter__(self) -> Lines:
        self.seen: set[tuple[str, int]] = set()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if name.startswith(PACKAGE) and any(part in name for part in WATCHED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def fuzz(reader: str, corpus: list[bytes], seconds: float, seed: int, kept: Path) -> dict[str, Any]:
    """Fuzz one reader for some seconds; returns counts and what it found."""
    read, name = READERS[reader]
    random_, reached, findings = random.Random(f"{seed}/{reader}"), set(), {}
    runs = refused = 0
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        file = Path(place) / name
        queue = list(corpus)
        while time.monotonic() < end:
            data = queue.pop() if queue else mutated(random_.choice(corpus), random_.choice(corpus), random_)
            file.write_bytes(data)
            runs += 1
            with Lines() as lines:
                try:
                    read(Path(place))
                except HybridLoraError as error:
                    refused += 1
                    if "\n" in str(error):
                        findings.setdefault("a refusal of several lines", data)
                except Exception as error:
                    sys.settrace(None)
                    where = error.__traceback__
                    while where.tb_next:
                        where = where.tb_next
                    findings.setdefault(
                        f"{type(error).__name__} in {where.tb_frame.f_code.co_name}: {error}"[:160], data
                    )
            if new := lines.seen - reached:
                reached |= new
                if data not in corpus:
                    corpus.append(data)
    for number, data in enumerate(findings.values()):
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{reader}-{number}").write_bytes(data)
    return {
        "runs": runs,
        "refused": refused,
        "corpus": len(corpus),
        "lines": len(reached),
        "findings": sorted(findings),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="*", choices=READERS, default=list(READERS))
    parser.add_argument("--output", type=Path, default=Path("fuzz.json"))
    arguments = parser.parse_args()
    given = seeds()
    results = {}
    for reader in arguments.reader:
        results[reader] = fuzz(
            reader, given[reader], arguments.seconds, arguments.seed, arguments.output.with_suffix(".findings")
        )
        print(reader, json.dumps(results[reader]), flush=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["findings"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
