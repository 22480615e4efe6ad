"""The engine of the probe with objective ``policy``: verl's actor with SVD-LoRA on every candidate.

verl's own loop drives it. In the steps of the warm-up it trains the probe's parameters with the configured policy loss
on real rollouts; the steps after those are scored instead of trained on, and so are the checks of a warm-up that finds
its own length: their rollouts come from held-out prompts (``policy_scoring``). After the last one rank 0 writes the
artifact. This process then ends, and the run that trains starts from the original checkpoint (Algorithm 2).
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from verl.utils.device import get_device_id
from verl.utils.torch_functional import get_constant_schedule_with_warmup
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine import FSDPEngineWithLMHead

from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.base_identity import weights_identity
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import AUTO, HybridLoraConfig, ProbeCommandConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.probing.checks import check_budget, check_shapes
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.layers import SvdLoraLinear, attach
from hybrid_lora_plugin.probing.loading import checkpoint_fingerprint, parameter_count
from hybrid_lora_plugin.probing.method import warmup_rate
from hybrid_lora_plugin.probing.methods.svd_lora import check_trained, results_of
from hybrid_lora_plugin.probing.provenance import environment, model_identity, probe_record
from hybrid_lora_plugin.probing.settling import SettledScores, WarmupChecks, chosen_modules
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.scoring import get_criterion
from hybrid_lora_plugin.training.dtensor import whole
from hybrid_lora_plugin.verl_backend import requirements
from hybrid_lora_plugin.verl_backend.checkpoint_retention import Retention
from hybrid_lora_plugin.verl_backend.checkpoint_writing import unwritable_explained, written_whole
from hybrid_lora_plugin.verl_backend.probe.policy_schedule import (
    CHECK,
    SCORE,
    WARM_UP,
    PolicySchedule,
    length_in_words,
    write_ended,
)
from hybrid_lora_plugin.verl_backend.probe.policy_scoring import scoring_of
from hybrid_lora_plugin.verl_backend.probe.policy_settings import kept_settings
from hybrid_lora_plugin.verl_backend.probe.policy_weights import merged_probe_weights
from hybrid_lora_plugin.verl_backend.probe.resume import command_config
from hybrid_lora_plugin.verl_backend.sender.weight_source import WeightSource

STATE_FILE = "policy_probe.safetensors"
_ADAPTER = ("A", "B", "e", "alpha")


class PolicyProbeEngine(FSDPEngineWithLMHead):
    """Warms up SVD-LoRA by reinforcement learning, then scores it on the rollouts of held-out prompts."""

    hybrid: HybridLoraConfig
    _weight_source: WeightSource | None = None
    _retention: Retention | None = None

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.hybrid = requirements.check_engine(model_config, engine_config, checkpoint_config)
        self._schedule = PolicySchedule.of(command_config(self.hybrid, "", False))
        self._step = 0
        # The first step after the warm-up, once it is known.
        self._ended = None if self._schedule.every else self._schedule.before_scoring
        self._rows: dict[str, list[Tensor]] = {}
        # Of the check that is being made.
        self._check_rows: dict[str, list[Tensor]] = {}
        self._checks: list[tuple[int, list[int]]] = []
        # Mini-batches of the step that were scored.
        self._mini_batches = 0
        self._written = False
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    @property
    def _stage(self) -> tuple[str, int]:
        return self._schedule.stage(self._step, self._ended)

    @property
    def _done(self) -> int:
        """Partitions that are scored."""
        if self._ended is None:
            return 0
        scored = max(0, self._step - self._ended) * self.hybrid.probe.partitions_per_batch
        return min(scored, self.hybrid.probe.most_partitions)

    # -- building ---------------------------------------------------------------------------------------------

    def _build_lora_module(self, module):
        self._candidates = find_candidates(module)
        check_shapes(self._candidates, self.hybrid.lora.rank)
        check_budget(self._candidates, self.hybrid)
        self._identity = model_identity(str(self.model_config.path), module, self._candidates, parameter_count(module))
        module.enable_input_require_grads()
        probe = self.hybrid.probe
        # Centred, since FSDP2 casts parameters to verl's param_dtype, bfloat16 by default.
        self._layers = attach(module, self._candidates, self.hybrid.lora.rank, probe.seed, probe.init, centred=True)
        _switch_dropout_off(module)
        self._scores = scoring_of(self.hybrid, self._layers)
        if self.rank == 0:
            # What an earlier start left is taken up with its checkpoint.
            self._leave_note(None)
            length = length_in_words(self._command)
            print(f"hybrid_lora: probing {len(self._candidates)} modules with the policy objective, {length}")
        return module

    @property
    def _lr(self) -> float:
        return warmup_rate(self.hybrid.probe, "svd_lora")

    def _build_optimizer(self, module):
        parameters = [getattr(layer, name) for layer in self._layers.values() for name in _ADAPTER]
        # No weight decay: it would pull e and alpha from 1 to 0.
        return build_optimizer(
            [{"params": parameters, "lr": self._lr, "weight_decay": 0.0, "name": "probe"}], self.optimizer_config
        )

    def _build_lr_scheduler(self, optimizer):
        # The paper's warm-up has a constant rate, whatever schedule the training that follows has.
        return get_constant_schedule_with_warmup(optimizer=optimizer, num_warmup_steps=0)

    # -- warm-up and scoring ----------------------------------------------------------------------------------

    def train_batch(self, data, loss_function):
        if self._retention is not None:
            self._retention.settle()
        stage, number = self._stage
        if stage == WARM_UP:
            return super().train_batch(data, loss_function)
        if not self._mini_batches:
            self._begin_scoring_step(stage, number)
        outputs = self._scores.add(
            lambda: self.forward_backward_batch(data, loss_function, forward_only=False), self.optimizer_zero_grad
        )
        self._mini_batches += 1
        if self.is_mp_src_rank_with_outputs():
            outputs["metrics"]["grad_norm"] = 0.0
            outputs["metrics"]["probe_partitions"] = [float(self._done)]
        return outputs

    def _begin_scoring_step(self, stage: str, number: int) -> None:
        probe = self.hybrid.probe
        first = number * probe.partitions_per_batch
        if stage == SCORE:
            if not self._rows and self._schedule.warmup:
                with self._whole_layers() as layers:
                    check_trained(layers)
            for layer in self._layers.values():
                for parameter in (layer.A, layer.B, layer.alpha):
                    parameter.requires_grad_(False)
        most = probe.most_partitions if stage == SCORE else probe.warmup_check_partitions
        # A probe that was written goes on until its process is ended.
        self._scores.begin(first, max(1, min(probe.partitions_per_batch, most - first)))

    def lr_scheduler_step(self):
        # verl calls this after the last mini-batch of a step: the one place where an engine learns that it is over.
        rate = super().lr_scheduler_step()
        stage, _ = self._stage
        rows = self._scores.finish() if stage != WARM_UP and self._mini_batches else {}
        self._mini_batches = 0
        self._step += 1
        if stage == SCORE:
            self._take(rows)
        else:
            self._go_on(stage, rows)
        return rate

    def _go_on(self, stage: str, rows: dict[str, list[Tensor]]) -> None:
        """After a step of the warm-up or of a check: whether the warm-up is over."""
        for name, values in rows.items():
            self._check_rows.setdefault(name, []).extend(values)
        if self._ended is not None:
            return
        if stage == CHECK and self._stage[0] != CHECK:
            self._look()
        if self._ended is None and self._step == self._schedule.before_scoring:
            self._ended = self._step
        if self._ended is not None and self.rank == 0:
            self._leave_note(self._ended)

    def _look(self) -> None:
        """What would be chosen now, beside what the checks before would have chosen."""
        rows, self._check_rows = self._check_rows, {}

        def measure() -> list[int]:
            with self._whole_layers() as layers:
                stacked = {name: torch.stack(values) for name, values in rows.items()}
                measured = self._scores.measurements(stacked) | results_of(layers)
            return self._ranks.from_first(lambda: chosen_modules(self._command, self._candidates, measured))

        checks = WarmupChecks(self._command, measure, self._checks, self._keep_checks)
        found = checks.look(self._schedule.warm_up_steps(self._step))
        if found and self.rank == 0:
            print(f"hybrid_lora: {found}", flush=True)
        if checks.settled:
            self._ended = self._step

    def _keep_checks(self, checks: list[tuple[int, list[int]]]) -> None:
        self._checks = list(checks)

    def _leave_note(self, step: int | None) -> None:
        if self._schedule.every:
            write_ended(f"{self.hybrid.output_dir}.partial", step)

    def _take(self, rows: dict[str, list[Tensor]]) -> None:
        """After a scored step: whether it was the last one."""
        if self._written:
            return
        for name, values in rows.items():
            self._rows.setdefault(name, []).extend(values)
        done, most = self._done, self.hybrid.probe.most_partitions
        settled = self._settled_scores()
        enough = settled is not None and settled.settled(done)
        if self.rank == 0:
            share = "" if settled is None else f", {100 * (settled.share(done) or 0):.0f} % of the modules decided"
            print(f"hybrid_lora: {done} of {most} partitions scored{share}", flush=True)
        if done == most or self._ranks.from_first(lambda: enough):
            self._write_artifact(settled)
            self._written = True

    def _settled_scores(self) -> SettledScores | None:
        if self.hybrid.probe.partitions != AUTO:
            return None
        with self._whole_layers() as layers:
            once = results_of(layers)
        return SettledScores(
            self._command, self._candidates, self._rows, lambda stacked: self._scores.measurements(stacked) | once
        )

    def _found(self, settled: SettledScores | None) -> dict[str, object]:
        """What the probe found out of itself, by field of its record."""
        found: dict[str, object] = {
            "warmup_steps": self._schedule.warm_up_steps(self._ended),
            "partitions": self._done,
        }
        if self._schedule.every:
            checks = WarmupChecks(self._command, list, self._checks, self._keep_checks)
            found["warmup_auto"] = checks.record()
        if settled is not None:
            found["partitions_auto"] = settled.record(self._done)
        return found

    @property
    def _ranks(self) -> Ranks:
        return Ranks(torch.device(get_device_id()))

    @property
    def _command(self) -> ProbeCommandConfig:
        path = str(self.model_config.path)
        return command_config(self.hybrid, path, bool(self.model_config.trust_remote_code))

    def _write_artifact(self, settled: SettledScores | None) -> None:
        with self._whole_layers() as layers:
            stacked = {name: torch.stack(values) for name, values in self._rows.items()}
            measurements = self._scores.measurements(stacked)
            if self._schedule.warmup:
                measurements |= results_of(layers)
        if self.rank == 0:
            config, settings = self._command, kept_settings(self.hybrid.output_dir)
            data = {
                "source": "rollouts of held-out prompts",
                "checkpoint": checkpoint_fingerprint(self.model_config.local_path),
                "settings": settings,
            }
            if weights := weights_identity(self.model_config.local_path):
                data["weights"] = weights
            method = get_criterion(config.criterion).method
            record = probe_record(config, method, self._autocast_dtype, data, self._lr)
            record = dataclasses.replace(
                record, batch_size=int(settings["data.train_batch_size"]), max_length=0, **self._found(settled)
            )
            allocation = select_modules(
                config,
                self._identity,
                self._candidates,
                measurements,
                lora_rank=self.hybrid.lora.rank,
                probe=record,
                environment=environment(),
            )
            save_allocation(Path(self.hybrid.output_dir), allocation, measurements)
            print(f"hybrid_lora: allocation written to {self.hybrid.output_dir}", flush=True)
        torch.distributed.barrier()

    @contextmanager
    def _whole_layers(self):
        """The probe's layers with whole parameters, on every rank; their bases are left out."""
        copies = {}
        for name, layer in self._layers.items():
            copy = SvdLoraLinear.__new__(SvdLoraLinear)
            torch.nn.Module.__init__(copy)
            copy.e_origin, copy.alpha_origin = layer.e_origin, layer.alpha_origin
            for which in _ADAPTER:
                setattr(
                    copy, which, torch.nn.Parameter(whole(getattr(layer, which), get_device_id()), requires_grad=False)
                )
            copies[name] = copy
        yield copies

    # -- reference policy and rollout -------------------------------------------------------------------------

    @contextmanager
    def disable_adapter(self):
        """The untouched base model: no branch takes part, and base weights never move in a probe."""
        layers = list(self._layers.values())
        for layer in layers:
            layer.active = False
        try:
            yield
        finally:
            for layer in layers:
                layer.active = True

    def get_per_tensor_param(self, layered_summon=False, base_sync_done=False, **kwargs):
        """The next weight sync, merged: a stream of named tensors and no adapter."""
        device = get_device_id()
        if self._weight_source is None:
            self._weight_source = WeightSource(self.hybrid, self.model_config, device)
        source = self._weight_source
        arrival = source.next_arrival()
        weights = merged_probe_weights(self.module, source.dtype, device, source.rounding, arrival)
        return source.stream("merge", weights, arrival=arrival), None

    # -- checkpoints ------------------------------------------------------------------------------------------

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None, **kwargs):
        ranks, folder = Ranks(torch.device(get_device_id())), Path(local_path)
        if self._retention is None:
            self._retention = Retention(ranks, keep_best=False)
        self._retention.make_room(max_ckpt_to_keep)
        with written_whole(folder, ranks) as unfinished:
            super().save_checkpoint(str(unfinished), hdfs_path, global_step, None, **kwargs)

            def write() -> None:
                with unwritable_explained(folder):
                    tensors, metadata = self._state()
                    save_file(tensors, unfinished / STATE_FILE, metadata=metadata)

            ranks.from_first(write)
        self._retention.add(folder)

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=True, **kwargs):
        # Rank 0 wrote it, perhaps to a disk of its own.
        tensors, metadata = self._ranks.from_first(lambda: self._read_state(local_path))
        self._step, self._checks = int(metadata["step"]), [tuple(check) for check in json.loads(metadata["checks"])]
        self._ended = json.loads(metadata["ended"])
        for name, rows in tensors.items():
            kind, _, name = name.partition("/")
            (self._rows if kind == "rows" else self._check_rows)[name] = list(rows)
        if self.rank == 0:
            self._leave_note(self._ended)
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load, **kwargs)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a continuation needs beside the model: rows by name, and where the probe is."""
        kinds = {"rows": self._rows, "check": self._check_rows}
        tensors = {
            f"{kind}/{name}": torch.stack(rows).contiguous() for kind, by in kinds.items() for name, rows in by.items()
        }
        where = {"step": self._step, "ended": self._ended, "checks": self._checks}
        return tensors, {name: json.dumps(value) for name, value in where.items()}

    def _read_state(self, local_path) -> tuple[dict[str, Tensor], dict[str, str]]:
        file = Path(local_path or "") / STATE_FILE
        if local_path is not None and not file.is_file():
            raise ConfigurationError(
                f"trainer.default_local_dir: {str(local_path)!r} is not a checkpoint of a policy probe; delete "
                f"{self.hybrid.output_dir}.partial to probe afresh",
                see="unfinished-probe-cannot-be-used",
            )
        with safe_open(file, framework="pt") as saved:
            if "checks" not in saved.metadata():
                raise ConfigurationError(
                    f"trainer.default_local_dir: {str(local_path)!r} is a policy probe of an earlier version; delete "
                    f"{self.hybrid.output_dir}.partial to probe afresh",
                    see="unfinished-probe-cannot-be-used",
                )
            return {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata()  # noqa: SIM118


def _switch_dropout_off(model: torch.nn.Module) -> None:
    """verl trains, and so scores, in train mode, which gradient checkpointing needs; the probe wants no noise in it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Hugging Face's attention takes its rate from an attribute.
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
