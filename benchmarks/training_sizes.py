"""What training Qwen2.5 1.5B to 72B holds on each of 8 to 1024 GPUs and how long a step takes, computed.

    python -m benchmarks.training_sizes [--ratio 0.1] [--rank 16] [--seed 0] [--teraflops 312] [--utilisation 0.4]
                                        [--bandwidth 25] [--write docs/training-cost.md]

Memory follows from the shapes alone, by the formula that ``benchmarks/training_cost.py`` is measured against. Time
needs
two figures of the machine: what share of its peak it computes at, and how fast it gathers; both are given, not
    measured.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2Config

from benchmarks.pages import write_page
from benchmarks.sync_sizes import SHAPES, PaperModel
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.training.memory import least_bytes

#: Hugging Face's config.json of Qwen/Qwen2.5-*-Instruct, what decides shapes
LARGER = {
    "Qwen2.5-32B": dict(
        hidden_size=5120, num_hidden_layers=64, intermediate_size=27648, num_attention_heads=40, num_key_value_heads=8,
        vocab_size=152064, tie_word_embeddings=False,
    ),
    "Qwen2.5-72B": dict(
        hidden_size=8192, num_hidden_layers=80, intermediate_size=29568, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
BEGIN, END = "<!-- computed by benchmarks/training_sizes.py -->", "<!-- end of the computed part -->"


@dataclass(frozen=True)
class Machine:
    """Figures of one GPU.

    Attributes:
        teraflops: peak in bf16.
        utilisation: share of it that training computes at.
        bandwidth: GB/s at which a GPU receives in an all-gather over all of them.
    """

    teraflops: float
    utilisation: float
    bandwidth: float


@dataclass(frozen=True)
class Sizes:
    """A model's counts.

    Attributes:
        counts: frozen, full and adapter parameters.
        embedding: of ``frozen``, the parameters of the embedding and of the head, where that has its own.
        head: parameters of the product that gives the logits.
        lora_everywhere: adapter parameters were there an adapter on every candidate.
        layers: decoder layers.
    """

    counts: ParameterCounts
    embedding: int
    head: int
    lora_everywhere: int
    layers: int

    @property
    def plain(self) -> int:
        """Parameters of the plain model."""
        return self.counts.frozen + self.counts.full

    @property
    def layer(self) -> float:
        """Parameters of one decoder layer with its adapters."""
        return (self.counts.total - self.embedding) / self.layers


def sizes_of(name: str, shape: dict, *, rank: int, ratio: float, seed: int) -> Sizes:
    """Counts of the model of a shape under a drawn allocation."""
    config = Qwen2Config(**shape)
    head = config.vocab_size * config.hidden_size
    model = PaperModel(name, config, rank=rank, ratio=ratio, seed=seed)
    everywhere = sum(rank * (module.in_features + module.out_features) for module in model.allocation.modules)
    embedding = head if config.tie_word_embeddings else 2 * head
    return Sizes(model.counts, embedding, head, everywhere, config.num_hidden_layers)


def state_bytes(sizes: Sizes, gpus: int) -> dict[str, float]:
    """Bytes on each GPU between steps: ours, verl's LoRA with its fp32 base, and full fine-tuning.

    Full fine-tuning holds weight, gradient and two moments in fp32; verl's second model, its reference policy, lies in
    the memory of the host.
    """
    return {
        "hybrid": least_bytes(sizes.counts, gpus).total,
        "lora": (4 * sizes.plain + 16 * sizes.lora_everywhere) / gpus,
        "full": 16 * sizes.plain / gpus,
    }


def passing_bytes(sizes: Sizes) -> float:
    """What comes on top for a while, activations left out: the head and two layers gathered in bf16."""
    return 2 * (sizes.head + 2 * sizes.layer)


def flops_per_token(sizes: Sizes, checkpointing: bool = True) -> dict[str, float]:
    """Floating-point operations of an actor update for each token, attention's products of two activations left out.

    Forward and activation gradients take 2 for each parameter, weight gradients 2 for each that trains. Recomputing
    activations adds a forward pass of the decoder layers. The embedding is a look-up, the head a product.
    """
    count, inside = sizes.counts, sizes.plain - sizes.embedding
    again = int(checkpointing)
    return {
        "hybrid": 2 * ((2 + again) * (inside + count.lora) + 2 * sizes.head + count.full + count.lora),
        "full": 2 * ((3 + again) * inside + 3 * sizes.head),
    }


def gathered_bytes(sizes: Sizes) -> float:
    """Bytes each GPU receives for one micro-batch: all weights in bf16, forward and backward, and the gradients."""
    return 2 * 2 * sizes.counts.total + 4 * (sizes.counts.full + sizes.counts.lora)


def seconds_per_step(sizes: Sizes, tokens: int, gpus: int, micro_batches: int, machine: Machine) -> float:
    """An actor update over ``tokens`` tokens, communication hidden behind computation or the other way round."""
    compute = flops_per_token(sizes)["hybrid"] * tokens / gpus / (machine.teraflops * 1e12 * machine.utilisation)
    return max(compute, micro_batches * gathered_bytes(sizes) / (machine.bandwidth * 1e9))


def tables(models: dict[str, Sizes], machine: Machine, tokens: int, micro_tokens: int) -> str:
    """Everything as Markdown."""
    lines = [
        "| model | frozen | fully tuned F | adapters A | gathered, GB | FLOPs a token ÷ full fine-tuning |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, sizes in models.items():
        flops, count = flops_per_token(sizes), sizes.counts
        lines.append(
            f"| {name} | {count.frozen:,} | {count.full:,} | {count.lora:,} | {passing_bytes(sizes) / 1e9:.2f} | "
            f"{flops['hybrid'] / flops['full']:.3f} |"
        )
    heads = " | ".join(str(gpus) for gpus in GPUS)
    lines += ["", f"| GB on each of … GPUs | {heads} |", "| --- |" + " ---: |" * len(GPUS)]
    labels = {"hybrid": "Hybrid-LoRA", "lora": "verl's LoRA, fp32 base", "full": "full fine-tuning"}
    for name, sizes in models.items():
        for variant, label in labels.items():
            cells = " | ".join(f"{state_bytes(sizes, gpus)[variant] / 1e9:.2f}" for gpus in GPUS)
            lines.append(f"| {name}, {label} | {cells} |")
    lines += ["", f"| seconds for {tokens:,} tokens on … GPUs | {heads} |", "| --- |" + " ---: |" * len(GPUS)]
    for name, sizes in models.items():
        cells = []
        for gpus in GPUS:
            micro_batches = max(1, round(tokens / gpus / micro_tokens))
            cells.append(f"{seconds_per_step(sizes, tokens, gpus, micro_batches, machine):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Assumed for the time, not measured: {machine.teraflops:g} TFLOP/s at {machine.utilisation:.0%}, "
        f"{machine.bandwidth:g} GB/s "
        f"into each GPU, micro-batches of {micro_tokens:,} tokens, activations recomputed.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, or put them into a page; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_sizes", description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the candidate parameters (default: 0.1)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn allocation (default: 0)")
    parser.add_argument("--tokens", type=int, default=2**20, help="of one step, over all GPUs (default: 1048576)")
    parser.add_argument("--micro-tokens", type=int, default=2**14, help="of a micro-batch of one GPU (default: 16384)")
    parser.add_argument("--teraflops", type=float, default=312, help="peak of one GPU in bf16 (default: an A800's 312)")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the peak (default: 0.4, an assumption)"
    )
    parser.add_argument("--bandwidth", type=float, default=25, help="GB/s into each GPU (default: 25, an assumption)")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this page")
    chosen = parser.parse_args(arguments)
    drawn = dict(rank=chosen.rank, ratio=chosen.ratio, seed=chosen.seed)
    models = {name: sizes_of(name, shape, **drawn) for name, shape in (SHAPES | LARGER).items()}
    machine = Machine(chosen.teraflops, chosen.utilisation, chosen.bandwidth)
    text = (
        f"Allocation drawn at random (seed {chosen.seed}) within {chosen.ratio:.0%} of the candidate parameters, LoRA "
        f"rank "
        f"{chosen.rank}, a bf16 checkpoint.\n\n" + tables(models, machine, chosen.tokens, chosen.micro_tokens)
    )
    if chosen.write:
        write_page(chosen.write, text, BEGIN, END)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
