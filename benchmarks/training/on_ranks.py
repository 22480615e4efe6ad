"""A benchmark of training as a command: a run of torchrun for each precision and number of ranks, then one page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import save_figures, write_page
from benchmarks.sync_cost import make_model
from recipes.demo.environment import cpu_environment

ROOT = Path(__file__).parents[2]
END = "<!-- end of the measured part -->"


@dataclass(frozen=True)
class Benchmark:
    """What differs between two of them.

    Attributes:
        name: of its module in ``benchmarks`` and of its files.
        about: its first sentence.
        measure: on one rank; rank 0 leaves figures by ``save``.
        report: Markdown of all figures.
        ranks: default of ``--ranks``.
        options: more of its own, as text: name -> (default, help).
    """

    name: str
    about: str
    measure: Callable[[argparse.Namespace], None]
    report: Callable[[dict[str, Any]], str]
    ranks: str
    options: Mapping[str, tuple[str, str]]


def folder_of(shape: argparse.Namespace) -> Path:
    """Where ``model``, ``allocation`` and each run's figures are."""
    return shape.output / shape.name.replace("_", "-")


def save(shape: argparse.Namespace, result: dict[str, Any]) -> None:
    """Leave one run's figures, with ``ranks`` among them."""
    save_figures(folder_of(shape), f"{shape.precision}-{result['ranks']}", result)


def machine() -> str:
    """The device that was measured."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, gloo"


def setting(result: dict[str, Any]) -> str:
    """Machine, versions and model, as a page begins."""
    shape = result["shape"]
    return (
        f"{result['machine']}, {', '.join(f'{name} {text}' for name, text in result['versions'].items())}. A random "
        f"Qwen2 of {shape['layers']} layers of width {shape['hidden']} and {shape['vocabulary']:,} tokens, its "
        f"checkpoint in bf16, LoRA rank 16, FSDP2, {shape['micro_batches']} micro-batches of {shape['rows']} rows of "
        f"{shape['tokens']} tokens on each rank, {shape['rounds']} rounds."
    )


def _parsed(benchmark: Benchmark, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark.name}", description=benchmark.about)
    for name, default, text in (
        ("layers", 8, "of the model"),
        ("hidden", 576, "width, a multiple of 192"),
        ("vocabulary", 16384, "rows of the embedding"),
        ("rows", 2, "of a micro-batch"),
        ("micro-batches", 2, "of each rank in an update"),
        ("tokens", 128, "of each row"),
        ("rounds", 7, "of updates"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    texts = {"ranks": (benchmark.ranks, "numbers of ranks, one run each"), "precision": ("bf16,fp32", "computed in")}
    for name, (default, text) in {**texts, **benchmark.options}.items():
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default: {default})")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this page")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    shape.output, shape.name = shape.output.resolve(), benchmark.name
    return shape


def main(benchmark: Benchmark, arguments: list[str] | None = None) -> int:
    """Measure and print; returns 0, or the status of a failed run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    shape = _parsed(benchmark, arguments)
    if shape.inside:
        benchmark.measure(shape)
        return 0
    folder = folder_of(shape)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_model(folder, shape)
    environment = dict(os.environ) if torch.cuda.is_available() else cpu_environment()
    results = []
    for precision, ranks in product(shape.precision.split(","), shape.ranks.split(",")):
        name = f"{precision}-{ranks}"
        print(
            f"{ranks} ranks in {precision}: building engines, then {shape.rounds} rounds", file=sys.stderr, flush=True
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        command += [f"benchmarks.{benchmark.name}", *arguments, "--precision", precision, "--inside"]
        with (folder / f"{name}.log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            print(f"{benchmark.name}: {name}: exit status {done.returncode}; see {log.name}", file=sys.stderr)
            return done.returncode
        results.append(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    result = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("verl", "torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "shape": {name: value for name, value in vars(shape).items() if isinstance(value, int)}
        | {name: getattr(shape, name) for name in benchmark.options},
        "ranks": results,
    }
    text = benchmark.report(result)
    save_figures(shape.output, benchmark.name, result)
    (shape.output / f"{benchmark.name}.md").write_text(text + "\n", encoding="utf-8")
    if shape.write:
        write_page(shape.write, text, f"<!-- measured by benchmarks/{benchmark.name}.py -->", END)
    print(text)
    return 0
