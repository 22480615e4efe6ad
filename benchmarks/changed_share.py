"""Which share of merged weights one optimizer step changes in the rollout's type, by how large the weights are.

    python -m benchmarks.changed_share [--write docs/sync-cost.md]

``sparse_merge`` sends what changed. A step moves a weight by a fixed amount, the learning rate's, and it changes with a
probability of that over the type's step there, which is proportional to the weight: small weights change more often.
Computed by the plugin's own rounding on random matrices: normal weights, LoRA of rank 16 as PEFT begins it, and the
first step of Adam, which moves each entry of B by the whole learning rate, here with random signs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.pages import write_page
from hybrid_lora_plugin.training.learning_rates import PAPER
from hybrid_lora_plugin.training.rounding import Rounding, round_weight

DEVIATIONS, WIDTHS, DTYPES = (0.02, 0.03, 0.05, 0.1, 0.2), (576, 1536, 3584), (torch.bfloat16, torch.float16)
RANK, SCALING, ROWS = 16, 2.0, 512
BEGIN, END = "<!-- computed by benchmarks/changed_share.py -->", "<!-- end of the shares -->"


def changed_share(deviation: float, width: int, dtype: torch.dtype, rate: float = PAPER["lora"]) -> float:
    """Share of [512, width] normal weights of this standard deviation that the first step changes in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(ROWS, width, generator=generator) * deviation).to(dtype)
    # PEFT's kaiming_uniform_ with a = sqrt(5): uniform within 1/sqrt(d_in).
    a = (torch.rand(RANK, width, generator=generator) * 2 - 1) / width**0.5
    b = torch.randn(ROWS, RANK, generator=generator).sign() * rate
    merged = round_weight("weight", SCALING * b @ a, dtype, Rounding("stochastic"), base)
    return (merged != base).float().mean().item()


def table() -> str:
    lines = [
        f"| weights' standard deviation | {' | '.join(f'd_in {w:,}, {d}' for d in DTYPES for w in WIDTHS)} |".replace(
            "torch.", ""
        ),
        "| ---: |" + " ---: |" * len(WIDTHS) * len(DTYPES),
    ]
    for deviation in DEVIATIONS:
        shares = (changed_share(deviation, width, dtype) for dtype in DTYPES for width in WIDTHS)
        lines.append(f"| {deviation:g} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, help="put the table between the markers of this page")
    arguments = parser.parse_args(argv)
    if arguments.write:
        write_page(arguments.write, table(), BEGIN, END)
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
