"""The engine of the probe with objective ``policy``: verl's actor with SVD-LoRA on every candidate.

verl's own loop drives it. For ``probe.warmup_steps`` steps it trains the probe's parameters with the configured policy
loss on real rollouts; the steps after those are scored instead of trained on: their rollouts come from held-out
prompts, and every mini-batch is passed under the complementary masks of Algorithm 1. After the last one rank 0 writes
the artifact. This process then ends, and the run that trains starts from the original checkpoint (Algorithm 2).
"""

from __future__ import annotations

import dataclasses
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
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.probing.checks import check_budget, check_shapes
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.layers import SvdLoraLinear, attach
from hybrid_lora_plugin.probing.loading import checkpoint_fingerprint, parameter_count
from hybrid_lora_plugin.probing.measure import draw_partition, sensitivities_of
from hybrid_lora_plugin.probing.method import warmup_rate
from hybrid_lora_plugin.probing.methods.svd_lora import check_trained, results_of
from hybrid_lora_plugin.probing.provenance import environment, model_identity, probe_record
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.training.dtensor import whole
from hybrid_lora_plugin.verl_backend import requirements
from hybrid_lora_plugin.verl_backend.checkpoint_retention import Retention
from hybrid_lora_plugin.verl_backend.checkpoint_writing import unwritable_explained, written_whole
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
        self._step = 0
        self._rows: list[Tensor] = []
        # Gradients of e of the step that is being scored: [partitions_per_batch][M], and of how many mini-batches.
        self._gradients: list[list[Tensor]] = []
        self._mini_batches = 0
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    @property
    def scoring(self) -> bool:
        """Whether the warm-up is over."""
        return self._step >= self.hybrid.probe.warmup_steps

    # -- building ---------------------------------------------------------------------------------------------

    def _build_lora_module(self, module):
        self._candidates = find_candidates(module)
        check_shapes(self._candidates, self.hybrid.lora.rank)
        check_budget(self._candidates, self.hybrid.budget, self.hybrid.lora.rank)
        self._identity = model_identity(str(self.model_config.path), module, self._candidates, parameter_count(module))
        module.enable_input_require_grads()
        probe = self.hybrid.probe
        # Centred, since FSDP2 casts parameters to verl's param_dtype, bfloat16 by default.
        self._layers = attach(module, self._candidates, self.hybrid.lora.rank, probe.seed, probe.init, centred=True)
        _switch_dropout_off(module)
        if self.rank == 0:
            print(
                f"hybrid_lora: probing {len(self._candidates)} modules with the policy objective, {probe.warmup_steps} "
                f"warm-up steps, then {probe.partitions} scored partitions"
            )
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
        if not self.scoring:
            return super().train_batch(data, loss_function)
        return self._score_batch(data, loss_function)

    def _score_batch(self, data, loss_function):
        """``∂(L_A + L_B)/∂e`` of one mini-batch, added to what the step has so far; no parameter moves."""
        layers = list(self._layers.values())
        if not self._mini_batches:
            self._begin_scoring_step()
        for offset, gradients in enumerate(self._gradients):
            in_bucket_a = draw_partition(self.hybrid.probe.seed, len(self._rows) + offset, len(layers))
            self.optimizer_zero_grad()
            try:
                for active in (~in_bucket_a, in_bucket_a):
                    for layer, on in zip(layers, active.tolist(), strict=True):
                        layer.active = on
                    outputs = self.forward_backward_batch(data, loss_function, forward_only=False)
            finally:
                for layer in layers:
                    layer.active = True
            for total, layer in zip(gradients, layers, strict=True):
                if layer.e.grad is not None:
                    total += whole(layer.e.grad, get_device_id())
        self._mini_batches += 1
        self.optimizer_zero_grad()
        if self.is_mp_src_rank_with_outputs():
            outputs["metrics"]["grad_norm"] = 0.0
            outputs["metrics"]["probe_partitions"] = [float(len(self._rows))]
        return outputs

    def _begin_scoring_step(self) -> None:
        if not self._rows:
            with self._whole_layers() as layers:
                check_trained(layers)
        for layer in self._layers.values():
            for parameter in (layer.A, layer.B, layer.alpha):
                parameter.requires_grad_(False)
        probe = self.hybrid.probe
        partitions = min(probe.partitions_per_batch, probe.partitions - len(self._rows))
        self._gradients = [
            [torch.zeros(layer.e.shape, device=get_device_id()) for layer in self._layers.values()]
            for _ in range(partitions)
        ]

    def lr_scheduler_step(self):
        # verl calls this after the last mini-batch of a step: the one place where an engine learns that it is over.
        rate = super().lr_scheduler_step()
        if self.scoring and self._mini_batches:
            self._finish_scoring_step()
        self._step += 1
        return rate

    def _finish_scoring_step(self) -> None:
        values = [whole(layer.e, get_device_id()) + layer.e_origin for layer in self._layers.values()]
        for gradients in self._gradients:
            # Mini-batches have losses of their own; their mean is that of the step.
            pairs = [(e, gradient / self._mini_batches) for e, gradient in zip(values, gradients, strict=True)]
            self._rows.append(sensitivities_of(pairs))
        self._gradients, self._mini_batches = [], 0
        if self.rank == 0:
            print(f"hybrid_lora: {len(self._rows)} of {self.hybrid.probe.partitions} partitions scored")
        if len(self._rows) == self.hybrid.probe.partitions:
            self._write_artifact()

    def _write_artifact(self) -> None:
        with self._whole_layers() as layers:
            measurements = {"sensitivities": torch.stack(self._rows)} | results_of(layers)
        if self.rank == 0:
            config = command_config(self.hybrid, str(self.model_config.path), bool(self.model_config.trust_remote_code))
            settings = kept_settings(self.hybrid.output_dir)
            data = {
                "source": "rollouts of held-out prompts",
                "checkpoint": checkpoint_fingerprint(self.model_config.local_path),
                "settings": settings,
            }
            if weights := weights_identity(self.model_config.local_path):
                data["weights"] = weights
            record = probe_record(config, "svd_lora", self._autocast_dtype, data, self._lr)
            record = dataclasses.replace(record, batch_size=int(settings["data.train_batch_size"]), max_length=0)
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
            print(f"hybrid_lora: allocation written to {self.hybrid.output_dir}")
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
            rows = torch.stack(self._rows) if self._rows else torch.zeros(0, len(self._layers), dtype=torch.float64)

            def write() -> None:
                with unwritable_explained(folder):
                    save_file({"sensitivities": rows}, unfinished / STATE_FILE, metadata={"step": str(self._step)})

            ranks.from_first(write)
        self._retention.add(folder)

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=True, **kwargs):
        # Rank 0 wrote it, perhaps to a disk of its own.
        ranks = Ranks(torch.device(get_device_id()))
        self._step, self._rows = ranks.from_first(lambda: self._read_state(local_path))
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load, **kwargs)

    def _read_state(self, local_path) -> tuple[int, list[torch.Tensor]]:
        file = Path(local_path or "") / STATE_FILE
        if local_path is not None and not file.is_file():
            raise ConfigurationError(
                f"trainer.default_local_dir: {str(local_path)!r} is not a checkpoint of a policy probe; delete "
                f"{self.hybrid.output_dir}.partial to probe afresh",
                see="unfinished-probe-cannot-be-used",
            )
        with safe_open(file, framework="pt") as saved:
            return int(saved.metadata()["step"]), list(saved.get_tensor("sensitivities"))


def _switch_dropout_off(model: torch.nn.Module) -> None:
    """verl trains, and so scores, in train mode, which gradient checkpointing needs; the probe wants no noise in it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Hugging Face's attention takes its rate from an attribute.
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
