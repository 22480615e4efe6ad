"""What stochastic rounding costs the trainer's side of a ``merge`` sync: merging, rounding, digests, one copy.

    python -m benchmarks.rounding_cost [--layers 30] [--hidden 576] [--rounds 9] [--threads 1]

A random Qwen2 of SmolLM2-135M's shape on the CPU. A round draws the whole stream once with each rounding and type, in
another order each time; figures are ratios within a round. The sync's other side, which loads and reads back, is the
same for all, so a whole sync costs less more than this says.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.sync_sizes import draw_allocation
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.wire import OutgoingWeights, SyncHeader
from hybrid_lora_plugin.training.apply import apply_allocation, trainable_groups
from hybrid_lora_plugin.training.arrival import Arrival
from hybrid_lora_plugin.training.rounding import Rounding

RANK, ALPHA = 16, 32
#: type, rounding, whether the arrived update is measured
VARIANTS = [
    ("float32", "nearest", True),
    ("bfloat16", "nearest", False),
    ("bfloat16", "nearest", True),
    ("bfloat16", "stochastic", True),
    ("float16", "nearest", True),
    ("float16", "stochastic", True),
]


def hybrid_model(layers: int, hidden: int) -> torch.nn.Module:
    """A hybrid model in bf16 whose updates are as small as those of a few steps."""
    config = Qwen2Config(
        vocab_size=49152, hidden_size=hidden, intermediate_size=round(hidden * 8 / 3), num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 192), tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    allocation = draw_allocation(config, "random", rank=RANK, ratio=0.1, seed=0)
    model = apply_allocation(model, allocation, rank=RANK, alpha=ALPHA)
    with torch.no_grad():
        for group in trainable_groups(model).values():
            for _, parameter in group:
                parameter += 2e-5 * torch.randn(parameter.shape)
    return model


def draw(model, dtype: str, rounding: str, measured: bool, buffer: torch.Tensor) -> float:
    """Seconds to draw one whole sync and copy it into a transfer buffer."""
    header = SyncHeader(run="r", number=1, mode="merge", dtype=dtype, digests=True)
    target, arrival = getattr(torch, dtype), Arrival(1) if measured else None
    started = time.perf_counter()
    plan = SyncPlan(ALPHA / RANK, target, "cpu", Rounding(rounding), arrival)
    tensors = sync_mode("merge").outgoing(model, plan)
    for _, tensor in OutgoingWeights(header, tensors):
        data = tensor.reshape(-1).view(torch.uint8)
        buffer[: len(data)].copy_(data)
    return time.perf_counter() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("layers", 30), ("hidden", 576), ("rounds", 9), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = hybrid_model(arguments.layers, arguments.hidden)
    buffer = torch.empty(4 * 49152 * arguments.hidden, dtype=torch.uint8)
    seconds = {variant: [] for variant in VARIANTS}
    for round_ in range(arguments.rounds + 1):
        for variant in VARIANTS[:: -1 if round_ % 2 else 1]:
            took = draw(model, *variant, buffer)
            if round_:  # the first has everything to load and to hash
                seconds[variant].append(took)
    print("| rounding | s (median) | against the same type to nearest |\n| --- | ---: | ---: |")
    for variant, values in seconds.items():
        dtype, rounding, measured = variant
        plain = seconds[(dtype, "nearest", True)]
        ratio = statistics.median(a / b for a, b in zip(values, plain, strict=True))
        label = f"{dtype}, {rounding}" + ("" if measured else ", arrived update not measured")
        print(f"| {label} | {statistics.median(values):.3f} | {ratio:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
