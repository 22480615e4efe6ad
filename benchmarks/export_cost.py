"""What an export takes: time, memory and disk in each format, for a random model of Qwen2.5-0.5B's shape in bfloat16.

    python -m benchmarks.export_cost [--layers 24] [--folder FOLDER]

About 4 GB of disk while it runs. Memory is the highest resident set during the export less that before it, each in a
process of its own; what training changed is random, of the size of a short run's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from hybrid_lora_plugin.training.freed_memory import give_back_freed_memory

#: Hugging Face's config.json of Qwen/Qwen2.5-0.5B-Instruct, what decides shapes
SHAPE = {"vocab_size": 151_936, "hidden": 896, "heads": 14, "kv_heads": 2, "intermediate_size": 4864}
FORMATS = (("merged", "auto"), ("merged", "float32"), ("adapter", "auto"), ("delta", "auto"), ("delta", "float32"))


def make_run(folder: Path, layers: int) -> tuple[Path, Path]:
    """A base model and a checkpoint of a run from it."""
    from transformers import AutoModelForCausalLM

    from hybrid_lora_plugin import apply_allocation, load_allocation
    from tests.support.allocations import make_allocation
    from tests.support.checkpoints import save_checkpoint
    from tests.support.tiny_models import make_char_tokenizer, tiny_qwen2_config

    config = tiny_qwen2_config(layers=layers, **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    make_char_tokenizer().save_pretrained(folder / "base")
    artifact = make_allocation(folder / "base", folder / "allocation", ratio=0.1)
    hybrid = apply_allocation(model, load_allocation(artifact), rank=16, alpha=32)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if parameter.requires_grad:
                # A hundred steps of the paper's rates, at most.
                parameter.add_(torch.randn_like(parameter), alpha=2.5e-3 if ".lora_" in name else 1e-4)
    description = {"rollout_dtype": "bfloat16", "rounding_mode": "stochastic", "base_dtype": "bfloat16"}
    save_checkpoint(hybrid, folder / "base", artifact, folder / "step", rank=16, alpha=32, **description)
    return folder / "base", folder / "step"


def highest_resident() -> int:
    """Most bytes that this process has held since ``/proc/self/clear_refs`` was last written."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def measure(export, *arguments, **options) -> dict[str, float]:
    """Seconds and bytes of memory of one export, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            give_back_freed_memory()  # as the command does
            Path("/proc/self/clear_refs").write_text("5")
            before, begun = highest_resident(), time.perf_counter()
            export(*arguments, **options)
            found = {"seconds": time.perf_counter() - begun, "memory": highest_resident() - before}
            os.write(writing, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        found = json.loads(stream.read())
    os.waitpid(child, 0)
    return found


def size_of(folder: Path) -> int:
    """Bytes of all weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--folder", help="for the files; a temporary one otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        from hybrid_lora_plugin.training.export import apply_delta, export_checkpoint

        base, step = make_run(folder, options.layers)
        rows = []
        for format, dtype in FORMATS:
            out = folder / f"{format}-{dtype}"
            found = measure(export_checkpoint, step, out, format=format, dtype=dtype)
            rows.append((f"`format={format}`, `dtype={dtype}`", found, size_of(out)))
        out = folder / "again"
        found = measure(apply_delta, folder / "delta-auto", out)
        rows.append(("`delta=…` of the fourth", found, size_of(out)))
        same = (out / "model.safetensors").read_bytes() == (folder / "merged-auto" / "model.safetensors").read_bytes()
        print(f"base model {size_of(base) / 1e6:,.0f} MB, checkpoint {size_of(step / 'hybrid_lora') / 1e6:,.0f} MB")
        print("| export | weights, MB | memory, MB | time, s |\n| --- | --- | --- | --- |")
        for name, found, size in rows:
            print(f"| {name} | {size / 1e6:,.0f} | {found['memory'] / 1e6:,.0f} | {found['seconds']:.0f} |")
        print(f"the delta gives the merged model again, byte for byte: {'yes' if same else 'no'}")


if __name__ == "__main__":
    main()
