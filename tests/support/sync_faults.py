"""Faults in real weight syncs: is each one caught before the next rollout, and named?

    python -m tests.support.sync_faults [--faults 120] [--seed 0] [--modes merge,sparse_merge,adapter,receiver_merge]
                                     [--tensor-parallel 1|2] [--kills 2] [--output outputs/sync-faults]

Real replicas of verl with vLLM on the CPU, fed by a small hybrid model through the plugin's own sender. Before every
fault the model moves and a healthy sync brings it over; then it moves again, and the next sync has the fault. Checked
are: the sync fails on every trainer rank and within its limits; the error has the tensor's name; nothing is generated
afterwards; no file of model or allocation has changed; and, after one more healthy sync, the log-probabilities of a
prompt are the trainer's. That last sync only lets one replica serve many faults: a training run ends.

Exit status 1 if one fault was missed, late or unnamed. ``faults.json`` in the output folder has every one of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.demo.environment import cpu_environment
from tests.support import rollout_harness as processes
from tests.support.faults import KINDS, MODES, Fault, draw_fault, draw_faults, part_of
from tests.support.rollout_harness import ROOT, RolloutHarness, SyncHangs, SyncRefused, start_side_by_side, stop_ray

PROMPT = list(range(5, 45))
#: what an engine is started with for a mode that does not run in a plain one in fp32
ENGINES = {
    "adapter": {},
    # Updates that change a few per cent of 16 bits: with larger ones it would send whole weights.
    "sparse_merge": {"dtype": "bfloat16", "scale": 1e-3},
}
#: ``hybrid_lora.sync_timeout`` where a fault is that nothing happens, seconds
SHORT_TIMEOUT = 3.0
#: a process that died is noticed in fewer seconds, far below ``sync_timeout``
NOTICED = 20.0
KILLS = tuple(kind for kind, known in KINDS.items() if known.kill)


# -- one fault -------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one fault."""

    kind: str
    mode: str
    where: str
    seed: int
    rank: int
    #: the damaged tensor, the lost weight, or the tensor before which a process stopped
    victim: str
    #: the error a training run would end with; for a killed sender, the rollout engine's
    message: str
    #: until then
    seconds: float
    #: most seconds it may take
    limit: float
    #: the sync failed, on every rank
    caught: bool
    #: the error names the tensor, or what else was wrong
    named: bool
    #: why nothing is generated afterwards, "" where it is
    refusal: str
    #: no file of model or allocation has changed
    intact: bool
    #: of log-probabilities after one more healthy sync; None where there was none
    difference: float | None = None
    #: the largest that this may be
    agrees: float = 1e-3

    @property
    def problems(self) -> list[str]:
        """What is wrong with it, in words; empty if it was caught in time and named."""
        found = {
            "missed": not self.caught,
            f"late, after {self.seconds:.1f} s": self.seconds > self.limit,
            "not named": self.caught and not self.named,
            "tokens were generated": not self.refusal,
            "files changed": not self.intact,
            f"then off by {self.difference}": self.difference is not None and not self.difference <= self.agrees,
        }
        return [text for text, wrong in found.items() if wrong]


def digests(*folders: Path) -> dict[str, str]:
    """SHA-256 of every file in these folders, by path."""
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def inject(replica: RolloutHarness, fault: Fault, files: dict[str, str]) -> Outcome:
    """Bring one fault about, and make the replica healthy again.

    Args:
        replica: with weights of any kind.
        fault: any that kills nothing.
        files: ``digests`` of model and allocation from the beginning.
    """
    replica.update(fault.seed)
    replica.sync(fault.mode, keep=True)
    replica.update(fault.seed + 1)
    with _arranged(replica, fault):
        outcome = _strike(replica, fault, files, limit=2 * replica.timeout + 60)
    # A new run would begin so.
    replica.on_trainers("send_all")
    outcome.agrees = replica.agrees
    try:
        replica.sync(fault.mode)
        outcome.difference = replica.difference(PROMPT)
    except SyncRefused as refused:
        outcome.difference, outcome.message = float("inf"), f"{outcome.message}; then, healthy: {refused}"
    return outcome


def kill(replica: RolloutHarness, fault: Fault, files: dict[str, str]) -> Outcome:
    """Kill a process in the middle of a sync; the replica can only be closed after that."""
    replica.update(fault.seed)
    replica.sync(fault.mode, keep=True)
    replica.update(fault.seed + 1)
    begun = time.time()
    if fault.kind == "receiver killed":
        fault.process = replica.in_engine(processes.process_ids)[fault.rank][0]
        outcome = _strike(replica, fault, files, limit=NOTICED)
        replica.on_trainers("struck", timeout=30)  # no rank hangs
        return outcome
    outcome = _strike(replica, fault, files, limit=NOTICED)
    # The receiver has nobody left to tell: it must have given up by itself, and its worker be free again.
    reception = replica.in_engine(processes.last_reception, timeout=replica.timeout + 60)[fault.rank]
    outcome.message = reception["error"] or "the rollout engine took the sync"
    outcome.named = any(words in outcome.message for words in KINDS[fault.kind].stops)
    outcome.seconds = max(outcome.seconds, reception["at"] - begun)
    return outcome


def _strike(replica: RolloutHarness, fault: Fault, files: dict[str, str], limit: float) -> Outcome:
    """The sync with the fault in it, and what holds right after it."""
    begun, caught, message = time.monotonic(), False, "the sync succeeded"
    try:
        replica.sync(fault.mode, fault)
    except SyncRefused as refused:
        caught, message = True, str(refused)
    except SyncHangs as hanging:
        message = str(hanging)
    seconds = time.monotonic() - begun
    struck = fault
    if fault.where != "engine" and fault.kind != "sender killed":
        struck = replica.struck(fault.rank)
    return Outcome(
        fault.kind,
        fault.mode,
        fault.where,
        fault.seed,
        fault.rank,
        struck.victim,
        message,
        seconds,
        limit,
        caught,
        any(name in message for name in struck.named),
        replica.refusal(),
        digests(replica.model, replica.allocation) == files,
    )


@contextmanager
def _arranged(replica: RolloutHarness, fault: Fault) -> Iterator[None]:
    """What a fault needs beside a damaged stream, taken back afterwards."""
    usual = replica.timeout
    if fault.kind == "engine lost a weight":
        names = replica.on_trainers("unsent", fault.mode)[fault.rank]
        fitting = [name for name in names if part_of(name) == fault.part] or names
        fault.victim = random.Random(fault.seed).choice(fitting)
        fault.named = [fault.victim]
        replica.in_engine(processes.lose_weight, fault.victim, fault.rank)
    if KINDS[fault.kind].slow:
        replica.set_sync_timeout(SHORT_TIMEOUT)
        fault.pause = SHORT_TIMEOUT + 3
        fault.process = replica.in_engine(processes.process_ids)[fault.rank][0]
    try:
        yield
    finally:
        if fault.kind == "receiver silent":
            os.kill(fault.process, signal.SIGCONT)
            replica.in_engine(processes.process_ids)  # answered when it has given up that sync
            # Its socket tries to deliver the acknowledgement for two seconds, to whoever listens at that path.
            time.sleep(2.5)
        if KINDS[fault.kind].slow:
            replica.set_sync_timeout(usual)
        replica.in_engine(processes.restore_weight)


# -- many faults -----------------------------------------------------------------------------------------------------


class Replicas:
    """The replicas of a run, started when they are needed: a plain engine, one in 16 bits, and one that runs adapters.

    Args:
        folder: where model and allocation are made.
        tensor_parallel: workers of each engine.
        timeout: ``hybrid_lora.sync_timeout``, seconds.
    """

    def __init__(self, folder: Path, tensor_parallel: int, timeout: float = 60.0):
        self.model, self.allocation = make_inputs(folder)
        self.files = digests(self.model, self.allocation)
        self._tensor_parallel, self._timeout = tensor_parallel, timeout
        #: by mode, "" for the modes that share the plain engine
        self._running: dict[str, RolloutHarness] = {}
        self._started = 0

    def start(self, modes: tuple[str, ...]) -> None:
        """Start what these modes need and is not there, side by side."""
        missing = {_engine(mode): mode for mode in modes if _engine(mode) not in self._running}
        for engine, mode in missing.items():
            self._running[engine] = RolloutHarness(
                self.model,
                self.allocation,
                mode,
                number=self._started,
                tensor_parallel=self._tensor_parallel,
                timeout=self._timeout,
                **ENGINES.get(mode, {}),
            )
            self._started += 1
        start_side_by_side(*(self._running[engine] for engine in missing))

    def of(self, mode: str) -> RolloutHarness:
        """The replica for that mode."""
        return self._running[_engine(mode)]

    def close(self, mode: str) -> None:
        """End the processes of that mode's replica."""
        self._running.pop(_engine(mode)).close()


def _engine(mode: str) -> str:
    """The mode that an engine is started for; "" for one that several share."""
    return mode if mode in ENGINES else ""


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A small model whose syncs take several buckets, and an allocation with full modules with and without bias."""
    from tests.support.allocations import make_allocation
    from tests.support.tiny_models import make_tiny_qwen2

    # As most checkpoints: of other weights, rounding to nearest loses nothing in the mean.
    model = make_tiny_qwen2(folder / "model", layers=3, hidden=256, heads=4, kv_heads=2, on_grid=True)
    return model, make_allocation(model, folder / "allocation")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> list[Outcome]:
    """Inject everything; progress goes to ``say``."""
    faults = draw_faults(options.faults, options.seed, options.modes, options.tensor_parallel)
    draw = random.Random(options.seed)
    for number in range(options.kills):
        kind, mode = KILLS[number % len(KILLS)], options.modes[number % len(options.modes)]
        faults.append(draw_fault(kind, mode, draw.randrange(10**6), options.tensor_parallel))
    begun = time.monotonic()
    say(f"{len(faults)} faults in {', '.join(options.modes)}; starting the rollout engines, one to three minutes")
    replicas = Replicas(options.output, options.tensor_parallel)
    replicas.start(options.modes)
    ready, outcomes = time.monotonic(), []
    say(f"{ready - begun:5.0f} s  ready")
    for number, fault in enumerate(faults, start=1):
        replicas.start((fault.mode,))
        if KINDS[fault.kind].kill:
            outcome = kill(replicas.of(fault.mode), fault, replicas.files)
            replicas.close(fault.mode)
        else:
            outcome = inject(replicas.of(fault.mode), fault, replicas.files)
        outcomes.append(outcome)
        now = time.monotonic()
        left = (now - ready) / number * (len(faults) - number)
        verdict = "; ".join(outcome.problems) or f"caught in {outcome.seconds:.2f} s"
        say(
            f"{now - begun:5.0f} s  {number:{len(str(len(faults)))}}/{len(faults)}  {fault.mode}: {fault.kind} "
            f"({fault.where}), {verdict}  {left:4.0f} s left"
        )
        if outcome.problems:
            say(f"         {outcome.victim or 'no tensor'}: {outcome.message}")
    return outcomes


def report(outcomes: list[Outcome], modes: tuple[str, ...], seconds: float) -> str:
    """The table, as Markdown."""
    lines = [
        "injected / caught / named, longest time until the error",
        "",
        f"| fault | {' | '.join(modes)} |",
        f"| --- |{' ---: |' * len(modes)}",
    ]
    for kind in KINDS:
        cells = []
        for mode in modes:
            ours = [outcome for outcome in outcomes if (outcome.kind, outcome.mode) == (kind, mode)]
            caught, named = sum(outcome.caught for outcome in ours), sum(outcome.named for outcome in ours)
            longest = max((outcome.seconds for outcome in ours), default=0)
            cells.append(f"{len(ours)} / {caught} / {named}, {longest:.2f} s" if ours else "")
        if any(cells):
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    victims = [name for outcome in outcomes for name in outcome.victim.split(", ") if name]
    parts = ", ".join(f"{part} {count}" for part, count in sorted(Counter(map(part_of, victims)).items()))
    places = ", ".join(f"{where} {count}" for where, count in sorted(Counter(o.where for o in outcomes).items()))
    wrong = [outcome for outcome in outcomes if outcome.problems]
    apart = max((outcome.difference for outcome in outcomes if outcome.difference is not None), default=float("nan"))
    return "\n".join(
        [
            *lines,
            "",
            f"{len(outcomes)} faults in {seconds:.0f} s: {len(outcomes) - len(wrong)} caught in time and named, "
            f"{len(wrong)} not. Struck at: {places}. Hit: {parts}. After the next healthy sync log-probabilities "
            f"differ from the trainer's by at most {apart:.1e}.",
            *(f"{o.mode}: {o.kind} (seed {o.seed}): {'; '.join(o.problems)}: {o.message}" for o in wrong),
        ]
    )


# -- the command -----------------------------------------------------------------------------------------------------


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; errors end the process with one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.sync_faults", description=__doc__.splitlines()[0], usage=argparse.SUPPRESS
    )
    parser.add_argument("--faults", type=int, default=120, help="faults besides the kills, one of every kind at least")
    parser.add_argument("--seed", type=int, default=0, help="draws the faults")
    parser.add_argument("--modes", default=",".join(MODES), help="sync modes, separated by commas")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="workers of each rollout engine, 1 or 2")
    parser.add_argument("--kills", type=int, default=2, help="processes killed in mid-transfer; each costs a replica")
    parser.add_argument("--output", type=Path, default=Path("outputs/sync-faults"), help="folder for log and figures")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.modes = tuple(dict.fromkeys(filter(None, options.modes.split(","))))
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown or not options.modes:
        parser.error(f"--modes: {', '.join(unknown) or 'none'}, wanted some of {', '.join(MODES)}")
    if options.tensor_parallel not in (1, 2):
        parser.error(f"--tensor-parallel: {options.tensor_parallel}, wanted 1 or 2")
    if options.kills < 0:
        parser.error(f"--kills: {options.kills}, wanted 0 or more")
    try:
        draw_faults(options.faults, options.seed, options.modes, options.tensor_parallel)
    except ValueError as error:
        parser.error(f"--faults: {error}")
    options.output = options.output.resolve()
    return options


def inside(options: argparse.Namespace) -> int:
    """The work itself, in a session of its own; all that libraries print goes to ``log.txt``."""
    terminal = os.fdopen(os.dup(1), "w")
    with (options.output / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def say(text: str) -> None:
        print(text, file=terminal, flush=True)

    begun = time.monotonic()
    try:
        outcomes = run(options, say)
    except Exception as error:
        traceback.print_exc()
        say(f"{type(error).__name__}: {error}; more is in {options.output / 'log.txt'}")
        return 2
    finally:
        stop_ray()
    seconds = time.monotonic() - begun
    settings = {"seed": options.seed, "tensor_parallel": options.tensor_parallel, "seconds": seconds}
    found = [asdict(outcome) | {"problems": outcome.problems} for outcome in outcomes]
    (options.output / "faults.json").write_text(json.dumps(settings | {"faults": found}, indent=1) + "\n", "utf-8")
    say("\n" + report(outcomes, options.modes, seconds))
    return int(any(outcome.problems for outcome in outcomes))


def main(arguments: list[str] | None = None) -> int:
    """Inject faults and print the table; returns 1 if one was missed, late or unnamed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = arguments_of(arguments)
    if options.inside:
        return inside(options)
    for leftover in ("model", "allocation"):
        shutil.rmtree(options.output / leftover, ignore_errors=True)
    options.output.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.support.sync_faults",
        *arguments,
        "--output",
        str(options.output),
        "--inside",
    ]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, env=cpu_environment(), start_new_session=True)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = 130
    _end_session(process)
    return status


def _end_session(process: subprocess.Popen) -> None:
    """End the process and all of its session; Ray gives its workers groups of their own, but no session."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    while members := _session(process.pid):
        for member in members:
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.1)
    process.wait()


def _session(leader: int) -> list[int]:
    """Running processes of that session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
