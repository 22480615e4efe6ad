"""What the LoRA layer saves: forward and backward of decoder layers with PEFT's layer, with ours, and with A's product
shared.

    python -m benchmarks.lora_layer_cost [--layers 4] [--hidden 576,1536] [--tokens 256,1024] [--precision bf16,fp32]
                                         [--rounds 15] [--write docs/training-cost.md]

Adapters of rank 16 on all linear modules of a random Qwen2, without FSDP; the three models take turns on the same
tokens. On a machine with a GPU the same command uses it. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import product
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.pages import save_figures, write_page
from benchmarks.sync_cost import quartiles
from hybrid_lora_plugin.training.lora_linear import LoraLinear, share_inputs

BEGIN, END = "<!-- measured by benchmarks/lora_layer_cost.py -->", "<!-- end of the measured layer -->"
VARIANTS = {"peft": "PEFT's layer", "in place": "added in place", "shared": "and A's product shared"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VOCABULARY = 1024


def build(variant: str, layers: int, hidden: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model of a variant; all start from the same values."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if variant != "peft":
        adapter._register_custom_module({torch.nn.Linear: LoraLinear})
    model = get_peft_model(model, adapter)
    if variant == "shared":
        share_inputs(model)
    model.enable_input_require_grads()
    # As the trainer computes: FSDP hands out all parameters in one type.
    return model.to(device, dtype)


def measure(layers: int, hidden: int, tokens: int, precision: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward, round by round."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {variant: build(variant, layers, hidden, DTYPES[precision], device) for variant in VARIANTS}
    ids = torch.randint(4, VOCABULARY, (2, tokens // 2), device=device)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_ in range(rounds + 2):
        for variant in list(models)[:: -1 if round_ % 2 else 1]:
            models[variant].zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            models[variant](input_ids=ids, labels=ids).loss.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ > 1:  # the first ones warm up
                seconds[variant].append(time.perf_counter() - begun)
    return seconds


def report(results: list[dict], layers: int, rounds: int) -> str:
    """The figures as Markdown."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    lines = [
        f"{where}: forward and backward of {layers} decoder layers, LoRA rank 16 on all linear modules, no FSDP, "
        f"{rounds} rounds; medians (quartiles) of the ratios within a round.",
        "",
        "| width | tokens | computing in | "
        + " | ".join(f"{label}, ÷ PEFT's" for label in list(VARIANTS.values())[1:])
        + " |",
        "| ---: | ---: | --- | ---: | ---: |",
    ]
    for result in results:
        seconds = result["seconds"]
        cells = [
            quartiles([ours / theirs for ours, theirs in zip(seconds[variant], seconds["peft"], strict=True)])
            for variant in list(VARIANTS)[1:]
        ]
        lines.append(f"| {result['hidden']} | {result['tokens']} | {result['precision']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_layer_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: 4)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    for name, default in (("hidden", "576,1536"), ("tokens", "256,1024"), ("precision", "bf16,fp32")):
        parser.add_argument(f"--{name}", default=default, help=f"(default: {default})")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this page")
    shape = parser.parse_args(arguments)
    results = []
    for hidden, tokens, precision in product(
        shape.hidden.split(","), shape.tokens.split(","), shape.precision.split(",")
    ):
        print(f"width {hidden}, {tokens} tokens, {precision}", file=sys.stderr, flush=True)
        seconds = measure(shape.layers, int(hidden), int(tokens), precision, shape.rounds)
        results.append({"hidden": hidden, "tokens": tokens, "precision": precision, "seconds": seconds})
    save_figures(shape.output, "lora_layer_cost", results)
    text = report(results, shape.layers, shape.rounds)
    if shape.write:
        write_page(shape.write, text, BEGIN, END)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
