"""One real ``verl.trainer.main_ppo`` run as a child process, with its progress shown and its metrics kept."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recipes.demo.environment import cpu_environment

ROOT = Path(__file__).parents[2]

#: what verl and Ray print on their way up, and what that means; start-up is most of a short run
_PHASES = (
    ("probing first with the policy objective", "policy probe: a verl run of its own comes first"),
    ("hybrid_lora: allocation written to", "policy probe: allocation written"),
    ("Started a local Ray instance", "Ray is up, starting the trainer"),
    ("dataloader initialized", "data loaded, starting the actor"),
    ("actor and ref model engine initialized", "actor built under the allocation, starting vLLM"),
    ("checkpoint engine manager initialized", "vLLM is up, starting the agent workers"),
    ("Saving checkpoint to", "saving the checkpoint"),
)


class RunFailed(RuntimeError):
    """The verl process ended with an error; the message says where its output is."""


@dataclass(frozen=True)
class Step:
    """One line of verl's metrics file: a step number and its metrics."""

    number: int
    metrics: dict[str, float]


def read_metrics(path: Path) -> list[Step]:
    """The steps that verl's file logger has written so far; a line still being written is left for later."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [Step(row["step"], row["data"]) for row in map(json.loads, lines[:-1])]


def probe_metrics_of(metrics: Path) -> Path:
    """Where the steps of a policy probe go, beside those of the run (``verl_backend/probe/policy.py``)."""
    return metrics.with_suffix(f".probe{metrics.suffix}")


def show_nothing(_: str) -> None:
    """A progress function that says nothing."""


def run_verl(
    overrides: list[str],
    *,
    metrics: Path,
    log: Path,
    steps: int,
    say: Callable[[str], None] = show_nothing,
    describe: Callable[[Step], str] = lambda step: "",
    environment: Mapping[str, str] | None = None,
    limit: float = math.inf,
) -> list[Step]:
    """Run a recipe's training and return its metrics, the initial validation as step 0 first.

    Args:
        overrides: Hydra overrides of ``main_ppo``.
        metrics, log: files for verl's metrics and everything printed.
        steps: training steps asked for, for the progress lines.
        say: shows a progress line.
        describe: turns a step into the rest of its progress line.
        environment: of the process; None is this one's, with what a machine without a GPU needs.
        limit: seconds after which the run is ended.

    Raises:
        RunFailed: the process ended with an error, or took longer than its limit.
    """
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(ROOT / "recipes"), *overrides]
    environment = cpu_environment() if environment is None else environment
    environment = {**environment, "VERL_FILE_LOGGER_PATH": str(metrics), "PYTHONUNBUFFERED": "1"}
    started, shown, probed, phases = time.monotonic(), 0, 0, list(_PHASES)
    with log.open("w") as output:
        output.write(shlex.join(command) + "\n\n")
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with log.open() as tail:
                first_step = None
                while True:
                    ended = process.poll() is not None
                    text = tail.read()
                    while phases and any(mark in text for mark, _ in phases):
                        mark, meaning = phases.pop(0)
                        if mark in text:
                            say(f"  {time.monotonic() - started:5.0f} s  {meaning}")
                    for step in read_metrics(probe_metrics_of(metrics))[probed:]:
                        probed += 1
                        say(f"  {time.monotonic() - started:5.0f} s  probe step {step.number}  {describe(step)}")
                    for step in read_metrics(metrics)[shown:]:
                        shown += 1
                        first_step = first_step or (step.number, time.monotonic())
                        left = ""
                        if step.number > first_step[0]:
                            pace = (time.monotonic() - first_step[1]) / (step.number - first_step[0])
                            left = f"  {max(0, steps - step.number) * pace:4.0f} s left"
                        say(
                            f"  {time.monotonic() - started:5.0f} s  step {step.number}/{steps}  {describe(step)}{left}"
                        )
                    if ended:
                        break
                    if time.monotonic() - started > limit:
                        raise RunFailed(f"verl took longer than {limit:.0f} s; {end_of(log)}")
                    time.sleep(0.5)
        except BaseException:
            stop(process)
            raise
    stop(process)
    if process.returncode != 0:
        raise RunFailed(f"verl ended with exit status {process.returncode}; {end_of(log)}")
    return read_metrics(metrics)


def end_of(log: Path, lines: int = 25) -> str:
    """Where a process's output is, and its last lines."""
    end = "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return f"its output is in {log}, the end of it:\n{end}"


def new_run_folder(output: Path) -> Path:
    """``output/run-N`` with the next free number."""
    taken = [int(p.name[4:]) for p in output.glob("run-*") if p.name[4:].isdigit()]
    folder = output / f"run-{max(taken, default=0) + 1}"
    folder.mkdir(parents=True)
    return folder


def stop(process: subprocess.Popen) -> None:
    """End the process and the Ray processes of its session; nothing of a run outlives it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
