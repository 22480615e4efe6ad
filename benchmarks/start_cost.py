"""How much longer a verl run takes to start with the plugin: from its command to the first training step.

    python -m benchmarks.start_cost [--rounds 5] [--output outputs/bench] [--write docs/training-cost.md]

The demo's run under Hybrid-LoRA with a precomputed allocation, and the same settings as a run of verl's own LoRA
(merged, with the same rank, GRPO's advantage and GSPO's loss), in a process that does not load the plugin but for its
CPU platform. They take turns, and each is ended at its first step. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from benchmarks.pages import save_figures, write_page
from benchmarks.sync_cost import make_model, quartiles
from recipes.demo.environment import cpu_environment
from recipes.demo.task import write_rl_parquet
from recipes.demo.verl_run import stop

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured by benchmarks/start_cost.py -->", "<!-- end of the measured start -->"
#: what verl prints on its way -> what the table calls it
MARKS = {
    "dataloader initialized": "data loaded",
    "actor and ref model engine initialized": "actor built",
    "checkpoint engine manager initialized": "rollout engine up",
    "Training Progress:": "first step begins",
}
LABELS = {"lora": "verl, LoRA on all linear modules", "hybrid": "Hybrid-LoRA"}
#: verl without the plugin; a machine without a GPU still needs a platform
WITHOUT = {
    "VERL_USE_EXTERNAL_PLUGINS": "none",
    "VERL_USE_EXTERNAL_MODULES": "hybrid_lora_plugin.verl_backend.cpu.platform",
}
LIMIT = 600


def settings_of(folder: Path) -> list[str]:
    """Arguments of the run under Hybrid-LoRA."""
    files = write_rl_parquet(folder / "data")
    return [
        "--config-dir", str(ROOT / "recipes"), "+hybrid_lora=enabled", "+recipe=demo",
        f"hybrid_lora.allocation={folder / 'allocation'}", f"actor_rollout_ref.model.path={folder / 'model'}",
        f"data.train_files={files['train']}", f"data.val_files={files['validation']}", "trainer.val_before_train=false",
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64", "trainer.logger=[console]",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
    ]  # fmt: skip


def without_plugin(arguments: list[str], folder: Path) -> list[str]:
    """Arguments of the same run with verl's own LoRA: the composed configuration less what is the plugin's."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments, "--cfg", "job", "--resolve"]
    done = subprocess.run(command, cwd=ROOT, env=cpu_environment(), stdout=subprocess.PIPE, text=True, check=True)
    config = yaml.safe_load(done.stdout)
    del config["hybrid_lora"]
    model, rollout = config["actor_rollout_ref"]["model"], config["actor_rollout_ref"]["rollout"]
    for name in ("hybrid", "merge_for", "rollout_dtype"):
        del model["lora"][name]
    model |= {"external_lib": None}
    model["lora"]["merge"] = True
    rollout["checkpoint_engine"]["custom_backend_module"] = None
    config["actor_rollout_ref"]["actor"]["policy_loss"]["loss_mode"] = "gspo"
    config["algorithm"]["adv_estimator"] = "grpo"
    (folder / "plain").mkdir()
    (folder / "plain" / "plain.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["--config-dir", str(folder / "plain"), "--config-name", "plain"]


def start(arguments: list[str], log: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds from the command to each mark, and of processor time of all its processes at the last."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments, f"hydra.run.dir={log.parent / 'hydra'}"]
    begun, seen = time.perf_counter(), {}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with log.open() as tail:
                text = ""
                while len(seen) < len(MARKS):
                    text = text[-100:] + tail.read()
                    for mark in MARKS:
                        if mark not in seen and mark in text:
                            seen[mark] = time.perf_counter() - begun
                    if process.poll() is not None or time.perf_counter() - begun > LIMIT:
                        raise RuntimeError(f"start_cost: the run did not reach its first step; see {log}")
                    time.sleep(0.05)
            seen["processor"] = processor_seconds(process.pid)
        finally:
            stop(process)
    return seen


def processor_seconds(pid: int) -> float:
    """User and system time of a process and all below it."""
    total = 0.0
    for process in (root := psutil.Process(pid), *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def report(result: dict) -> str:
    """The figures as Markdown."""
    shape, seconds = result["shape"], result["seconds"]
    columns = {**MARKS, "processor": "processor time until then"}
    lines = [
        f"{result['machine']}: seconds from the command of the demo's run, on a random Qwen2 of {shape['layers']} "
        f"layers of width {shape['hidden']} and {shape['vocabulary']:,} tokens, {shape['rounds']} rounds; medians "
        f"(quartiles). Both sync the whole model once before the first step.",
        "",
        "| | " + " | ".join(columns.values()) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for variant, label in LABELS.items():
        cells = [quartiles([one[mark] for one in seconds[variant]], 1) for mark in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    pairs = list(zip(seconds["hybrid"], seconds["lora"], strict=True))
    cells = [quartiles([ours[mark] / theirs[mark] for ours, theirs in pairs]) for mark in columns]
    lines.append(f"| ratio | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_cost", description=__doc__.splitlines()[0])
    for name, default in (("layers", 8), ("hidden", 576), ("vocabulary", 16384), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this page")
    shape = parser.parse_args(arguments)
    folder = shape.output.resolve() / "start-cost"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_model(folder, shape)
    ours = settings_of(folder)
    runs = {"lora": (without_plugin(ours, folder), cpu_environment(**WITHOUT)), "hybrid": (ours, cpu_environment())}
    seconds: dict[str, list[dict[str, float]]] = {variant: [] for variant in runs}
    result = {
        "machine": f"{os.cpu_count()} CPU cores",
        "shape": {name: value for name, value in vars(shape).items() if isinstance(value, int)},
        "seconds": seconds,
    }
    for round_ in range(shape.rounds + 1):
        for variant in list(runs)[:: -1 if round_ % 2 else 1]:
            print(f"round {round_} of {shape.rounds}: {LABELS[variant]}", file=sys.stderr, flush=True)
            found = start(runs[variant][0], folder / f"{variant}-{round_}.log", runs[variant][1])
            if round_:  # the first one fills the caches of the disk
                seconds[variant].append(found)
        # After each round: they take minutes.
        save_figures(shape.output, "start_cost", result)
    text = report(result)
    if shape.write:
        write_page(shape.write, text, BEGIN, END)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
