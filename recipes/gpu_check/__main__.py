"""``make gpu-check``: the demo's line, every sync mode and the costs on one CUDA GPU, on one page.

    python -m recipes.gpu_check [--output outputs/gpu-check] [--minutes 20] [--runs merge,adapter] [KEY=VALUE …]

A random model of Qwen2.5-0.5B's shape is probed, trained by GSPO in verl with vLLM, and exported, in bfloat16, with
sleep mode, CUDA graphs and vLLM's own executor. Nothing is downloaded. Exit status 0: every check that ran holds; 1: a
check or a stage failed; 3: nothing could be checked here, in one line.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from recipes.gpu_check import device as devices
from recipes.gpu_check.budget import FAILED, MINUTES, Budget
from recipes.gpu_check.runs import RUNS, Files, Run, overrides_of
from recipes.gpu_check.versions import missing, system, versions

PROGRAM = "gpu-check"
#: warm-up, partitions and rate of the probe; enough to go through all of it
PROBE = {"warmup_steps": 20, "partitions": 6, "batch_size": 8, "max_length": 64}
VALIDATION_ROWS, TRAINING_ROWS, SFT_ROWS = 32, 512, 256


def say(line: str) -> None:
    print(line, flush=True)


def find_device(kind: str, output: Path) -> devices.Device:
    """The device to check.

    Raises:
        NothingToCheck: there is no GPU, or it, its machine or its packages do not suffice.
    """
    if kind == "cpu":
        found = devices.the_cpu()
    else:
        found = devices.choose_gpu(devices.look_at_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    extra = "gpu" if kind == "cuda" else "cpu"
    if lacking := missing(extra):
        raise devices.NothingToCheck(
            f"{', '.join(lacking)} not installed with {sys.executable}; install the extra {extra} as the README says"
        )
    devices.require_enough(found, devices.NEEDS[kind], output)
    return found


class GpuCheck:
    """One check: its stages, in order, and what they leave.

    Args:
        device: what is checked.
        options: of the command line.
        files: where everything goes.
    """

    def __init__(self, device: devices.Device, options: argparse.Namespace, files: Files):
        from recipes.gpu_check.model import Shape
        from recipes.gpu_check.page import Findings

        self.device, self.options, self.files = device, options, files
        self.shape = Shape(options.layers, options.hidden, options.vocabulary)
        self.environment = devices.environment_of(device)
        self.budget = Budget(options.minutes, say)
        notes = devices.notes_of(device)
        if options.overrides:
            notes.append(f"every verl run also had {shlex.join(options.overrides)}")
        self.findings = Findings(
            device=device,
            system=system(),
            versions=versions("gpu" if device.kind == "cuda" else "cpu"),
            notes=notes,
            shape=str(self.shape),
            minutes=options.minutes,
            command=options.command,
            outcomes=self.budget.outcomes,
        )
        for note in notes:
            say(f"note: {note}")

    def command(self, stage: str, module: str, *arguments: str, limit: float) -> None:
        """Run a module of Python as a process of its own.

        Raises:
            RunFailed: it ended with an error, or took longer than ``limit`` seconds.
        """
        from recipes.demo.verl_run import ROOT, RunFailed, end_of, stop

        log = self.files.log(stage)
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                raise RunFailed(f"{module} took longer than {limit:.0f} s; {end_of(log)}") from None
            finally:
                stop(process)
        if process.returncode != 0:
            raise RunFailed(f"{module} ended with exit status {process.returncode}; {end_of(log)}")

    def make_model(self, limit: float) -> None:
        from recipes.demo import task

        sizes = [f"--{name}={value}" for name, value in vars(self.shape).items()]
        self.command("model", "recipes.gpu_check.model", str(self.files.model), *sizes, limit=limit)
        task.write_rl_parquet(self.files.data, train=TRAINING_ROWS, validation=VALIDATION_ROWS)
        task.write_sft_jsonl(self.files.rows, count=SFT_ROWS)

    def probe(self, limit: float) -> None:
        self.command(
            "probe",
            "hybrid_lora_plugin.cli.probe",
            f"model.path={self.files.model}",
            f"probe.files=[{self.files.rows}]",
            *(f"probe.{name}={value}" for name, value in PROBE.items()),
            f"output_dir={self.files.allocation}",
            limit=limit,
        )

    def train(self, run: Run, limit: float) -> None:
        """One verl run; what it logged is judged even where it ended early."""
        from hybrid_lora_plugin.allocation import load_allocation
        from recipes.demo.verl_run import read_metrics, run_verl
        from recipes.gpu_check.evidence import checks_of

        steps, metrics = run.steps_of(self.options.steps), self.files.metrics(run.name)
        overrides = overrides_of(run, self.files, steps, self.device.kind, not self.device.no_flash_attention)
        try:
            run_verl(
                [*overrides, *self.options.overrides],
                metrics=metrics,
                log=self.files.log(run.name),
                steps=steps,
                say=say,
                environment=self.environment,
                limit=limit,
            )
        finally:
            if logged := read_metrics(metrics):
                allocation = load_allocation(self.files.allocation) if run.sync else None
                self.findings.steps[run.name] = logged
                self.findings.checks += checks_of(run, logged, steps, allocation)

    def export(self, limit: float) -> None:
        import json

        from hybrid_lora_plugin.allocation import load_allocation
        from recipes.gpu_check.evidence import check_answers, check_kept

        step, result = RUNS["merge"].steps_of(self.options.steps), self.files.folder / "export.json"
        places = (
            self.files.checkpoint(step),
            self.files.exported,
            self.files.data / "validation.parquet",
            self.files.validation(step),
            result,
        )
        self.command("export", "recipes.gpu_check.export", *map(str, places), limit=limit)
        found = json.loads(result.read_text())
        trained, allocation = self.findings.steps["merge"], load_allocation(self.files.allocation)
        self.findings.checks += [
            check_kept(found["kept"], found["dtype"], trained, allocation),
            check_answers(found["same"], found["prompts"]),
        ]

    def wait_for_memory(self) -> None:
        """After a run that failed: until its processes have given the GPU back, half a minute at most."""
        if self.device.kind != "cuda":
            return
        for _ in range(3):
            time.sleep(5)
            try:
                free = devices.choose_gpu(devices.look_at_gpus(self.device.visible), self.device.visible).free
            except devices.NothingToCheck as reason:
                self.findings.notes.append(f"after a failed run: {reason}")
                return
            if free >= 0.9 * self.device.free:
                return
        self.findings.notes.append(
            f"after a failed run {free / devices.GIB:.1f} GiB of the GPU were free, at the start "
            f"{self.device.free / devices.GIB:.1f}: later runs had less"
        )

    def __call__(self) -> bool:
        """Every stage; returns whether everything that ran holds."""
        files, budget = self.files, self.budget
        budget.run("model", f"random Qwen2: {self.shape}", self.make_model, log=files.log("model"))
        budget.run("probe", "which modules does LoRA serve worst?", self.probe, ("model",), files.log("probe"))
        for run in RUNS.values():
            if run.name not in self.options.runs:
                budget.leave_out(run.name, "not asked for (--runs)")
            else:
                steps = run.steps_of(self.options.steps)
                needs = ("model", "probe") if run.sync else ("model",)
                doing = f"verl GSPO run, {steps} steps, {run.title}; log in {files.log(run.name)}"
                budget.run(run.name, doing, lambda limit, run=run: self.train(run, limit), needs, files.log(run.name))
                if budget.outcomes[run.name].state == FAILED:
                    self.wait_for_memory()
            if run.saves:
                budget.run(
                    "export", "a plain Hugging Face folder", self.export, needs=(run.name,), log=files.log("export")
                )
        return self.findings.holds


def check(device: devices.Device, options: argparse.Namespace) -> int:
    """Run the check and write its page; returns the exit status."""
    from recipes.demo.verl_run import new_run_folder
    from recipes.gpu_check import page

    folder = new_run_folder(options.output)
    files = Files(folder, folder / "weights")
    say(f"gpu-check: {device.name}, at most {options.minutes:g} minutes; everything goes to {folder}")
    one = GpuCheck(device, options, files)
    try:
        one()
    finally:
        # Gigabytes that nobody needs to read the page; also what was found before an interruption is written.
        if not options.keep:
            shutil.rmtree(files.weights, ignore_errors=True)
        report = page.write(one.findings, folder)
        for name in ("report.md", "figures.json", "curves.png"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, options.output / name)
    for claim in one.findings.checks:
        say(f"{'holds ' if claim.holds else 'FAILED'} {claim.claim}: {claim.seen}")
    say(f"{one.findings.verdict}")
    say(f"page: {options.output / report.name}, figures beside it in figures.json (this run's own: {folder})")
    if not one.findings.holds:
        return 1
    return 0 if one.findings.checks else 3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.gpu_check",
        description=__doc__.split("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu-check"), help="folder of runs and page")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for everything (default {MINUTES})")
    parser.add_argument(
        "--runs", default=",".join(RUNS), help=f"verl runs, separated by commas (default: all, {', '.join(RUNS)})"
    )
    parser.add_argument("--steps", type=int, default=6, help="training steps of the run that is exported (default 6)")
    parser.add_argument("--keep", action="store_true", help="keep model, checkpoint and export, some 5 GB")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the check itself, without a GPU"
    )
    for name, value, unit in (
        ("layers", 24, "decoder layers"),
        ("hidden", 896, "width"),
        ("vocabulary", 151936, "tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{unit} of the model (default {value})")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="more settings of every verl run")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    options.command = shlex.join(["python", "-m", "recipes.gpu_check", *given])
    options.output = options.output.resolve()
    options.runs = options.runs.split(",")
    unknown = [name for name in options.runs if name not in RUNS]
    if unknown:
        parser.error(f"--runs: {unknown[0]!r} does not exist; choose from {', '.join(RUNS)}")
    if options.steps < 2:
        parser.error(f"--steps: {options.steps} is too few; give at least 2, so that a step follows a weight sync")
    if not options.minutes > 0:
        parser.error(f"--minutes: {options.minutes:g} is no time; give more than 0, e.g. {MINUTES}")
    if options.hidden < 64 or options.hidden % 64:
        parser.error(f"--hidden: {options.hidden} is not usable; give a multiple of 64, the size of a head")
    if options.vocabulary < 512:
        parser.error(f"--vocabulary: {options.vocabulary} is not usable; give at least 512 tokens")
    if options.layers < 1:
        parser.error(f"--layers: {options.layers} is not usable; give at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        device = find_device(options.device, options.output)
    except devices.NothingToCheck as reason:
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return 3
    # As an interruption: what was started ends with this process, and the page is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return check(device, options)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; what was found is in {options.output}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
