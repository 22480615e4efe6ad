"""A command's trial: the probes of its portfolio, the rounds, and the artifact.

Deterministic by seed and interruptible as a probe is: the state is saved at least every half minute, and the same
command ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.schema import Allocation, ModelIdentity, TrialRecord
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.base_identity import weights_identity
from hybrid_lora_plugin.candidates import Candidate, find_candidates, meta_model
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.linear_account import account_text
from hybrid_lora_plugin.probing.checks import check_budget, check_shapes
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted, StopRequest
from hybrid_lora_plugin.probing.loading import (
    CheckpointWatch,
    check_model,
    checkpoint_fingerprint,
    load_model,
    load_model_config,
    parameter_count,
    probed_dtype,
)
from hybrid_lora_plugin.probing.method import ProbeMethod, warmup_rate
from hybrid_lora_plugin.probing.prepare import prepare_data
from hybrid_lora_plugin.probing.progress import Progress
from hybrid_lora_plugin.probing.provenance import environment, model_identity, probe_record, probe_settings
from hybrid_lora_plugin.probing.resume import PartialState, partial_folder
from hybrid_lora_plugin.probing.stages import SAVE_EVERY_SECONDS, Probe, deterministic
from hybrid_lora_plugin.probing.trial.contender import ContenderModel, allocation_of
from hybrid_lora_plugin.probing.trial.cost import cost_in_words, most_in_words
from hybrid_lora_plugin.probing.trial.halving import Halving
from hybrid_lora_plugin.probing.trial.options import check_trial, recorded, settled
from hybrid_lora_plugin.probing.trial.portfolio import (
    Contender,
    contenders_of,
    entries_of,
    matched_lora,
    probes_of,
)
from hybrid_lora_plugin.probing.trial.schedule import STATE_BYTES, cost_of, rounds_of
from hybrid_lora_plugin.probing.trial.state import TrialFolder
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.scoring.measurements import TRIAL

Methods = Mapping[str, type[ProbeMethod]]


def check(config: ProbeCommandConfig, methods: Methods, processes: int) -> None:
    """Refuse what a trial cannot do, before anything is read.

    Raises:
        ConfigurationError: as ``check_trial``, or a criterion of the portfolio cannot use as many processes.
    """
    check_trial(config)
    for _, served in probes_of(entries_of(config)):
        for entry in served:
            methods[entry.criterion.method].check_ranks(processes)


def run_trial(
    config: ProbeCommandConfig, output_dir: Path, progress: Progress, ranks: Ranks, methods: Methods
) -> Allocation:
    """Run a trial and write its allocation.

    Args:
        config: of the command; ``check`` has passed it.
        output_dir: of the artifact.
        progress: where to report.
        ranks: who shares the work.
        methods: probe methods by name.

    Raises:
        ConfigurationError: a setting, the data or the model cannot be used.
        ProbeInterrupted: SIGINT or SIGTERM came; the same call continues where it stopped.
    """
    return _Trial(config, output_dir, progress, ranks, methods).run()


class _Trial:
    """One trial with everything its stages share."""

    def __init__(
        self, config: ProbeCommandConfig, output_dir: Path, progress: Progress, ranks: Ranks, methods: Methods
    ) -> None:
        self.config, self.output_dir, self.progress, self.ranks, self.methods = (
            config,
            output_dir,
            progress,
            ranks,
            methods,
        )
        self.entries = entries_of(config)
        self.probes = probes_of(self.entries)
        ranks.from_first(lambda: check_model(config.model))
        self.watch = CheckpointWatch(config.model.path)
        self.identity, self.candidates = self._look_at_model()
        for line in most_in_words(config, self.entries, self.probes, self.candidates):
            progress.note(line)
        self.data = ranks.from_first(lambda: prepare_data(config, progress))
        for sentence in self.data.told:
            progress.note(sentence)
        ranks.from_first(self._take_up_state)
        self.memory = TrialFolder(partial_folder(output_dir), ranks)

    def _look_at_model(self) -> tuple[ModelIdentity, list[Candidate]]:
        config = self.config
        model = meta_model(load_model_config(config.model), config.model.trust_remote_code)
        candidates = find_candidates(model)
        check_shapes(candidates, config.lora.rank)
        check_budget(candidates, config)
        identity = model_identity(config.model.path, model, candidates, parameter_count(model))
        for line in account_text(candidates, identity.frozen_linear, identity.parameters):
            self.progress.note(line)
        self.fingerprinted = model.config
        if unknown := {name for name, _, _ in self._factors()} - {one.type for one in candidates}:
            raise ProbeError(
                f"trial.full_lr_factors: {sorted(unknown)[0]!r} is no type of a candidate; give some of "
                f"{', '.join(dict.fromkeys(one.type for one in candidates))}"
            )
        return identity, candidates

    def _factors(self) -> list[tuple[str, str, str]]:
        return [entry.partition(":") for entry in self.config.trial.full_lr_factors]

    def _take_up_state(self) -> None:
        config = self.config
        self.checkpoint: dict[str, Any] = {"checkpoint": checkpoint_fingerprint(config.model.path)}
        if not config.model.gguf_file and (weights := weights_identity(config.model.path)):
            self.checkpoint["weights"] = weights
        # Not loaded yet: the files stand for the weights here, and each probe looks at what it loads.
        described = SimpleNamespace(config=self.fingerprinted, dtype=config.model.dtype)
        settings = probe_settings(config, "trial", described, self.data, str(self.checkpoint))
        # The candidates follow from the budget, and so does all that is trained.
        settings |= {f"budget.{name}": value for name, value in vars(config.budget).items()}
        settings |= {f"trial.{name}": value for name, value in recorded(config).items()}
        state = PartialState(self.output_dir, settings)
        if state.resumed:
            self.progress.note(f"continuing {state.folder}")

    def run(self) -> Allocation:
        """Take the stages that are missing, and write the artifact."""
        measured = [self._probe(number) for number in range(len(self.probes))]
        of_entry = {
            entry.name: found for (_, served), found in zip(self.probes, measured, strict=True) for entry in served
        }
        # One decides for all: a last bit must not send the ranks different ways.
        contenders = self.ranks.from_first(
            lambda: contenders_of(self.entries, self.candidates, lambda entry: of_entry.get(entry.name, {}))
        )
        lora = matched_lora(contenders, self.candidates) if self.config.trial.lora else None
        record = self._train(contenders, lora)
        everything: dict[str, Tensor] = {}
        for found in measured:
            # Of two probes that measured the same the first one counts.
            everything |= {name: tensor for name, tensor in found.items() if name not in everything}
        return self.ranks.from_first(lambda: self._save(contenders, record, everything))

    def _probe(self, number: int) -> dict[str, Tensor]:
        """What probe ``number`` of the portfolio measures."""
        kept = self.memory.measured(number)
        if kept is not None:
            return kept
        leader, served = self.probes[number]
        names = ", ".join(entry.name for entry in served)
        self.progress.note(f"probe {number + 1} of {len(self.probes)}, with criterion {leader}, for {names}")
        config = dataclasses.replace(self.config, criterion=leader)
        method = next(entry.criterion.method for entry in served if entry.config.criterion == leader)
        probe = Probe(
            config,
            method,
            self.methods[method],
            self.output_dir,
            self.progress,
            self.ranks,
            f"probe_{number}",
            self.data,
        )
        measured = probe.measure()
        self.memory.save_measured(number, measured)
        # Its model must not sit beside a candidate's.
        probe.method = probe.model = None
        del probe
        _free(self.ranks.device)
        return measured

    def _train(self, contenders: list[Contender], lora: Contender | None) -> TrialRecord | None:
        """The rounds; None where there is one candidate alone."""
        trial = self.config.trial
        rounds = rounds_of(len(contenders), trial.steps, trial.rounds, trial.keep)
        if not rounds:
            self.progress.note("all candidates choose the same modules: nothing to compare, and nothing is trained")
            return None
        largest = max(one.trainable_parameters(self.candidates) for one in [*contenders, *([lora] if lora else [])])
        kept_bytes = cost_of(rounds, lora is not None, True).kept * largest * STATE_BYTES
        continues = kept_bytes <= trial.max_state_gb * 1e9
        cost = cost_of(rounds, lora is not None, continues)
        for line in cost_in_words(
            self.config, contenders, lora, rounds, cost, kept_bytes if continues else None, self.data, self.candidates
        ):
            self.progress.note(line)
        settings = settled(self.config)

        def make(one: Contender) -> ContenderModel:
            return ContenderModel(
                load_model(self.config.model, self.ranks.device),
                self.candidates,
                allocation_of(one, self.identity, self.candidates),
                rank=one.rank,
                settings=settings,
                probe=self.config.probe,
                ranks=self.ranks,
            )

        with deterministic(self.ranks.device), StopRequest() as stop, self._memory_explained():
            halving = Halving(
                contenders,
                lora,
                rounds,
                self.candidates,
                make=make,
                batch=self.data.trial_batch,
                held_out=self.data.trial_held_out(),
                memory=self.memory,
                continues=continues,
                after_step=self._saver(stop),
                note=self.progress.note,
                advance=self.progress.advance,
            )
            self.progress.stage("trial", cost.steps, halving.taken)
            return halving.run()

    def _saver(self, stop: StopRequest) -> Callable[[Callable[[], None]], None]:
        """A function that saves every half minute, and when any rank was asked to stop; then it raises."""
        last = time.monotonic()

        def after_step(save: Callable[[], None]) -> None:
            nonlocal last
            # Gathering what trains takes every rank: the first one's clock decides, and any one's signal.
            due = self.ranks.first and time.monotonic() - last >= SAVE_EVERY_SECONDS
            asked = self.ranks.largest(stop.signum or int(due))
            if not asked:
                return
            save()
            last = time.monotonic()
            if asked > 1:
                self.ranks.largest(0)
                raise ProbeInterrupted(Path(f"{self.output_dir}.partial"), asked)

        return after_step

    @contextlib.contextmanager
    def _memory_explained(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ProbeError(
                f"trial.batch_size: a step of a candidate does not fit into the memory of {self.ranks.device}; lower "
                "probe.micro_batch_size, give probe.gradient_checkpointing=true, or use more GPUs. What was done is "
                "kept: the same command continues"
            ) from error

    def _save(
        self, contenders: list[Contender], record: TrialRecord | None, measurements: dict[str, Tensor]
    ) -> Allocation:
        self.watch.check()
        chosen = next(one for one in contenders if record is None or one.name == record.chosen)
        full = set(chosen.modules)
        measurements = measurements | {
            TRIAL: torch.tensor([float(one.name in full) for one in self.candidates], dtype=torch.float64)
        }
        config = self.config
        dtype = probed_dtype(config.model, self.ranks.device)
        data = self.data.record | self.checkpoint
        probe = probe_record(config, "trial", getattr(torch, dtype), data, warmup_rate(config.probe, "trial"))
        allocation = select_modules(
            config,
            self.identity,
            self.candidates,
            measurements,
            lora_rank=config.lora.rank,
            probe=probe,
            environment=environment(),
        )
        allocation = dataclasses.replace(allocation, trial=record)
        save_allocation(self.output_dir, allocation, measurements)
        shutil.rmtree(partial_folder(self.output_dir))
        return allocation


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
