"""Host memory of a probe's base on several ranks: every rank reads the checkpoint, or the first alone.

    python -m benchmarks.probe_loading

For each way a group of gloo ranks brings a random model to its sharded place. Counted is the memory that a rank has for
itself (resident less what files back), sampled while it loads, above what the process had before, in float32 models. On
this device the shards are on the host too, one model for all ranks. A checkpoint in the type that is computed in is
mapped and not copied; one in bfloat16 is copied by whoever reads it. About three minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import ModelConfig
from hybrid_lora_plugin.probing.distributed import finish, place, start
from hybrid_lora_plugin.probing.layers import attach
from hybrid_lora_plugin.probing.loading import load_model
from hybrid_lora_plugin.probing.shared_base import load_base, sent_by_first

WAYS = ("every rank", "first alone")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def private_bytes() -> int:
    """Resident bytes of this process that no file backs."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE


class Peak:
    """The largest ``private_bytes`` while it is entered, above those at its beginning."""

    def __enter__(self) -> Peak:
        self._before, self._over, self.bytes = private_bytes(), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, private_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, private_bytes() - self._before)


def as_rank(folder: str, way: str) -> None:
    """Body of one rank; the first prints each rank's peak and seconds."""
    torch.set_num_threads(1)
    ranks, config = start(), ModelConfig(path=folder, dtype="float32")
    distributed.barrier()
    begun = time.perf_counter()
    with Peak() as peak:
        model = load_model(config, ranks.device) if way == "every rank" else load_base(config, ranks)
        candidates = find_candidates(model)
        layers = attach(model, candidates, 1, seed=0)
        replicated = [parameter for layer in layers.values() for parameter in (layer.A, layer.B, layer.e, layer.alpha)]
        shared = {} if way == "every rank" else {"around": partial(sent_by_first, replicated=replicated, ranks=ranks)}
        place(model, candidates, replicated, ranks, **shared)
    taken = time.perf_counter() - begun
    peaks: list = [None] * ranks.size
    distributed.all_gather_object(peaks, peak.bytes)
    if ranks.first:
        print(json.dumps({"bytes": peaks, "seconds": taken}), flush=True)
    finish(ranks)


def measured(folder: str, way: str, ranks: int) -> dict:
    """What ``as_rank`` printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               "-m", "benchmarks.probe_loading", "--folder", folder, "--as-rank", way]  # fmt: skip
    # So that what is freed is given back at once, as it is of the larger tensors of larger models.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def make_model(folder: str, hidden: int, layers: int, dtype: torch.dtype) -> int:
    """Save a random Qwen2 in a type; returns its bytes in float32."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16384,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return sum(4 * parameter.numel() for parameter in model.parameters())


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_loading", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--as-rank", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.as_rank:
        as_rank(given.folder, given.as_rank)
        return 0
    print(f"torch {torch.__version__}, {given.layers} layers of width {given.hidden}\n")
    print("| stored in | MB in float32 | ranks | who reads | all ranks, in models | first | most of the others | s |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            size = make_model(folder, given.hidden, given.layers, dtype)
            for ranks, way in itertools.product(given.ranks, WAYS):
                found = measured(folder, way, ranks)
                first, *others = (value / size for value in found["bytes"])
                print(
                    f"| {str(dtype).removeprefix('torch.')} | {size / 1e6:.0f} | {ranks} | {way} | "
                    f"{first + sum(others):.2f} | {first:.2f} | {max(others):.2f} | {found['seconds']:.1f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
