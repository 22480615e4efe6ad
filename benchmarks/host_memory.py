"""Page-locked host memory of a rollout worker for Qwen2.5 1.5B, 3B and 7B, computed from shapes.

    python -m benchmarks.host_memory [--tensor-parallel 1] [--workers 8] [--write PAGE]

Two things take it: a sleep at level 1, for which vLLM copies every piece of its memory pool that holds weights, and
``hybrid_lora.sync_base=pinned``. torch rounds each page-locked allocation up to a power of two and keeps it when it is
freed (read in torch 2.11, ``ATen/core/CachingHostAllocator.h``), so both are more than the weights. The pieces of the
pool are torch's segments on the device (``c10/cuda/CUDACachingAllocator``): one for each tensor from 10 MiB on, rounded
up to 2 MiB, and of 20 MiB and 2 MiB for the smaller ones together. Not looked at: what else vLLM allocates while it
loads, such as slots of adapters, or the states of a sampler in its second model runner. Nobody measured it on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.pages import write_page
from benchmarks.sync_sizes import SHAPES
from hybrid_lora_plugin.plan.rollout import page_locked, segments

BEGIN, END = "<!-- computed by benchmarks/host_memory.py -->", "<!-- end of the computed part -->"
MIB = 1 << 20
#: of bfloat16 and float16
WIDTH = 2


def checkpoint_shapes(shape: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of the linear modules of one layer of a Qwen2, by their last name."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (narrow, hidden),
        "v_proj": (narrow, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def engine_bytes(shape: dict, tensor_parallel: int) -> list[int]:
    """Bytes of every parameter of vLLM's model in one of its workers, q, k, v and gate, up packed into one each."""
    modules = {name: rows * columns for name, (rows, columns) in checkpoint_shapes(shape).items()}
    hidden = shape["hidden_size"]
    rows = {name: size[0] for name, size in checkpoint_shapes(shape).items()}
    packed = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    layer = [sum(modules[name] for name in names) // tensor_parallel for names in packed]
    layer += [sum(rows[name] for name in packed[0]) // tensor_parallel, hidden, hidden]
    table = shape["vocab_size"] * hidden // tensor_parallel
    every = layer * shape["num_hidden_layers"] + [table, hidden] + [table] * (not shape["tie_word_embeddings"])
    return [WIDTH * elements for elements in every]


def asleep(shape: dict, tensor_parallel: int = 1) -> tuple[int, int]:
    """Of one worker at level 1: bytes of its weights, and of the page-locked memory that holds them."""
    sizes = engine_bytes(shape, tensor_parallel)
    return sum(sizes), sum(map(page_locked, segments(sizes)))


def pinned_base(shape: dict) -> tuple[int, int]:
    """Of one worker with ``sync_base=pinned``, every linear module with LoRA: the same two numbers."""
    sizes = [WIDTH * rows * columns for rows, columns in checkpoint_shapes(shape).values()]
    layers = shape["num_hidden_layers"]
    return layers * sum(sizes), layers * sum(map(page_locked, sizes))


def table(tensor_parallel: int = 1, workers: int = 8) -> str:
    """The table as Markdown."""
    lines = [
        f"16 bits, tensor parallel {tensor_parallel}; in GB, for one worker and for the {workers} of a machine. "
        "`pinned` is for LoRA on every linear module; fully tuned ones need none.",
        "",
        "| model | weights of a worker | asleep at level 1 | of all workers | originals | `sync_base=pinned` | of all "
        "workers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, shape in SHAPES.items():
        numbers = []
        for held, taken in (asleep(shape, tensor_parallel), pinned_base(shape)):
            numbers += [f"{held / 1e9:.2f}", f"{taken / 1e9:.2f}", f"{workers * taken / 1e9:.0f}"]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or put it into a page; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--tensor-parallel", type=int, default=1, help="workers of a rollout engine (default: 1)")
    parser.add_argument("--workers", type=int, default=8, help="on a machine (default: 8)")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this page")
    chosen = parser.parse_args(arguments)
    text = table(chosen.tensor_parallel, chosen.workers)
    print(text)
    if chosen.write:
        write_page(chosen.write, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
