"""Successive halving of allocations by runs of verl: each is a team's own command, for fewer steps.

Runs of a later round are resumed from the checkpoints of the earlier one by verl itself. What is compared are the
scores of the validation's answers, by prompt, which verl writes into ``trainer.validation_data_dir``.

    OUTPUT_DIR.partial/settings.json       what the trial depends on
    OUTPUT_DIR.partial/scores.json         score of each prompt, of each run and round that is done
    OUTPUT_DIR.partial/runs/NAME/          checkpoints, validation, logs and metrics of a run
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.storage import allocation_file, load_allocation, refuse_existing
from hybrid_lora_plugin.config_trial import TrialRunsCommandConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.verl_process import run_verl, within
from hybrid_lora_plugin.files import complete_file, complete_folder
from hybrid_lora_plugin.probing.resume import PartialState, partial_folder
from hybrid_lora_plugin.probing.trial.schedule import Round, cost_of, rounds_of
from hybrid_lora_plugin.probing.trial.verdict import alike, loss_difference, ranked

#: what a trial says itself of a run, in the place of what its command says
OWN = (
    "hybrid_lora.allocation",
    "trainer.total_training_steps",
    "trainer.default_local_dir",
    "trainer.resume_mode",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.validation_data_dir",
)
#: where the command gives none
SEED = "data.seed=1"
_TOTAL = "trainer.total_training_steps="
Scores = dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """One allocation, or several folders of the same modules.

    Attributes:
        name: of the first folder.
        also: names of the other folders.
        folder: the first one, absolute.
        allocation: what it holds.
    """

    name: str
    also: tuple[str, ...]
    folder: Path
    allocation: Allocation


class TrialRuns:
    """A trial by runs of one command."""

    def __init__(self, config: TrialRunsCommandConfig, command: Sequence[str], say: Callable[[str], None]) -> None:
        """Read the allocations, and take up what an earlier start left behind.

        Args:
            config: of ``hybrid-lora-trial``.
            command: verl's, as it trains.
            say: what the user is told, a line each.

        Raises:
            ConfigurationError: an allocation or an option cannot be used, or the unfinished trial is another one.
        """
        self.config, self.say = config, say
        self.command, self.total = _checked(command)
        self.candidates = candidates_of(config.allocations)
        self.rounds = rounds_of(len(self.candidates), config.steps, config.rounds, config.keep)
        if not self.rounds:
            raise ConfigurationError(
                "allocations: all of them tune the same modules, so there is nothing to compare; give another one"
            )
        self.output_dir = Path(config.output_dir).absolute()
        refuse_existing(self.output_dir)
        self.cost_said()
        settings = {
            "command": self.command,
            "score": config.score,
            "steps": [one.steps for one in self.rounds],
            "keep": config.keep,
            **{f"allocations.{one.name}": one.allocation.full_names for one in self.candidates},
        }
        self.folder = PartialState(self.output_dir, settings).folder
        self.scores: dict[str, list[Scores]] = self._read()

    def cost_said(self) -> None:
        """Say what it costs, before anything runs."""
        cost = cost_of(self.rounds, False, True)
        of_run = (
            f", {100 * cost.steps / self.total:.0f} % of the {self.total:,} steps of your run" if self.total else ""
        )
        steps = ", ".join(str(one.steps) for one in self.rounds)
        left = ", ".join(str(one.candidates) for one in self.rounds)
        self.say(
            f"trial: {len(self.candidates)} allocations, {len(self.rounds)} round(s) to {steps} steps with {left} of "
            f"them: {cost.steps:,} training steps of your command{of_run}, {cost.loads} starts of it, and as many "
            "validations"
        )
        for one in self.candidates:
            same = f", the same as {', '.join(one.also)}" if one.also else ""
            self.say(
                f"candidate {one.name}: {len(one.allocation.full_names)} of {len(one.allocation.modules)} modules "
                f"fully tuned, {one.allocation.parameter_counts().trainable:,} trainable parameters{same}"
            )
        if SEED in self.command:
            self.say(f"trial: {SEED}, so that all runs have one order of the data; give another one in your command")
        self.say(
            "trial: a schedule of learning rates that depends on trainer.total_training_steps is that of a run as "
            "short as its round"
        )

    def run(self) -> Path:
        """Run what is missing, and write the folder of the allocation that did best.

        Raises:
            ConfigurationError: a run failed, or its validation has no such score, or other prompts than another run's.
        """
        stay, dropped, before = [one.name for one in self.candidates], {}, 0
        named = {one.name: one for one in self.candidates}
        for number, one in enumerate(self.rounds):
            for name in stay:
                if len(self.scores.get(name, ())) <= number:
                    self._start(named[name], one, number, before)
            last, before = number + 1 == len(self.rounds), one.steps
            losses, weights = self._losses(stay, number)
            order = ranked(losses, weights)
            said = ", ".join(f"{name} {self._mean(name, number):.4f}" for name in order)
            self.say(f"trial, round {number + 1} of {len(self.rounds)}, {one.steps} steps: {said}")
            if not last:
                kept = set(order[: self.rounds[number + 1].candidates])
                for name in set(stay) - kept:
                    dropped[name] = number + 1
                    # The largest part of what it left behind, which nothing reads any more.
                    shutil.rmtree(self._place(name) / "checkpoints", ignore_errors=True)
                stay = [name for name in stay if name in kept]
        return self._write(named, stay, dropped)

    # -- runs

    def _place(self, name: str) -> Path:
        return self.folder / "runs" / name

    def arguments(self, one: Candidate, end: Round) -> list[str]:
        """The command of a run to the end of a round."""
        place = self._place(one.name)
        own = {
            "hybrid_lora.allocation": one.folder,
            "trainer.total_training_steps": end.steps,
            "trainer.default_local_dir": place / "checkpoints",
            "trainer.resume_mode": "auto",
            # At its last step, where the next round goes on.
            "trainer.save_freq": end.steps,
            "trainer.test_freq": end.steps,
            "trainer.val_before_train": "false",
            "trainer.max_actor_ckpt_to_keep": 1,
            "trainer.validation_data_dir": place / "validation",
            "hydra.run.dir": place / f"hydra_{end.steps}",
        }
        if self._taken(one.name) >= end.steps:
            # It ended between its last checkpoint and what it had to tell.
            own |= {"trainer.val_before_train": "true", "trainer.val_only": "true"}
        return [*self.command, *(f"{name}={value}" for name, value in own.items())]

    def _taken(self, name: str) -> int:
        """Steps in the last checkpoint of a run, as verl notes them."""
        tracker = self._place(name) / "checkpoints" / "latest_checkpointed_iteration.txt"
        text = tracker.read_text().strip() if tracker.exists() else ""
        return int(text) if text.isdecimal() else 0

    def _start(self, one: Candidate, end: Round, number: int, before: int) -> None:
        place = self._place(one.name)
        place.mkdir(parents=True, exist_ok=True)
        self.say(f"trial, round {number + 1}: {one.name} from step {before} to {end.steps}; its log is in {place}")
        dump, metrics = place / "validation" / f"{end.steps}.jsonl", place / f"metrics_{end.steps}.jsonl"
        for file in (dump, metrics):
            # Of a run that was cut short.
            file.unlink(missing_ok=True)
        log = place / f"log_{end.steps}.txt"
        run_verl(
            self.arguments(one, end),
            log,
            {"VERL_FILE_LOGGER_PATH": str(metrics)},
            f"allocations: the run of {one.name}",
            within(self.config.minutes),
        )
        self.scores.setdefault(one.name, []).append(scores_of(dump, self.config.score))
        with complete_file(self.folder / "scores.json") as unfinished:
            unfinished.write_text(json.dumps(self.scores) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, list[Scores]]:
        file = self.folder / "scores.json"
        if not file.exists():
            return {}
        try:
            return {str(name): list(rounds) for name, rounds in json.loads(file.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"output_dir: {file} is damaged ({error}); delete {self.folder} to start afresh"
            ) from error

    # -- comparison

    def _mean(self, name: str, number: int) -> float:
        values = self.scores[name][number].values()
        return math.fsum(values) / len(values)

    def _losses(self, names: Sequence[str], number: int) -> tuple[dict[str, list[float]], list[int]]:
        """Scores by prompt with the sign turned, so that lower is better, and a weight of 1 for each prompt."""
        first = self.scores[names[0]][number]
        for name in names:
            if self.scores[name][number].keys() != first.keys():
                raise ConfigurationError(
                    f"allocations: {name} was validated on other prompts than {names[0]}; give data.val_files and a "
                    "data.seed that are the same for every run"
                )
        return {name: [-self.scores[name][number][key] for key in first] for name in names}, [1] * len(first)

    def _write(self, named: dict[str, Candidate], stay: Sequence[str], dropped: dict[str, int]) -> Path:
        last = len(self.rounds) - 1
        losses, weights = self._losses(stay, last)
        same = alike(losses, weights)
        chosen, best = named[same[0]], ranked(losses, weights)[0]
        record = {
            "command": self.command,
            "score": self.config.score,
            "rounds": [one.steps for one in self.rounds],
            "prompts": len(weights),
            "chosen": chosen.name,
            "alike": same,
            "candidates": [self._told(one, dropped.get(one.name, 0)) for one in self.candidates],
        }
        lines = table(record)
        verdict = verdict_of(record, best)
        with complete_folder(self.output_dir) as unfinished:
            for file in sorted(chosen.folder.iterdir()):
                if file.is_file():
                    shutil.copyfile(file, unfinished / file.name)
            (unfinished / "trial.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            page = ["# Trial of allocations by runs of verl", "", verdict, "", *lines, "", "The command:", ""]
            page += [f"    {shlex.join(self.command)}", ""]
            (unfinished / "trial.md").write_text("\n".join(page), encoding="utf-8")
        for line in (*lines, verdict):
            self.say(line)
        shutil.rmtree(partial_folder(self.output_dir), ignore_errors=True)
        return self.output_dir

    def _told(self, one: Candidate, dropped: int) -> dict[str, Any]:
        number = (dropped or len(self.rounds)) - 1
        there = [other.name for other in self.candidates if len(self.scores[other.name]) > number]
        losses, weights = self._losses(there, number)
        best = ranked(losses, weights)[0]
        found = {
            "name": one.name,
            "also": list(one.also),
            "folder": str(one.folder),
            "modules": one.allocation.full_names,
            "trainable_parameters": one.allocation.parameter_counts().trainable,
            "scores": [self._mean(one.name, at) for at in range(len(self.scores[one.name]))],
            "dropped": dropped,
        }
        if best != one.name:
            difference = loss_difference(losses[one.name], losses[best], weights)
            # A loss turned again: below 0 it scores less than the best.
            found["difference"] = {"mean": -difference.mean, "low": -difference.high, "high": -difference.low}
        return found


def candidates_of(paths: Sequence[str]) -> list[Candidate]:
    """The allocations of the folders; those with the same modules are one.

    Raises:
        ConfigurationError: one cannot be read, or is of another model than the first.
    """
    found: dict[tuple[str, ...], Candidate] = {}
    first: Allocation | None = None
    names: list[str] = []
    for path in paths:
        folder = allocation_file(path).parent.absolute()
        allocation = load_allocation(path, "allocations")
        first = first or allocation
        if [one.name for one in allocation.modules] != [one.name for one in first.modules]:
            raise ConfigurationError(
                f"allocations: {path!r} is of {allocation.model.name_or_path!r}, whose modules are not those of "
                f"{first.model.name_or_path!r}; give allocations of one model"
            )
        name = folder.name if folder.name not in names else f"{folder.name}_{len(names)}"
        names.append(name)
        key = tuple(allocation.full_names)
        known = found.get(key)
        found[key] = (
            Candidate(name, (), folder, allocation)
            if known is None
            else Candidate(known.name, (*known.also, name), known.folder, known.allocation)
        )
    return list(found.values())


def _checked(command: Sequence[str]) -> tuple[list[str], int | None]:
    """The command with the plugin switched on, without what a trial says itself; and the steps of the whole run."""
    command = [sys.executable if command[0] == "python" else command[0], *command[1:]]
    total = next((word.removeprefix(_TOTAL) for word in command if word.startswith(_TOTAL)), "")
    command = [word for word in command if word.lstrip("+").partition("=")[0] not in OWN]
    if not any(word.startswith("+hybrid_lora=") for word in command):
        command.append("+hybrid_lora=enabled")
    if not any(word.lstrip("+").startswith("data.seed=") for word in command):
        # Without one verl draws the order of the data, and the prompts of data.val_max_samples, anew in every run.
        command.append(SEED)
    return command, int(total) if total.isdecimal() else None


def scores_of(dump: Path, field: str) -> Scores:
    """Mean of a field over the answers to each prompt, by a digest of the prompt and its ground truth.

    Raises:
        ConfigurationError: verl wrote no such file, or there is no such number in it.
    """
    if not dump.is_file():
        raise ConfigurationError(
            f"trainer.validation_data_dir: verl wrote no {dump}; the run ended before its last step, for one because "
            "trainer.total_epochs is too small, or validates nothing"
        )
    sums: dict[str, list[float]] = {}
    for line in dump.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        value = row.get(field)
        if isinstance(value, str):
            value = float(value) if value.replace(".", "", 1).lstrip("-").isdecimal() else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            numbers = sorted(name for name, one in row.items() if isinstance(one, int | float) and name != "step")
            raise ConfigurationError(
                f"score: {field!r} is no number in {dump}; give one of {', '.join(numbers) or 'its fields'}"
            )
        key = hashlib.sha256(json.dumps([row.get("input"), row.get("gts")]).encode()).hexdigest()[:16]
        sums.setdefault(key, []).append(float(value))
    if not sums:
        raise ConfigurationError(f"data.val_files: {dump} has no answer; give validation data")
    return {key: math.fsum(values) / len(values) for key, values in sorted(sums.items())}


def table(record: dict[str, Any]) -> list[str]:
    """The candidates as lines of Markdown."""
    head = ["candidate", "full modules", "trainable parameters"]
    head += [f"{record['score']} after {steps}" for steps in record["rounds"]] + ["against the best then", "dropped"]
    rows = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
    for one in record["candidates"]:
        scores = [f"{value:.4f}" for value in one["scores"]]
        scores += [""] * (len(record["rounds"]) - len(scores))
        difference = one.get("difference")
        against = "" if difference is None else "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**difference)
        state = f"round {one['dropped']}" if one["dropped"] else "used" if one["name"] == record["chosen"] else "no"
        name = " = ".join([one["name"], *one["also"]])
        rows.append([name, str(len(one["modules"])), f"{one['trainable_parameters']:,}", *scores, against, state])
    return [f"| {' | '.join(row)} |" for row in rows]


def verdict_of(record: dict[str, Any], best: str) -> str:
    """What the comparison shows, and no more."""
    last, prompts, chosen = record["rounds"][-1], record["prompts"], record["chosen"]
    said = "; the interval is of the prompts alone: rollouts and order of another seed may move more"
    if len(record["alike"]) > 1:
        others = " and ".join(record["alike"])
        lowest = "" if chosen == best else f" ({best} has the highest score)"
        return (
            f"Not distinguished: after {last} steps {prompts} validation prompts cannot tell {others} apart; {chosen} "
            f"is used, the first of them in allocations{lowest}{said}."
        )
    return f"After {last} steps {chosen} has the highest score on {prompts} validation prompts{said}."
