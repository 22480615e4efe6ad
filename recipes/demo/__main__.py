"""``make demo``: base model → probe → allocation → verl GSPO run → proof → export → report, on two CPU cores.

Everything real: the run is ``verl.trainer.main_ppo`` with Ray, FSDP2 and vLLM. The base model is cached; probe and
training are made anew every time, in a numbered folder, so that nothing of an earlier run is lost or mixed in.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from hybrid_lora_plugin.allocation import load_allocation
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.training.checkpoint import FOLDER, load_description
from recipes.demo import evidence, lora_run
from recipes.demo.environment import cpu_environment
from recipes.demo.lessons import LESSONS, Lesson, hybrid_overrides, run_overrides
from recipes.demo.memory import PeakMemory
from recipes.demo.report import Findings, print_summary, write_report
from recipes.demo.verl_run import ROOT, RunFailed, Step, new_run_folder, probe_metrics_of, read_metrics, run_verl

#: share of a lesson's steps from which on a demo must gain something; a run of a few steps only has to work
FULL_DEMO = 0.8


def say(line: str) -> None:
    print(line, flush=True)


class Stages:
    """Announces the stages and measures them."""

    def __init__(self, names: list[str]):
        self._names, self.seconds = names, {}

    @contextmanager
    def __call__(self, name: str, doing: str):
        say(f"[{self._names.index(name) + 1}/{len(self._names)}] {doing}")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def command(module: str, *arguments: str) -> None:
    """Run one of the plugin's commands as a user would; its output is shown.

    Raises:
        RunFailed: it ended with an error.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=cpu_environment(OMP_NUM_THREADS="2")
    )
    if done.returncode != 0:
        raise RunFailed(f"{module} ended with exit status {done.returncode}")


def probe(lesson: Lesson, model: Path, rows: Path, folder: Path) -> None:
    """Write the allocation of the demo's model to ``folder``."""
    command(
        "hybrid_lora_plugin.cli.probe",
        f"model.path={model}",
        f"probe.files={rows}",
        f"lora.rank={lesson.rank}",
        *lesson.selection,
        *(f"probe.{name}={value}" for name, value in lesson.probes["sft"].items()),
        f"output_dir={folder}",
    )


def on_the_fly(lesson: Lesson, objective: str, rows: Path) -> list[str]:
    """Overrides of a run that is given no allocation and probes first."""
    settings = [f"hybrid_lora.{option}" for option in lesson.selection]
    settings += [f"hybrid_lora.probe.{name}={value}" for name, value in lesson.probes[objective].items()]
    return settings + ([f"hybrid_lora.probe.files=[{rows}]"] if objective == "sft" else [])


def describe(step: Step) -> str:
    """Reward, accuracy and sync proof of a step, as far as it has them."""
    parts = []
    if (reward := evidence.reward_of(step)) is not None:
        parts.append(f"reward {reward:.3f}")
    if (accuracy := evidence.accuracy_of(step)) is not None:
        parts.append(f"validation accuracy {accuracy:.3f}")
    if evidence.PROBS_DIFF in step.metrics:
        parts.append(f"rollout/trainer difference {step.metrics[evidence.PROBS_DIFF]:.1e}")
    return "  ".join(parts)


def counts_line(log: Path) -> str:
    """What the engine printed about its parameters."""
    for line in log.read_text().splitlines():
        _, found, rest = line.partition("hybrid_lora: ")
        if found and "modules fully tuned" in rest:
            return rest.partition(";")[0].strip()
    return "not found in the log"


def demo(
    output: Path,
    steps: int | None,
    cache: Path,
    ranks: int = 1,
    objective: str | None = None,
    overrides: list[str] | None = None,
    lesson: Lesson = LESSONS["carry"],
    beside_lora: bool = False,
) -> int:
    """Run every stage; returns 0 if every check holds, else 1.

    Args:
        output: folder for reports and runs.
        steps: training steps; None for as many as the lesson has.
        cache: folder for the base model.
        ranks: trainer ranks.
        objective: the run probes on the fly with it; None probes before the run.
        overrides: more Hydra overrides of the verl run, e.g. ``["hybrid_lora.sync=adapter"]``.
        lesson: what is learnt.
        beside_lora: train LoRA alone of the same size as well, and show both.
    """
    steps = lesson.steps if steps is None else steps
    names = ["model", *(["probe"] if objective is None else []), "train", *(["lora"] if beside_lora else [])]
    stage = Stages([*names, "export", "report"])
    output.mkdir(parents=True, exist_ok=True)
    with PeakMemory() as memory:
        with stage("model", f"base model of the lesson {lesson.name}, cached in {cache}"):
            files = lesson.prepare(cache)
        run = new_run_folder(output)
        artifact = run / "allocation" if objective is None else run / "checkpoints" / "allocation"
        if objective is None:
            with stage("probe", "probe: which modules does LoRA serve worst?"):
                probe(lesson, files.model, files.probe_rows, artifact)
            allocated = [f"hybrid_lora.allocation={artifact}"]
        else:
            allocated = on_the_fly(lesson, objective, files.probe_rows)
        probing = "" if objective is None else f"probe on the fly (objective {objective}), then "
        both = run_overrides(lesson, files, steps, ranks)
        with stage("train", f"{probing}verl GSPO run, {steps} steps, log in {run / 'verl.log'}"):
            results = run_verl(
                [
                    *hybrid_overrides(lesson),
                    *both,
                    *allocated,
                    f"trainer.save_freq={steps}",
                    f"trainer.default_local_dir={run / 'checkpoints'}",
                    f"trainer.validation_data_dir={run / 'validation'}",
                    f"hydra.run.dir={run / 'hydra'}",
                    *(overrides or []),
                ],
                metrics=run / "metrics.jsonl",
                log=run / "verl.log",
                steps=steps,
                say=say,
                describe=describe,
            )
            allocation = load_allocation(artifact)
        lora = None
        if beside_lora:
            matched = lora_run.rank_of_size(files.model, allocation)
            doing = f"LoRA alone of rank {matched.rank}, as many steps, log in {run / 'lora' / 'verl.log'}"
            with stage("lora", doing):
                lora = lora_run.train(lesson, matched, steps, both, run / "lora", say, describe)
        with stage("export", "export: a plain Hugging Face folder"):
            exported, checkpoint = run / "exported", run / "checkpoints" / f"global_step_{steps}"
            command(
                "hybrid_lora_plugin.cli.export",
                f"checkpoint={checkpoint}",
                f"output_dir={exported}",
            )
    with stage("report", "checks and report"):
        dtype = load_description(checkpoint / "actor" / FOLDER).rollout_dtype
        generations = run / "validation" / f"{steps}.jsonl"
        checks = [
            evidence.check_steps(results, steps),
            evidence.check_rollout_weights(results, steps, dtype),
            evidence.check_proven(results, steps),
            *([] if dtype == "float32" else [evidence.check_arrived(results, steps)]),
            evidence.check_reference(results),
            evidence.check_export(exported, files.rows["validation"], generations, dtype),
        ]
        if objective == "policy":
            settings = lesson.probes["policy"]
            probe_steps = read_metrics(probe_metrics_of(run / "metrics.jsonl"))
            asked = settings["warmup_steps"] + settings["partitions"]
            checks.append(evidence.check_rollout_weights(probe_steps, asked, dtype, of="rollouts of the probe"))
        if steps >= FULL_DEMO * lesson.steps:
            checks.append(evidence.check_accuracy(results, lesson.least_gain))
    findings = Findings(
        model=lesson.model,
        steps=results,
        allocation=allocation,
        counts=counts_line(run / "verl.log"),
        dtype=dtype,
        checks=checks,
        seconds=stage.seconds,
        peak_memory=memory.peak,
        exported=exported,
        lora=lora,
    )
    report = write_report(findings, run, artifact / "heatmap.png")
    for name in ("report.md", "curves.png", "heatmap.png"):
        shutil.copyfile(run / name, output / name)
    print_summary(findings)
    say(f"report: {output / report.name} (this run's own copy: {report})")
    return 0 if all(check.holds for check in checks) else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help="training steps (default: the lesson's; the full demo needs at least four fifths of them)",
    )
    parser.add_argument(
        "--lesson",
        choices=tuple(LESSONS),
        default="carry",
        help="what is learnt: carry in 24 steps (default), or last_digits in 90, where LoRA lagged in plain torch",
    )
    parser.add_argument(
        "--beside-lora", action="store_true", help="train LoRA alone of the same size as well, and show both"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for probe, runs and report")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder for the base model and data")
    parser.add_argument(
        "--ranks", type=int, default=1, choices=(1, 2), help="trainer ranks, each with a vLLM (default 1)"
    )
    parser.add_argument(
        "--on-the-fly",
        choices=("sft", "policy"),
        default=None,
        help="let the run probe for itself, with this objective (default: probe before the run)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="more settings of the verl run, e.g. hybrid_lora.sync=adapter"
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps: {options.steps} is too few; give at least 2, so that a step follows a weight sync")
    try:
        return demo(
            options.output.resolve(),
            options.steps,
            options.cache.resolve(),
            options.ranks,
            options.on_the_fly,
            options.overrides,
            LESSONS[options.lesson],
            options.beside_lora,
        )
    except (ConfigurationError, RunFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "demo: interrupted; a finished base model is kept, and what the run left is in its folder", file=sys.stderr
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
