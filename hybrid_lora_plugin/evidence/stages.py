"""The stages of a comparison: prepare, choose, tune, freeze, compare, report; each goes on where it was ended."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.config_evidence import EVIDENCE_STAGES, EvidenceCommandConfig, EvidencePlanConfig
from hybrid_lora_plugin.errors import ConfigurationError, HybridLoraError
from hybrid_lora_plugin.evidence.frozen import FROZEN, freeze, read_frozen, refuse_changed_plan
from hybrid_lora_plugin.evidence.plan_file import read_plan
from hybrid_lora_plugin.evidence.protocol import Arm, Outcome, Protocol, Run, Start
from hybrid_lora_plugin.evidence.protocols import open_protocol, refuse_unknown_kinds
from hybrid_lora_plugin.evidence.results import canonical
from hybrid_lora_plugin.evidence.study import Prepared, Study
from hybrid_lora_plugin.evidence.tuning import tuning_draws
from hybrid_lora_plugin.files import complete_file

PLAN = "plan.yaml"
#: Runs that a process trains before it gives its outcomes: a multiple of what a replica protocol trains at once.
PART = 16
#: for what the protocol keeps
_KEPT = "protocol"


class Watch:
    """What is told of a comparison while it runs; silent as it is here."""

    def say(self, line: str) -> None:
        """Something to know."""

    def stage(self, text: str, total: int) -> None:
        """Something else begins, of ``total`` parts."""

    def advance(self, parts: int) -> None:
        """So many parts more are done."""

    def close(self) -> None:
        """No more is coming."""


def run_stages(config: EvidenceCommandConfig, watch: Watch | None = None) -> Path:
    """Do what ``config.stage`` says.

    Args:
        config: with ``output_dir``, and with ``plan`` unless the folder has one.
        watch: told of it.

    Returns:
        The folder of the comparison.

    Raises:
        ConfigurationError: the plan or the folder cannot be used, or an earlier stage is not done.
    """
    watch, folder = watch or Watch(), Path(config.output_dir)
    plan, source = _plan(config, folder)
    stages = EVIDENCE_STAGES if config.stage == "all" else (config.stage,)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        refuse_changed_plan(folder, plan)
        if source is not None:
            _keep_plan(source, folder)
        work = _Work(config, plan, folder, watch)
        try:
            for stage in stages:
                getattr(work, stage)()
        finally:
            work.close()
    return folder


def _plan(config: EvidenceCommandConfig, folder: Path) -> tuple[EvidencePlanConfig, Path | None]:
    """The plan, and its file unless it is the folder's own copy."""
    if config.plan is not None:
        return read_plan(Path(config.plan)), Path(config.plan)
    if not (folder / PLAN).exists():
        raise ConfigurationError(f"plan: not given, and {folder} has none yet; write plan=FILE.yaml")
    return read_plan(folder / PLAN), None


def _keep_plan(source: Path, folder: Path) -> None:
    # A frozen one stays to the letter, so that the report does.
    if (folder / FROZEN).exists() or source.resolve() == (folder / PLAN).resolve():
        return
    with complete_file(folder / PLAN) as file:
        shutil.copyfile(source, file)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process writes to the folder meanwhile."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"output_dir: another process is at work in {folder}; wait for it, or give another folder"
            ) from error
        yield


class _Work:
    """The stages of one call; the protocol is made by the first that needs it."""

    def __init__(self, config: EvidenceCommandConfig, plan: EvidencePlanConfig, folder: Path, watch: Watch) -> None:
        self._config, self._plan, self._folder, self._watch = config, plan, folder, watch
        self._protocol: Protocol | None = None
        self._study: Study | None = None

    def close(self) -> None:
        """No more is coming."""
        if self._study is not None:
            self._study.close()
        self._watch.close()

    # -- stages

    def prepare(self) -> None:
        """The bases, and what is known of them."""
        # Of what is there already, the stages that need a base open it: a folder without work is no business of theirs.
        if self._config.stage == "prepare" or Prepared.read(self._folder) is None:
            self._open("choose")

    def cost(self) -> None:
        """Only say what there is to do."""
        self._open(None)
        study = self._made()
        for line in costs(study):
            self._watch.say(line)

    def choose(self) -> None:
        """What each selecting arm tunes at each start."""
        self.prepare()
        study = self._made()
        for line in costs(study) if not len(study.results) else ():
            self._watch.say(line)
        asked = study.unchosen()
        if not asked:
            self._watch.say("choose: nothing is left to do")
            return
        self._open("choose")
        self._watch.stage(f"choosing at {len(asked):,} starts", len(asked))
        for start, chosen in self._chosen(asked):
            study.choices.keep(start, chosen)
            self._watch.advance(1)

    def tune(self) -> None:
        """Runs at every rate, on the tuning starts."""
        study = self._chosen_already()
        done = len(study.results)
        # The steps of some arms follow from what came of the others.
        for which in ("first", "second"):
            self._train(study.untuned(which), "tuning rates" if which == "first" else "tuning rates at matched steps")
        if len(study.results) == done:
            self._watch.say("tune: nothing is left to do")

    def freeze(self) -> None:
        """Fix plan and rates under a digest."""
        study = self._chosen_already()
        if read_frozen(self._folder) is None and (seen := study.results.seeds() & set(self._plan.seeds.compare)):
            raise ConfigurationError(
                f"output_dir: {self._folder} has runs of seeds {sorted(seen)} already, so the plan cannot be fixed "
                "before they are seen; give another output_dir"
            )
        if read_frozen(self._folder) is None:
            self._open("train")  # what runs depend on is frozen too, also where nothing was tuned before
        self._watch.say(f"frozen: {freeze(study)}")

    def compare(self) -> None:
        """The arms at the starts that count."""
        study = self._chosen_already()
        if read_frozen(self._folder) is None:
            raise ConfigurationError(f"stage: nothing is frozen in {self._folder} yet; run stage=freeze first")
        freeze(study)
        if runs := study.uncompared():
            self._train(runs, "comparing arms")
        else:
            self._watch.say("compare: nothing is left to do")

    def report(self) -> None:
        """``report.md`` and its pictures, from the raw results alone."""
        from hybrid_lora_plugin.evidence.report import write_report

        study = self._made()
        if read_frozen(self._folder) is None:
            raise ConfigurationError(f"stage: nothing is frozen in {self._folder} yet; run stage=freeze first")
        digest = freeze(study)
        write_report(study, digest, (self._folder / PLAN).read_text())
        self._watch.say(f"report: {self._folder / 'report.md'}")

    # -- what they share

    def _made(self) -> Study:
        if self._study is None:
            prepared = Prepared.read(self._folder)
            if prepared is None:
                raise ConfigurationError(f"stage: nothing is prepared in {self._folder} yet; run stage=prepare first")
            self._refuse_other(prepared.protocol, self._asked_protocol(), "")
            self._study = Study(self._plan, self._folder, prepared)
        return self._study

    def _chosen_already(self) -> Study:
        study = self._made()
        if missing := study.unchosen():
            raise ConfigurationError(
                f"stage: arms have not chosen their modules at {len(missing):,} starts yet; run stage=choose first"
            )
        return study

    def _asked_protocol(self) -> dict[str, Any]:
        plan = self._plan
        return {"name": plan.protocol, "settings": plan.settings, "bases": plan.bases, "tasks": plan.tasks}

    def _open(self, purpose: str | None) -> Protocol:
        """The protocol with its bases; what it is identified by is noted for ``choose`` or ``train``, or checked."""
        if self._protocol is None:
            plan = self._plan
            self._protocol = open_protocol(
                plan.protocol, plan.settings, self._folder / _KEPT, self._config.device, plan.bases, plan.tasks
            )
            refuse_unknown_kinds(self._protocol, plan)
            self._protocol.prepare(self._watch.say)
        protocol, prepared = self._protocol, Prepared.read(self._folder)
        if prepared is None:
            prepared = Prepared(
                protocol.measure,
                protocol.lower_is_better,
                {base: protocol.candidates(base) for base in self._plan.bases},
                {},
                self._asked_protocol(),
            )
            prepared.write(self._folder)
        self._refuse_other(prepared.protocol, self._asked_protocol(), "")
        if purpose is not None:
            # As it is in the file, where a tuple is a list.
            identity = json.loads(canonical(protocol.identity()))
            if purpose in prepared.identity:
                self._refuse_other(prepared.identity[purpose], identity, "identity: ")
            else:
                prepared = dataclasses.replace(prepared, identity=prepared.identity | {purpose: identity})
                prepared.write(self._folder)
                if self._study is not None:
                    self._study.prepared = prepared
        return protocol

    def _refuse_other(self, before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                how = f"set OMP_NUM_THREADS={before.get(name)}" if name == "threads" else "put it back"
                raise ConfigurationError(
                    f"{what}{name}: is {now.get(name)!r} and was {before.get(name)!r} when results were made in "
                    f"{self._folder}; {how}, or give another output_dir"
                )

    def _train(self, runs: Sequence[Run], text: str) -> None:
        if not runs:
            return
        protocol, study = self._open("train"), self._made()
        steps = sum(run.steps for run in runs)
        self._watch.say(f"{text}: {len(runs):,} runs, {steps:,} steps")
        self._watch.stage(f"{text}, steps", steps)
        kept = said = 0

        def stepped(steps: int) -> None:
            nonlocal said
            said += steps
            self._watch.advance(steps)

        def keep(run: Run, outcome: Outcome) -> None:
            nonlocal kept
            study.results.keep(run, outcome)
            kept += run.steps
            if said < kept:
                stepped(kept - said)

        if self._config.workers > 1 and protocol.trains_in_processes:
            for run, outcome in self._trained(runs):
                keep(run, outcome)
        else:
            protocol.stepped = stepped
            protocol.train(runs, keep)
        if missing := [run for run in runs if study.results.get(run) is None]:
            raise HybridLoraError(
                f"the protocol gave no outcome of {len(missing)} runs, {missing[0].arm} at {missing[0].start} the first"
            )

    def _chosen(self, asked: Sequence[tuple[Start, list[Arm]]]) -> Iterator[tuple[Start, list[tuple]]]:
        if self._config.workers == 1 or len(asked) == 1:
            for start, arms in asked:
                yield start, _named(arms, self._open("choose").choose(start, arms))
            return
        with self._workers(len(asked)) as pool:
            waiting = {pool.submit(_choose, start, arms): (start, arms) for start, arms in asked}
            for done in as_completed(waiting):
                start, arms = waiting[done]
                yield start, _named(arms, done.result())

    def _trained(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Outcome]]:
        """Outcomes from several processes, in the order in which they come."""
        parts = alike(runs, PART)
        with self._workers(len(parts)) as pool:
            for done in as_completed([pool.submit(_train, part) for part in parts]):
                yield from done.result()

    @contextmanager
    def _workers(self, parts: int) -> Iterator[ProcessPoolExecutor]:
        """Processes with a protocol of their own each, which end with this."""
        plan = self._plan
        made = (plan.protocol, plan.settings, self._folder / _KEPT, self._config.device, plan.bases, plan.tasks)
        count = min(self._config.workers, parts)
        # A forked process would have torch's threads without the threads.
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, made)
        try:
            yield pool
        except BaseException:
            # Before the pool forgets them: what they are at would keep an interrupted command for minutes.
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
        pool.shutdown()


def alike(runs: Sequence[Run], size: int) -> list[list[Run]]:
    """Parts of at most ``size`` runs that can train at once: of one base and task, and of one kind.

    A part that is smaller than a protocol's group costs as much as a whole one, so they are not cut finer.
    """
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        choice = run.choice
        kind = run.start.base, run.start.task, choice.rank, choice.dora, bool(choice.full)
        found.setdefault(kind, []).append(run)
    return [members[at : at + size] for members in found.values() for at in range(0, len(members), size)]


def _named(arms: Sequence[Arm], chosen: Mapping[str, Sequence[str]]) -> list[tuple]:
    return [(arm.name, arm.selection, chosen[arm.name]) for arm in arms]


_of_this_process: Protocol | None = None


def _begin(*made: Any) -> None:
    """In a process that chooses or trains: the protocol, one thread, and no word on Ctrl-C, which ends the parent."""
    global _of_this_process
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _of_this_process = open_protocol(*made)
    _of_this_process.prepare(lambda line: None)


def _train(runs: Sequence[Run]) -> list[tuple[Run, Outcome]]:
    kept: list[tuple[Run, Outcome]] = []
    _of_this_process.train(runs, lambda run, outcome: kept.append((run, outcome)))
    return kept


def _choose(start: Start, arms: Sequence[Arm]) -> dict[str, tuple[str, ...]]:
    return _of_this_process.choose(start, arms)


def costs(study: Study) -> list[str]:
    """Runs and steps of each stage, at most: arms that choose the same modules share theirs."""
    plan, cells = study.plan, len(study.cells)
    tuned = [arm for arm in study.arms if study.tunes(arm)]
    tuning = sum(len(study.grid(arm)) * len(tuning_draws(plan, arm.draws)) for arm in tuned)
    draws = sum(arm.draws for arm in study.arms)
    lines = [f"{len(study.arms)} arms: {', '.join(arm.name for arm in study.arms)}"]
    for text, runs in (
        ("tune", tuning * cells * len(plan.seeds.tune)),
        ("compare", draws * cells * len(plan.seeds.compare)),
    ):
        if runs:
            lines.append(f"{text}: at most {runs:,} runs, about {runs * plan.steps:,} steps")
    starts = len(study.starts([*(plan.seeds.tune if any(arm.selects for arm in tuned) else ()), *plan.seeds.compare]))
    lines.insert(1, f"choose: {starts:,} starts")
    if len(tuned) < len(study.arms):
        given = ", ".join(arm.name for arm in study.arms if arm not in tuned)
        lines.insert(2, f"tune: not {given}: the plan gives one pair of rates")
    return lines
