"""What zeroth order adds to an actor update of a verl run: time, beside its floor of forward passes, and bytes.

    python -m benchmarks.zeroth_order_cost [--ranks 1,2] [--precision bf16,fp32] [--directions 1,4] [--layers 8]
                                           [--hidden 576] [--rows 2] [--micro-batches 2] [--tokens 128] [--rounds 7]
                                           [--write docs/zeroth-order.md]

verl's own engine with Hybrid-LoRA, without zeroth order and with each number of directions, and full fine-tuning: all
alive in one process group, on the same batches and in turns. On a machine with GPUs the same command uses them. Nothing
here is a test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

from benchmarks.pages import save_figures, write_page
from benchmarks.sync_cost import make_model, quartiles
from benchmarks.training.turns import ratio, take_turns
from benchmarks.training_cost import machine
from recipes.demo.environment import cpu_environment

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured by benchmarks/zeroth_order_cost.py -->", "<!-- end of the measured part -->"
FORWARD, HYBRID, FULL = "forward", "hybrid", "full"


def numbers(text: str) -> list[int]:
    """The whole numbers of a list with commas."""
    return [int(one) for one in text.split(",")]


# -- on one rank -----------------------------------------------------------------------------------------------------


def measure(shape: argparse.Namespace) -> None:
    """Build every engine, measure, and leave the figures in ``PRECISION-RANKS.json`` (rank 0)."""
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    from benchmarks.training import engines as e
    from hybrid_lora_plugin.training.zeroth_order.two_point import two_point_step

    _, rank, ranks = initialize_global_process_group()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    folder = shape.output / "zeroth-order-cost"
    batch = e.make_batch(shape.rows, shape.micro_batches, shape.tokens, shape.vocabulary, rank, ranks)
    loss = e.policy_loss()

    def engine_of(variant: str, **options):
        return e.build_engine(
            variant, str(folder / "model"), str(folder / "allocation"), precision=shape.precision, options=options
        )

    built = {FULL: engine_of(FULL), HYBRID: engine_of(HYBRID)}
    moving = {
        str(directions): engine_of(HYBRID, zeroth_order={"enabled": True, "lr": 1e-8, "directions": directions})
        for directions in numbers(shape.directions)
    }
    built |= moving
    cases = {name: lambda n=name: e.update(built[n], batch, loss) for name in built}
    cases[FORWARD] = lambda: e.log_probs(built[HYBRID], batch, reference=False)
    for name, engine in moving.items():
        # A step without its passes: what is left are the writes of the weights and the masters' moves.
        cases[f"writes {name}"] = lambda w=engine._zeroth_order.weights, n=name: two_point_step(
            w, lambda: 0.0, seed=0, step=0, rate=1e-8, directions=int(n)
        )
    result = {
        "ranks": ranks,
        "precision": shape.precision,
        "seconds": take_turns(cases, shape.rounds),
        "moved": sum(
            torch.Size(one).numel() for one in next(iter(moving.values()))._zeroth_order.weights.shapes.values()
        ),
        "bytes": {name: engine._zeroth_order.bytes for name, engine in moving.items()},
        "training_bytes": built[HYBRID].training_bytes().total,
    }
    if rank == 0:
        save_figures(folder, f"{shape.precision}-{ranks}", result)
    torch.distributed.destroy_process_group()


# -- report ----------------------------------------------------------------------------------------------------------


def added(seconds: dict[str, list[float]], directions: str) -> list[float]:
    """What a step of zeroth order took, round by round: an update with it less one without."""
    return [a - b for a, b in zip(seconds[directions], seconds[HYBRID], strict=True)]


def time_table(results: list[dict], directions: list[str]) -> list[str]:
    lines = [
        "| ranks, computing in | directions | an update, seconds (quartiles) | ÷ Hybrid-LoRA's without | ÷ full "
        "fine-tuning's | what it adds ÷ its forward passes, the floor | its writes ÷ these passes |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        case, seconds = f"{result['ranks']}, {result['precision']}", result["seconds"]
        lines.append(f"| {case} | none | {quartiles(seconds[HYBRID])} | 1 | {ratio(seconds, HYBRID, FULL)} | | |")
        for name in directions:
            floor = [2 * int(name) * one for one in seconds[FORWARD]]
            parts = {"floor": floor, "added": added(seconds, name), "writes": seconds[f"writes {name}"]}
            lines.append(
                f"| {case} | {name} | {quartiles(seconds[name])} | {ratio(seconds, name, HYBRID)} | "
                f"{ratio(seconds, name, FULL)} | {ratio(parts, 'added', 'floor')} | "
                f"{ratio(parts, 'writes', 'floor')} |"
            )
    return lines


def bytes_table(results: list[dict]) -> list[str]:
    lines = [
        "| ranks | Hybrid-LoRA holds, MB | zeroth order besides, MB | of it a moved weight, bytes | ÷ what Hybrid-LoRA "
        "holds |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        if result["precision"] != results[0]["precision"]:
            continue  # what is held does not depend on it
        (held,) = set(result["bytes"].values())  # nor on the number of directions
        lines.append(
            f"| {result['ranks']} | {result['training_bytes'] / 1e6:.1f} | {held / 1e6:.1f} | "
            f"{held * result['ranks'] / result['moved']:.2f} | {held / result['training_bytes']:.2f} |"
        )
    return lines


def report(result: dict) -> str:
    """The figures as Markdown."""
    shape, versions = result["shape"], result["versions"]
    head = (
        f"{result['machine']}, {', '.join(f'{name} {text}' for name, text in versions.items())}. A random Qwen2 of "
        f"{shape['layers']} layers of width {shape['hidden']} and {shape['vocabulary']:,} tokens, its checkpoint in "
        f"bf16, LoRA rank 16, FSDP2, {shape['micro_batches']} micro-batches of {shape['rows']} rows of "
        f"{shape['tokens']} tokens on each rank, {shape['rounds']} rounds; {result['ranks'][0]['moved']:,} frozen "
        "parameters move. Ratios are medians (quartiles) of the ratios within a round."
    )
    directions = [str(one) for one in numbers(result["shape"]["directions"])]
    tables = [time_table(result["ranks"], directions), bytes_table(result["ranks"])]
    return "\n\n".join([head, *("\n".join(table) for table in tables)])


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns 0, or the status of a failed run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zeroth_order_cost", description=__doc__.splitlines()[0])
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
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, one run each (default: 1,2)")
    parser.add_argument("--directions", default="1,4", help="numbers of directions (default: 1,4)")
    parser.add_argument("--precision", default="bf16,fp32", help="what is computed in (default: bf16,fp32)")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this page")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    shape.output = shape.output.resolve()
    if shape.inside:
        measure(shape)
        return 0
    folder = shape.output / "zeroth-order-cost"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_model(folder, shape)
    environment = dict(os.environ) if torch.cuda.is_available() else cpu_environment()
    results = []
    for precision, ranks in product(shape.precision.split(","), numbers(shape.ranks)):
        name = f"{precision}-{ranks}"
        print(
            f"{ranks} ranks in {precision}: building engines, then {shape.rounds} rounds", file=sys.stderr, flush=True
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        command += ["benchmarks.zeroth_order_cost", *(sys.argv[1:] if arguments is None else arguments)]
        command += ["--precision", precision, "--inside"]
        with (folder / f"{name}.log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            print(f"zeroth_order_cost: {name}: exit status {done.returncode}; see {log.name}", file=sys.stderr)
            return done.returncode
        results.append(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    result = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("verl", "torch", "transformers", "peft")},
        "shape": {name: value for name, value in vars(shape).items() if isinstance(value, int)}
        | {"directions": shape.directions},
        "ranks": results,
    }
    text = report(result)
    save_figures(shape.output, "zeroth_order_cost", result)
    if shape.write:
        write_page(shape.write, text, BEGIN, END)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
