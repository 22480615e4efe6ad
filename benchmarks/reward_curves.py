"""What rounding of the rollout's weights does to a run's reward: the demo's GSPO run in 16 bits by mode and seed.

    python -m benchmarks.reward_curves [--steps 20] [--seeds 0 1 2] [--dtype bfloat16]
    python -m benchmarks.reward_curves --write docs/sync-fidelity.md --picture docs/images/reward-curves.png

Every run is ``verl.trainer.main_ppo`` with Ray, FSDP and vLLM on the CPU, as the demo's, from a base model on the
bfloat16 grid; the trainer computes in float32, so that rounding is all that differs between two runs of a seed. A seed
chooses the thresholds, the rows' order, mini-batches and what vLLM samples. A run that has its figures in ``--out`` is
not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from transformers import AutoConfig

from benchmarks.fidelity.gradients import demo
from benchmarks.pages import save_figures, write_page
from benchmarks.sync_sizes import draw_allocation
from hybrid_lora_plugin.report.artifact import save_allocation
from recipes.demo import evidence, task
from recipes.demo.verl_run import run_verl

OUT = Path("outputs/benchmarks/reward_curves")
BEGIN, END = "<!-- measured by benchmarks/reward_curves.py -->", "<!-- end of the reward curves -->"
#: kept of each step's metrics
KEPT = {
    "reward": "critic/score/mean",
    "probability_difference": "training/rollout_probs_diff_mean",
    "arrived_lora": "hybrid_lora/update_arrived_lora",
    "arrived_full": "hybrid_lora/update_arrived_full",
    "proven": "hybrid_lora/sync_digest_ok",
}
#: steps at the end of a run whose mean reward stands for it
LAST = 5


@dataclass(frozen=True)
class Variant:
    """One way to bring the weights to the rollout engine. ``receiver_merge`` holds the bits of ``merge``."""

    mode: str
    rounding: str

    @property
    def label(self) -> str:
        return f"{self.mode}, {self.rounding}"


VARIANTS = (
    Variant("merge", "stochastic"),
    Variant("merge", "nearest"),
    Variant("adapter", "stochastic"),
    Variant("adapter", "nearest"),
    Variant("sparse_merge", "stochastic"),
)


def measure(variant: Variant, seed: int, arguments: argparse.Namespace) -> dict:
    """One run: its settings and the kept metrics of each step."""
    folder = arguments.out.resolve() / f"{variant.mode}-{variant.rounding}-{arguments.dtype}-{seed}"
    # What an interrupted run left would be refused, or resumed from; a finished one is never measured again.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = demo(arguments.cache, 0).folder.resolve()
    allocation = draw_allocation(AutoConfig.from_pretrained(model), "demo", rank=16, ratio=0.1, seed=0)
    save_allocation(folder / "allocation", allocation, {})
    files = task.write_rl_parquet(folder / "data")
    lora, full = arguments.rates
    steps = run_verl(
        [
            "+hybrid_lora=enabled",
            "+recipe=demo",
            f"hybrid_lora.allocation={folder / 'allocation'}",
            f"hybrid_lora.sync={variant.mode}",
            f"hybrid_lora.sync_rounding={variant.rounding}",
            f"hybrid_lora.sync_seed={seed}",
            f"hybrid_lora.full_lr={full}",
            f"actor_rollout_ref.model.path={model}",
            f"hybrid_lora.lora.lr={lora}",
            f"actor_rollout_ref.actor.data_loader_seed={seed}",
            f"actor_rollout_ref.rollout.dtype={arguments.dtype}",
            f"actor_rollout_ref.rollout.seed={seed}",
            f"data.seed={seed}",
            f"data.train_files={files['train']}",
            f"data.val_files={files['validation']}",
            f"trainer.total_training_steps={arguments.steps}",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            f"trainer.default_local_dir={folder / 'checkpoints'}",
            f"hydra.run.dir={folder / 'hydra'}",
        ],
        metrics=folder / "metrics.jsonl",
        log=folder / "verl.log",
        steps=arguments.steps,
        say=lambda line: print(f"{variant.label}, seed {seed}: {line.strip()}", file=sys.stderr, flush=True),
        describe=lambda step: f"reward {evidence.reward_of(step):.3f}" if step.number else "",
    )
    kept = [{name: step.metrics.get(key) for name, key in KEPT.items()} for step in steps if step.number]
    return {
        "mode": variant.mode, "rounding": variant.rounding, "dtype": arguments.dtype, "seed": seed,
        "rates": arguments.rates, "steps": kept,
    }  # fmt: skip


def page(results: list[dict]) -> str:
    """Markdown: mean reward at the beginning and the end of the runs, by variant."""
    count, dtype = len(results[0]["steps"]), results[0]["dtype"]
    lines = [
        f"{count} steps in {dtype}, rates {results[0]['rates'][0]:g} (LoRA) and {results[0]['rates'][1]:g} (full); "
        f"mean over the last {LAST} steps.",
        "",
        f"| rollout weights | seeds | reward, step 1 | reward, last {LAST} | by seed | arrived, LoRA / full, step 2 | "
        f"the same, step {count} | mean difference of probabilities, last {LAST} |",
        "| --- | ---: | ---: | ---: | --- | --- | --- | ---: |",
    ]
    for variant in VARIANTS:
        runs = [r for r in results if (r["mode"], r["rounding"]) == (variant.mode, variant.rounding)]
        if not runs:
            continue
        ends = [statistics.mean(step["reward"] for step in run["steps"][-LAST:]) for run in runs]

        def mean(name: str, index: slice, runs=runs) -> float:
            return statistics.mean(step[name] for run in runs for step in run["steps"][index])

        arrived = [
            f"{mean('arrived_lora', slice(at, at + 1)):.2f} / {mean('arrived_full', slice(at, at + 1)):.2f}"
            for at in (1, count - 1)
        ]
        lines.append(
            f"| {variant.label} | {len(runs)} | {mean('reward', slice(0, 1)):.3f} | {statistics.mean(ends):.3f} | "
            f"{', '.join(f'{end:.3f}' for end in ends)} | {arrived[0]} | {arrived[1]} | "
            f"{mean('probability_difference', slice(-LAST, None)):.4f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict], file: Path) -> None:
    """Write a PNG: reward by step, a line for each run and a thick one for a variant's mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for variant, colour in zip(VARIANTS, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f"), strict=True):
        runs = [r for r in results if (r["mode"], r["rounding"]) == (variant.mode, variant.rounding)]
        if not runs:
            continue
        curves = [[step["reward"] for step in run["steps"]] for run in runs]
        steps = range(1, len(curves[0]) + 1)
        for curve in curves:
            axes.plot(steps, curve, color=colour, lw=0.6, alpha=0.5)
        axes.plot(steps, [statistics.mean(at) for at in zip(*curves, strict=True)], color=colour, label=variant.label)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward of the step's rollouts")
    axes.set_title(f"The demo's GSPO run with a {results[0]['dtype']} rollout, thin: one seed", fontsize=9)
    axes.grid(color="#eeeeee", lw=0.6)
    axes.legend(fontsize=7, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rates", type=float, nargs=2, default=(6e-4, 1e-4), metavar=("LORA", "FULL"))
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", type=Path, help="page to put the table of all runs in --out into; runs nothing")
    parser.add_argument("--picture", type=Path, help="with --write: where to draw the curves")
    arguments = parser.parse_args(argv)
    if arguments.write:
        results = [json.loads(file.read_text()) for file in sorted(arguments.out.glob("*.json"))]
        if not results:
            parser.error(f"--out: {str(arguments.out)!r} holds no results; run the benchmark first")
        write_page(arguments.write, page(results), BEGIN, END)
        if arguments.picture:
            draw(results, arguments.picture)
        return 0
    arguments.cache.mkdir(parents=True, exist_ok=True)
    # A seed's variants one after the other: what is there at any time can be compared.
    for seed, variant in product(arguments.seeds, VARIANTS):
        name = f"{variant.mode}-{variant.rounding}-{arguments.dtype}-{seed}"
        if not (arguments.out / f"{name}.json").exists():
            save_figures(arguments.out, name, measure(variant, seed, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
