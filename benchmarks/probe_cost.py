"""What the probe costs: scoring against its floor, Eq. 9 against Algorithm 1, growth with depth and ranks, memory.

    python -m benchmarks.probe_cost [--layers 30] [--hidden 576] [--rows 2] [--tokens 128] [--repeats 9] [--output FILE]

A random Qwen2 of SmolLM2-135M's shape by default. Times are compared within one process: the two sides of a ratio take
turns, and the median of the ratios is shown with its quartiles. Memory is the peak resident size of a process of its
own for each case. Nothing here is a test; the figures belong to the machine that made them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import AdapterConfig, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.probing import distributed as processes
from hybrid_lora_plugin.probing.controls import ControlPass
from hybrid_lora_plugin.probing.distributed import place
from hybrid_lora_plugin.probing.forward import IGNORED, Batch, Passes, negative_log_likelihood
from hybrid_lora_plugin.probing.layers import attach, detach
from hybrid_lora_plugin.probing.measure import batch_sensitivities, draw_partition, perturbation, prepare_scoring
from hybrid_lora_plugin.probing.methods.svd_lora import SvdLoraMethod

RANK = 16
MEMORY_CASES = ("inference", "scoring", "warm-up", "saved for scoring", "saved for warm-up")


def build(shape: argparse.Namespace, layers: int | None = None):
    """A random causal language model of the asked shape, in float32 on the CPU or bfloat16 on a GPU."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=round(shape.hidden * 8 / 3),
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(1, shape.hidden // 192),
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.requires_grad_(False)
    return model.bfloat16() if torch.cuda.is_available() else model


def batch_of(shape: argparse.Namespace) -> Batch:
    """Random rows; the second half of each is the response."""
    ids = torch.randint(0, shape.vocabulary, (shape.rows, shape.tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : shape.tokens // 2] = IGNORED
    return Batch(ids, torch.ones_like(ids), labels)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def ratios(action: Callable[[], object], floor: Callable[[], object], repeats: int) -> dict[str, float]:
    """Quartiles of ``action / floor``, and the median seconds of both; they take turns after one unmeasured round."""
    action(), floor()
    pairs = [(seconds(action), seconds(floor)) for _ in range(repeats)]
    first, median, third = statistics.quantiles([a / b for a, b in pairs], n=4)
    return {
        "ratio": median,
        "first_quartile": first,
        "third_quartile": third,
        "seconds": statistics.median(a for a, _ in pairs),
        "floor_seconds": statistics.median(b for _, b in pairs),
    }


class Scene:
    """A model with a warmed-up probe, and the passes to compare."""

    def __init__(self, shape: argparse.Namespace, layers: int | None = None, ranks: processes.Ranks | None = None):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ranks = ranks or processes.Ranks(device)
        self.batch, self.model = batch_of(shape), build(shape, layers)
        candidates = find_candidates(self.model)
        self.layers = attach(self.model, candidates, RANK, seed=0)
        for layer in self.layers.values():
            # As after a warm-up: with B = 0 every gradient of e would be 0.
            layer.B.data.normal_(0, 1e-3)
        replicated = [p for layer in self.layers.values() for p in (layer.A, layer.B, layer.e, layer.alpha)]
        place(self.model, candidates, replicated, self.ranks)
        prepare_scoring(self.model, self.layers)
        self.passes = Passes(self.model, self.ranks)
        self.adapter_parameters = sum(p.numel() for p in replicated)

    def score(self) -> None:
        """Algorithm 1 on one validation batch."""
        batch_sensitivities(self.layers, self.passes, self.batch, draw_partition(0, 0, len(self.layers)))

    def controls(self) -> None:
        """The unmasked pass of the controls."""
        ControlPass(self.model, self.layers, self.passes).measure(self.batch)

    def perturb(self) -> None:
        """Eq. 9 on one validation batch."""
        perturbation(self.layers, self.passes, self.batch)

    def floor(self) -> None:
        """Two forward passes and two backward passes through activations only, without any probe."""
        detach(self.model, self.layers)
        embedding = self.model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
        try:
            micro = self.batch.to(self.ranks.device)
            for _ in range(2):
                negative_log_likelihood(self.model, micro).backward()
        finally:
            hook.remove()
            for name, layer in self.layers.items():
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, layer)

    def forward(self) -> None:
        """One forward pass with all modules active."""
        self.passes.loss(self.batch)


def peak_bytes(shape: argparse.Namespace, case: str) -> int:
    """Peak resident bytes of a process that does one thing with the model; on a GPU, of its allocator."""
    arguments = [f"--{name}={getattr(shape, name)}" for name in ("layers", "hidden", "vocabulary", "rows", "tokens")]
    command = [sys.executable, "-m", "benchmarks.probe_cost", "--memory-of", case, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def saved_for_backward(model: torch.nn.Module, batch: Batch) -> int:
    """Bytes of activations that autograd keeps between a forward pass and its backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = negative_log_likelihood(model, batch)
    del loss
    return sum(kept.values())


def memory_case(shape: argparse.Namespace, case: str) -> int:
    """Run one case in this process; returns its peak bytes."""
    if case == "inference":
        model = build(shape).to("cuda" if torch.cuda.is_available() else "cpu")
        passes = Passes(model, processes.Ranks(next(model.parameters()).device))
        passes.loss(batch_of(shape))
    elif case == "scoring":
        scene = Scene(shape)
        scene.score()
    elif case == "saved for scoring":
        # Half of the modules, as in a masked pass.
        scene = Scene(shape)
        for layer in list(scene.layers.values())[::2]:
            layer.active = False
        return saved_for_backward(scene.model, scene.batch.to(scene.ranks.device))
    elif case == "saved for warm-up":
        scene = Scene(shape)
        for layer in scene.layers.values():
            for parameter in (layer.A, layer.B, layer.e, layer.alpha):
                parameter.requires_grad_(True)
        return saved_for_backward(scene.model, scene.batch.to(scene.ranks.device))
    else:
        model = build(shape)
        config = ProbeCommandConfig(lora=AdapterConfig(rank=RANK), probe=ProbeConfig(controls=False))
        run = SvdLoraMethod(model, find_candidates(model), config)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
        run.start(Passes(model, processes.Ranks(device)))
        for _ in range(2):
            run.warm_up(batch_of(shape), batch_of(shape))
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def on_ranks(shape: argparse.Namespace, ranks: int) -> dict[str, float]:
    """Median seconds of scoring one batch on so many gloo ranks of one thread each."""
    arguments = [
        f"--{name}={getattr(shape, name)}" for name in ("layers", "hidden", "vocabulary", "rows", "tokens", "repeats")
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               "-m", "benchmarks.probe_cost", "--as-rank", *arguments]  # fmt: skip
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def as_rank(shape: argparse.Namespace) -> None:
    """Body of one rank of ``on_ranks``; the first prints the result."""
    torch.set_num_threads(1)
    ranks = processes.start()
    scene = Scene(shape, ranks=ranks)
    scene.score()
    taken = [seconds(scene.score) for _ in range(max(3, shape.repeats // 3))]
    if ranks.first:
        print(json.dumps({"seconds": statistics.median(taken)}), flush=True)
    processes.finish(ranks)


def at_depth(shape: argparse.Namespace, layers: int) -> dict[str, float]:
    """Seconds of scoring a batch, of one forward pass, and of Eq. 9, whose 1 + 7L passes are repetition enough."""
    scene = Scene(shape, layers)
    scene.score(), scene.forward()
    before = [(seconds(scene.score), seconds(scene.forward)) for _ in range(2)]
    perturbed = seconds(scene.perturb)
    after = [(seconds(scene.score), seconds(scene.forward)) for _ in range(2)]
    scored, forward = (statistics.median(values) for values in zip(*before, *after, strict=True))
    return {"layers": layers, "scoring": scored, "forward": forward, "perturbation": perturbed}


def measure(shape: argparse.Namespace) -> dict:
    """Every figure of the report."""
    say = partial(print, file=sys.stderr, flush=True)
    scene = Scene(shape)
    modules, layers = len(scene.layers), shape.layers
    say("scoring against its floor")
    result = {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {
            "layers": layers,
            "hidden": shape.hidden,
            "rows": shape.rows,
            "tokens": shape.tokens,
            "modules": modules,
        },
        "scoring": ratios(scene.score, scene.floor, shape.repeats),
        "controls": ratios(scene.controls, scene.floor, max(3, shape.repeats // 3)),
        "adapter_parameters": scene.adapter_parameters,
        "depth": [],
    }
    del scene
    for depth in sorted({max(2, layers // 4), max(2, layers // 2), layers}):
        say(f"Eq. 9 with {depth} layers: {1 + 7 * depth} forward passes")
        result["depth"].append(at_depth(shape, depth))
    say("1 and 2 ranks")
    result["ranks"] = {str(ranks): on_ranks(shape, ranks)["seconds"] for ranks in (1, 2)}
    say("peak memory")
    result["memory"] = {case: peak_bytes(shape, case) for case in MEMORY_CASES}
    return result


def report(result: dict) -> str:
    """The figures as Markdown."""
    shape, scoring, controls = result["shape"], result["scoring"], result["controls"]
    deepest = result["depth"][-1]
    megabytes = {name: value / 1e6 for name, value in result["memory"].items()}
    adapter = result["adapter_parameters"]
    lines = [
        f"{result['device']}, torch {result['torch']}: {shape['layers']} layers of width {shape['hidden']} "
        f"({shape['modules']} modules), a batch of {shape['rows']} rows of {shape['tokens']} tokens, rank {RANK}.",
        "",
        "| | measured | floor or formula | ratio (quartiles) |",
        "| --- | ---: | ---: | ---: |",
        f"| scoring one batch, against 2 forward and 2 activation-only backward passes | {scoring['seconds']:.3f} s | "
        f"{scoring['floor_seconds']:.3f} s | {scoring['ratio']:.3f} "
        f"({scoring['first_quartile']:.3f}–{scoring['third_quartile']:.3f}) |",
        f"| controls of one batch (LoRA-Drop, gradient norm, SNIP), against the same | {controls['seconds']:.3f} s | "
        f"{controls['floor_seconds']:.3f} s | {controls['ratio']:.3f} |",
        f"| Eq. 9 on one batch, against scoring it | {deepest['perturbation']:.2f} s | {deepest['scoring']:.3f} s | "
        f"{deepest['perturbation'] / deepest['scoring']:.1f} |",
        "",
        "| layers L | scoring | Eq. 9 | Eq. 9 in forward passes | 1 + 7L |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['layers']} | {row['scoring']:.3f} s | {row['perturbation']:.2f} s | "
            f"{row['perturbation'] / row['forward']:.1f} | {1 + 7 * row['layers']} |"
            for row in result["depth"]
        ),
        "",
        "| gloo ranks, one thread each | scoring | against one rank |",
        "| ---: | ---: | ---: |",
        *(
            f"| {ranks} | {taken:.3f} s | {taken / result['ranks']['1']:.3f} |"
            for ranks, taken in result["ranks"].items()
        ),
        "",
        "| peak memory of a process, MB | measured | over inference | formula | adapters, gradients, moments | "
        "activations |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| forward pass of the base | {megabytes['inference']:.0f} | | | | |",
        *(
            f"| {case} | {megabytes[case]:.0f} | {megabytes[case] - megabytes['inference']:.0f} | "
            f"{own * adapter / 1e6 + megabytes[f'saved for {case}']:.0f} | {own * adapter / 1e6:.0f} ({own} bytes "
            f"each) | {megabytes[f'saved for {case}']:.0f} |"
            for case, own in (("scoring", 4), ("warm-up", 16))
        ),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_cost", description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 30),
        ("hidden", 576),
        ("vocabulary", 49152),
        ("rows", 2),
        ("tokens", 128),
        ("repeats", 9),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    if shape.memory_of:
        print(memory_case(shape, shape.memory_of))
        return 0
    if shape.as_rank:
        as_rank(shape)
        return 0
    result = measure(shape)
    if shape.output:
        shape.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
