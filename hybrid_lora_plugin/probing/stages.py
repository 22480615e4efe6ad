"""The stages of one probe of one seed: model and rows, warm-up, scoring, record.

Interruptible: the state is saved at least every half minute, and a resumed probe ends with the same bytes as an
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.learning import rate_option
from hybrid_lora_plugin.allocation.schema import Allocation, ProbeRecord
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.base_identity import weights_identity
from hybrid_lora_plugin.candidates import architecture_of, find_candidates
from hybrid_lora_plugin.config import AUTO, ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.linear_account import account_text
from hybrid_lora_plugin.probing.checks import check_budget, check_shapes
from hybrid_lora_plugin.probing.data.batches import ProbeData
from hybrid_lora_plugin.probing.distributed import Ranks, decoder_layers, place
from hybrid_lora_plugin.probing.forward import Passes
from hybrid_lora_plugin.probing.held_out import HeldOutLosses
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted, StopRequest
from hybrid_lora_plugin.probing.loading import (
    CheckpointWatch,
    check_model,
    checkpoint_fingerprint,
    parameter_count,
    weights_digest,
)
from hybrid_lora_plugin.probing.method import ProbeMethod
from hybrid_lora_plugin.probing.prepare import prepare_data
from hybrid_lora_plugin.probing.progress import Progress
from hybrid_lora_plugin.probing.provenance import environment, model_identity, probe_record, probe_settings
from hybrid_lora_plugin.probing.recompute import recompute_activations
from hybrid_lora_plugin.probing.resume import PartialState, partial_folder
from hybrid_lora_plugin.probing.settling import (
    CHECK_PARTITIONS,
    SettledScores,
    WarmupChecks,
    chosen_modules,
    scoring_within_warmup,
)
from hybrid_lora_plugin.probing.shared_base import load_base, sent_by_first
from hybrid_lora_plugin.report.artifact import save_allocation

SAVE_EVERY_SECONDS = 30.0


class Probe:
    """One probe with everything its stages share."""

    def __init__(
        self,
        config: ProbeCommandConfig,
        method: str,
        make: type[ProbeMethod],
        output_dir: Path,
        progress: Progress,
        ranks: Ranks,
        part: str = "",
        data: ProbeData | None = None,
        before_loading: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.method_name, self.output_dir, self.progress, self.ranks = (
            config,
            method,
            output_dir,
            progress,
            ranks,
        )
        # Of several seeds each keeps its state in a part of the folder.
        self.part = part
        # The data first: a mistake there is found before the weights are read. Several probes may share theirs.
        self.data = data or ranks.from_first(lambda: prepare_data(config, progress))
        for sentence in () if data else self.data.told:
            progress.note(sentence)
        ranks.from_first(lambda: check_model(config.model))
        if before_loading is not None:
            ranks.from_first(lambda: before_loading(self.data.longest))
        self.watch = CheckpointWatch(config.model.path)
        self.model = load_base(config.model, ranks)
        self.candidates = find_candidates(self.model)
        check_shapes(self.candidates, config.lora.rank)
        check_budget(self.candidates, config.budget, config.lora.rank)
        progress.note(
            f"{architecture_of(self.model.config)}: {len(self.candidates)} candidate modules, "
            f"{sum(candidate.parameters for candidate in self.candidates):,} parameters, {self.model.dtype} on "
            f"{ranks.size} × {ranks.device.type}"
        )
        self.dtype, parameters = self.model.dtype, parameter_count(self.model)
        self.identity = model_identity(config.model.path, self.model, self.candidates, parameters)
        for line in account_text(self.candidates, self.identity.frozen_linear, parameters):
            progress.note(line)
        # Rank 0 keeps the state for all: adapters and Adam moments are equal everywhere.
        self.state: PartialState | None = None
        ranks.from_first(self._take_up_state)
        # What the probe finds out of itself, by field of its record.
        self.found: dict[str, Any] = {}
        self.method = make(self.model, self.candidates, config)
        if config.probe.gradient_checkpointing:
            recompute_activations(decoder_layers(self.model, self.candidates))
        sent = partial(sent_by_first, replicated=self.method.replicated, ranks=ranks)
        place(self.model, self.candidates, self.method.replicated, ranks, sent)

    def _take_up_state(self) -> None:
        # The files, for who continues a probe, and their content, for who trains under its allocation.
        self.checkpoint = {"checkpoint": checkpoint_fingerprint(self.config.model.path)}
        if not self.config.model.gguf_file and (weights := weights_identity(self.config.model.path)):
            self.checkpoint["weights"] = weights
        settings = probe_settings(self.config, self.method_name, self.model, self.data, weights_digest(self.model))
        self.state = PartialState(self.output_dir, settings, self.part)

    def measure(self) -> dict[str, Tensor]:
        """Take the steps that are missing: what was measured, ``[T, M]`` or ``[M]`` float64 by name."""
        with deterministic(self.ranks.device), StopRequest() as stop, self._memory_explained():
            probe = self.config.probe
            passes = Passes(self.model, self.ranks, probe.micro_batch_size, probe.micro_batch_tokens)
            self.method.start(passes)
            losses = self._held_out_losses(passes)
            if self.method.warmup_steps:
                losses.measure("before")
            checks = self._warm_up(stop)
            self.method.finish_warmup()
            if self.method.warmup_steps:
                losses.measure("after")
                self.found["held_out"] = losses.record(rate_option(self.method_name, self.config.probe.init))
            self.found["warmup_steps"] = self.method.step
            if checks is not None:
                self.found["warmup_auto"] = checks.record()
            return self._score(stop)

    @contextlib.contextmanager
    def _memory_explained(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            probe = self.config.probe
            name = "micro_batch_tokens" if probe.micro_batch_tokens else "micro_batch_size"
            given = getattr(probe, name)
            more = "" if probe.gradient_checkpointing else "give probe.gradient_checkpointing=true, "
            raise ProbeError(
                f"probe.{name}: {'null' if given is None else given} does not fit into the memory of "
                f"{self.ranks.device}; {more}lower it or probe.max_length, or use more GPUs. What was done is "
                f"kept: the same command continues"
            ) from error

    def record(self) -> ProbeRecord:
        """How it was measured; on rank 0."""
        self.watch.check()
        data = self.data.record | self.checkpoint
        record = probe_record(self.config, self.method_name, self.dtype, data, self.method.lr)
        return dataclasses.replace(record, **self.found)

    def save(self, record: ProbeRecord, measurements: dict[str, Tensor]) -> Allocation:
        """Select and write the artifact; on rank 0."""
        allocation = select_modules(
            self.config,
            self.identity,
            self.candidates,
            measurements,
            lora_rank=self.config.lora.rank,
            probe=record,
            environment=environment(),
        )
        save_allocation(self.output_dir, allocation, measurements)
        shutil.rmtree(partial_folder(self.output_dir))
        return allocation

    def _held_out_losses(self, passes: Passes) -> HeldOutLosses:
        def keep(losses: dict[str, float]) -> None:
            self.ranks.from_first(lambda: self.state.save_held_out(losses))
            when, loss = list(losses.items())[-1]
            self.progress.note(f"loss on held-out rows {when} the warm-up: {loss:.4f}")

        return HeldOutLosses(passes, self.data, self.ranks.from_first(lambda: self.state.load_held_out()), keep)

    def _warm_up(self, stop: StopRequest) -> WarmupChecks | None:
        """Take the steps that are missing; the checks of a warm-up that finds its own length."""
        method, data = self.method, self.data
        saved = self.ranks.from_first(lambda: self.state.load_warmup())
        if saved is not None:
            method.load(*saved)
            self.progress.note(f"continuing {self.output_dir}.partial after warm-up step {method.step}")
        auto = self.config.probe.warmup_steps == AUTO and method.warmup_steps > 0
        checks = self._warmup_checks() if auto else None
        self.progress.stage("warm-up", method.warmup_steps, method.step)
        save = self._saver(stop, lambda: self.state.save_warmup(method.step, method.tensors()))

        def over() -> bool:
            return method.step >= method.warmup_steps or (checks is not None and checks.settled)

        while not over():
            validation = data.validation_batch(method.step % data.validation_batches)
            loss = method.warm_up(data.warmup_batch(method.step), validation)
            self.progress.advance(method.step, loss)
            if checks is not None and (found := checks.look(method.step)):
                self.progress.note(found)
            save(finished=over())
        return checks

    def _warmup_checks(self) -> WarmupChecks:
        probe, step = self.config.probe, self.method.step

        def measure() -> list[int]:
            with scoring_within_warmup(self.method, self.config.criterion):
                rows: dict[str, list[Tensor]] = {}
                self.method.begin_scoring(self.data.validation_batch)
                for row in range(probe.warmup_check_partitions if self.method.rows else 0):
                    batch = self.data.validation_batch(row // probe.partitions_per_batch)
                    for name, values in self.method.score(row, batch)[0].items():
                        rows.setdefault(name, []).append(values)
                stacked = {name: torch.stack(values) for name, values in rows.items()}
                measured = self.method.measurements(stacked) | self.method.results()
            # One decides for all: a last bit must not send the ranks different ways.
            return self.ranks.from_first(lambda: chosen_modules(self.config, self.candidates, measured))

        # A check may be on disk whose step is not: it is taken again.
        kept = [check for check in self.ranks.from_first(lambda: self.state.load_warmup_checks()) if check[0] <= step]
        return WarmupChecks(
            self.config,
            measure,
            kept,
            lambda checks: self.ranks.from_first(lambda: self.state.save_warmup_checks(checks)),
        )

    def _score(self, stop: StopRequest) -> dict[str, Tensor]:
        """Measure what is missing; name -> ``[rows, M]`` or ``[M]`` float64."""
        once = self.method.results()
        if not self.method.rows:
            self.found["partitions"] = self.config.probe.most_partitions
            return once
        done, rows = self.ranks.from_first(lambda: self.state.load_scores())
        settled = None
        if self.config.probe.partitions == AUTO:
            settled = SettledScores(
                self.config, self.candidates, rows, lambda stacked: self.method.measurements(stacked) | once
            )
        self.method.begin_scoring(self.data.validation_batch)
        self.progress.stage("scoring", self.method.rows, done)
        save = self._saver(stop, lambda: self.state.save_scores(done, rows))

        def over() -> bool:
            # One decides for all, as in the warm-up.
            enough = settled is not None and settled.settled(done)
            return done >= self.method.rows or self.ranks.from_first(lambda: enough)

        finished = over()
        while not finished:
            batch = self.data.validation_batch(done // self.config.probe.partitions_per_batch)
            measured, loss = self.method.score(done, batch)
            for name, values in measured.items():
                rows.setdefault(name, []).append(values)
            done += 1
            self.progress.advance(done, loss)
            finished = over()
            if settled is not None and done % CHECK_PARTITIONS == 0 and self.ranks.first:
                self.progress.note(
                    f"{done} partitions scored: {100 * settled.share(done):.0f} % of the modules are decided "
                    f"({100 * self.config.probe.settled_share:.0f} % wanted)"
                )
            save(finished=finished)
        self.found["partitions"] = done
        if settled is not None:
            self.found["partitions_auto"] = settled.record(done)
        return self.method.measurements({name: torch.stack(values) for name, values in rows.items()}) | once

    def _saver(self, stop: StopRequest, save: Callable[[], None]) -> Callable[[bool], None]:
        """A function that saves every half minute, at the end, and when any rank was asked to stop; then it raises."""
        last = time.monotonic()

        def after_step(finished: bool) -> None:
            nonlocal last
            signum = self.ranks.largest(stop.signum or 0)
            if self.ranks.first and (finished or signum or time.monotonic() - last >= SAVE_EVERY_SECONDS):
                save()
                last = time.monotonic()
            if signum:
                # Nobody leaves before the state is on disk.
                self.ranks.largest(0)
                raise ProbeInterrupted(Path(f"{self.output_dir}.partial"), signum)

        return after_step


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on an accelerator; those of the CPU are so already."""
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
