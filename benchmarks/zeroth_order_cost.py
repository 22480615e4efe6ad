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
import os
import sys

import torch

from benchmarks.sync_cost import quartiles
from benchmarks.training.on_ranks import Benchmark, folder_of, main, save, setting
from benchmarks.training.turns import ratio, take_turns

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
    folder = folder_of(shape)
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
        save(shape, result)
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
    head = (
        f"{setting(result)} {result['ranks'][0]['moved']:,} frozen parameters move. Ratios are medians (quartiles) of "
        "the ratios within a round."
    )
    directions = [str(one) for one in numbers(result["shape"]["directions"])]
    tables = [time_table(result["ranks"], directions), bytes_table(result["ranks"])]
    return "\n\n".join([head, *("\n".join(table) for table in tables)])


BENCHMARK = Benchmark(
    "zeroth_order_cost",
    __doc__.splitlines()[0],
    measure,
    report,
    ranks="1,2",
    options={"directions": ("1,4", "numbers of directions")},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
