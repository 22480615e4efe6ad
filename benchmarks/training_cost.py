"""What training costs on each rank: bytes, collectives and time, beside full fine-tuning, verl's LoRA and PEFT.

    python -m benchmarks.training_cost [--ranks 1,2,4] [--precision bf16,fp32] [--layers 8] [--hidden 576] [--rows 2]
                                       [--micro-batches 2] [--tokens 128] [--rounds 7] [--write docs/training-cost.md]

verl's own engine in each variant, all alive in one process group and on the same batches; they take turns, so a ratio
is one of two updates seconds apart. Bytes are counted from the tensors that a rank holds in an update. On a machine
with GPUs the same command uses them, and also shows the peak that the allocator saw. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

from benchmarks.sync_cost import quartiles
from benchmarks.training.engines import VARIANTS
from benchmarks.training.on_ranks import Benchmark, folder_of, main, save, setting
from benchmarks.training.turns import ratio, take_turns

# -- on one rank -----------------------------------------------------------------------------------------------------


def measure(shape: argparse.Namespace) -> None:
    """Build every variant, measure, and leave the figures in ``PRECISION-RANKS.json`` (rank 0)."""
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    from benchmarks.training import engines as e
    from hybrid_lora_plugin.training.apply import parts_of

    _, rank, ranks = initialize_global_process_group()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    folder = folder_of(shape)
    model, allocation = str(folder / "model"), str(folder / "allocation")
    batch = e.make_batch(shape.rows, shape.micro_batches, shape.tokens, shape.vocabulary, rank, ranks)
    loss = e.policy_loss()
    built, starts = {}, {}
    for variant in VARIANTS:
        begun = time.perf_counter()
        built[variant] = e.build_engine(variant, model, allocation, precision=shape.precision)
        starts[variant] = time.perf_counter() - begun
    result = {
        "ranks": ranks,
        "precision": shape.precision,
        "starts": starts,
        "bytes": {},
        "collectives": {},
        "units": {},
        "seconds": {},
        "peak": {},
    }
    result["parameters"] = vars(parts_of(built["hybrid"].module).counts)
    for variant in VARIANTS:
        e.update(built[variant], batch, loss)  # lazy parts, and the optimizer's state
        with e.counted_collectives() as counts:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            e.update(built[variant], batch, loss)
            if cuda:
                result["peak"][variant] = torch.cuda.max_memory_allocated() - before
        result["collectives"][variant] = dict(counts)
        result["units"][variant] = e.units_per_layer(built[variant])
    for variant, engine in built.items():
        result["bytes"][variant] = e.held_bytes(engine, batch, loss)

    cases = {variant: lambda v=variant: e.update(built[v], batch, loss) for variant in VARIANTS}
    cases["plain forward"] = lambda: e.log_probs(built["full"], batch, reference=False)
    cases["hybrid reference"] = lambda: e.log_probs(built["hybrid"], batch, reference=True)
    cases["lora reference"] = lambda: e.log_probs(built["lora"], batch, reference=True)
    result["seconds"] = take_turns(cases, shape.rounds)
    if rank == 0:
        save(shape, result)
    torch.distributed.destroy_process_group()


# -- report ----------------------------------------------------------------------------------------------------------


def floor_of(parameters: dict[str, int], ranks: int) -> float:
    """The floor of docs/training-cost.md in bytes on each rank."""
    from hybrid_lora_plugin.parameter_counts import ParameterCounts
    from hybrid_lora_plugin.training.memory import least_bytes

    return least_bytes(ParameterCounts(**parameters), ranks).total


def total_of(held: dict[str, dict[str, int]], variant: str) -> int:
    """Bytes of a variant on one rank, with its reference policy: beside full fine-tuning, verl's second model in fp32.

    That one cannot be built without an accelerator, since verl keeps it in page-locked memory of the host.
    """
    beside = held["full"]["parameters"] if variant == "full" else 0
    return sum(held[variant].values()) + beside


def case_of(result: dict) -> str:
    """Ranks and type of a run, as the tables name it."""
    return f"{result['ranks']}, {result['precision']}"


def bytes_table(results: list[dict]) -> list[str]:
    lines = [
        "| ranks | variant | parameters | gradients | optimizer | reference | together, MB | ÷ floor | ÷ full "
        "fine-tuning |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        if result["precision"] != results[0]["precision"]:
            continue  # what is held does not depend on it
        held, floor = result["bytes"], floor_of(result["parameters"], result["ranks"])
        for variant, label in VARIANTS.items():
            parts = dict(held[variant])
            if variant == "full":
                parts["reference"] = parts["parameters"]
            total = total_of(held, variant)
            over = f"{total / floor:.3f}" if variant == "hybrid" else ""
            lines.append(
                f"| {result['ranks']} | {label} | {' | '.join(f'{part / 1e6:.1f}' for part in parts.values())} | "
                f"{total / 1e6:.1f} | {over} | {total / total_of(held, 'full'):.3f} |"
            )
    return lines


def time_table(results: list[dict]) -> list[str]:
    lines = [
        "| ranks, computing in | actor update | seconds (quartiles) | ÷ verl's LoRA | ÷ full fine-tuning | FSDP units "
        "a layer | collectives |",
        "| ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        seconds = result["seconds"]
        for variant, label in VARIANTS.items():
            counts = ", ".join(f"{number} {kind}" for kind, number in sorted(result["collectives"][variant].items()))
            lines.append(
                f"| {case_of(result)} | {label} | {quartiles(seconds[variant])} | {ratio(seconds, variant, 'lora')} | "
                f"{ratio(seconds, variant, 'full')} | {result['units'][variant]:g} | {counts} |"
            )
    lines += [
        "",
        "| ranks, computing in | log-probabilities of | seconds (quartiles) | ÷ a plain forward |",
        "| ---: | --- | ---: | ---: |",
    ]
    labels = {
        "plain forward": "a plain model",
        "hybrid reference": "Hybrid-LoRA's reference",
        "lora reference": "verl LoRA's reference",
    }
    for result in results:
        for case, label in labels.items():
            lines.append(
                f"| {case_of(result)} | {label} | {quartiles(result['seconds'][case])} | "
                f"{ratio(result['seconds'], case, 'plain forward')} |"
            )
    return lines


def peak_table(results: list[dict]) -> list[str]:
    lines = ["| ranks, computing in | variant | peak of an update over what is held, MB |", "| ---: | --- | ---: |"]
    for result in results:
        for variant, peak in result["peak"].items():
            lines.append(f"| {case_of(result)} | {VARIANTS[variant]} | {peak / 1e6:.0f} |")
    return lines


def start_table(results: list[dict]) -> list[str]:
    lines = ["| ranks, computing in | " + " | ".join(VARIANTS.values()) + " |", "| ---: |" + " ---: |" * len(VARIANTS)]
    for result in results:
        cells = " | ".join(f"{result['starts'][variant]:.2f}" for variant in VARIANTS)
        lines.append(f"| {case_of(result)} | {cells} |")
    return ["Seconds to build an engine (once each, the first one pays for imports):", "", *lines]


def report(result: dict) -> str:
    """The figures as Markdown."""
    counted = result["ranks"][0]["parameters"]
    head = (
        f"{setting(result)} {counted['frozen']:,} parameters frozen, {counted['full']:,} fully tuned, "
        f"{counted['lora']:,} of adapters. Ratios are medians (quartiles) of the ratios within a round."
    )
    results = result["ranks"]
    tables = [bytes_table(results), time_table(results), start_table(results)]
    if any(one["peak"] for one in results):
        tables.append(peak_table(results))
    return "\n\n".join([head, *("\n".join(table) for table in tables)])


BENCHMARK = Benchmark("training_cost", __doc__.splitlines()[0], measure, report, ranks="1,2,4", options={})

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
