"""The FSDP2 engine that trains under an allocation (verl 0.9.1 ``workers/engine/fsdp/transformer_impl.py``).

A subclass of verl's own engine that changes what must differ and nothing else: how adapters are attached, the
optimizer's groups, the reference policy, what the rollout engine receives, and what a checkpoint holds besides.
"""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_torch_device
from verl.utils.fsdp_utils import fsdp_version, load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine import FSDPEngineWithLMHead

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.storage import allocation_file, load_allocation
from hybrid_lora_plugin.base_checkpoint import check_model_folder
from hybrid_lora_plugin.base_identity import weight_digests
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import explained
from hybrid_lora_plugin.model_families import refuse_config
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.sync.base_weights import base_digests, stored_dtypes
from hybrid_lora_plugin.sync.hybrid_weights import original_weights, plain_state
from hybrid_lora_plugin.sync.mode_base import SyncMode
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.training.apply import apply_allocation, parts_of, trainable_groups
from hybrid_lora_plugin.training.dtensor import local_tensor, sum_of_squares
from hybrid_lora_plugin.training.flat_pieces import flat_pieces
from hybrid_lora_plugin.training.full_rate import FullRate, factors_of
from hybrid_lora_plugin.training.memory import TrainingBytes, rank_bytes
from hybrid_lora_plugin.training.precision import frozen_dtype
from hybrid_lora_plugin.training.reference import BaseSnapshot, adapters_off
from hybrid_lora_plugin.training.zeroth_order.two_point import mean_over_ranks
from hybrid_lora_plugin.verl_backend import requirements
from hybrid_lora_plugin.verl_backend.checkpoint_files import require_writable
from hybrid_lora_plugin.verl_backend.checkpoint_retention import Retention
from hybrid_lora_plugin.verl_backend.engine_checkpoints import Checkpoints
from hybrid_lora_plugin.verl_backend.packed_rows import check_packed_rows
from hybrid_lora_plugin.verl_backend.patches import only_parameters_cast
from hybrid_lora_plugin.verl_backend.probe.sft import probed_allocation
from hybrid_lora_plugin.verl_backend.run_kinds import ACTOR, kind_of_model
from hybrid_lora_plugin.verl_backend.sender.logprob_prompt import TrainerLogProbs
from hybrid_lora_plugin.verl_backend.sender.weight_source import WeightSource, rollout_dtype
from hybrid_lora_plugin.verl_backend.surrogate import surrogate_of
from hybrid_lora_plugin.verl_backend.zeroth_order import ZerothOrder
from hybrid_lora_plugin.verl_backend.zeroth_order_requirements import check_model_dropout, check_moved_dtype
from hybrid_lora_plugin.weight_loading import check_weights


class HybridLoraEngine(Checkpoints, FSDPEngineWithLMHead):
    """Full fine-tuning for the modules the allocation names, LoRA for the other candidates, the rest frozen."""

    hybrid: HybridLoraConfig
    _weight_source: WeightSource | None = None
    _log_probs: TrainerLogProbs | None = None
    _base_snapshot: BaseSnapshot | None = None
    #: where frozen weights move without a gradient
    _zeroth_order: ZerothOrder | None = None
    _retention: Retention
    #: on rank 0 what tells the base model's weights from others, once the model is built
    _base_weights: dict[str, str] | None = None

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.hybrid = requirements.check_engine(model_config, engine_config, checkpoint_config)
        self._kind = kind_of_model(model_config)
        ranks = torch.distributed.get_world_size()
        requirements.check_sharding(engine_config.strategy, engine_config.fsdp_size, ranks, self._kind)
        requirements.require_rates(self.hybrid)
        self._ranks = Ranks(torch.device(get_device_id()))
        if self.hybrid.allocation:
            # Rank 0's, for all: other nodes need not see the file, and none waits for one that cannot read it.
            self.allocation, self._allocation_json = self._ranks.from_first(self._read_allocation)
        if self.hybrid.checkpoint_dir:
            self._ranks.on_each(lambda: require_writable(self.hybrid.checkpoint_dir))
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _read_allocation(self) -> tuple[Allocation, str]:
        with explained(otherwise="allocation-cannot-be-read"):
            allocation = load_allocation(self.hybrid.allocation)
        # Kept as text: a checkpoint records what this run trains under, whatever becomes of the file meanwhile.
        return allocation, allocation_file(self.hybrid.allocation).read_text(encoding="utf-8")

    def initialize(self):
        if not self.hybrid.allocation:
            # Before the actor is built: the probe has the memory to itself.
            self.allocation, self._allocation_json = probed_allocation(self.hybrid, self.model_config)
        super().initialize()
        packed = check_packed_rows(self)
        if self.rank == 0 and packed:
            print(f"hybrid_lora: {packed}")
        if self.rank == 0 and self._base_snapshot is not None:
            print(f"hybrid_lora: {self.training_bytes()}")
            if self._zeroth_order is not None:
                print(f"hybrid_lora: {self._zeroth_order}")

    def training_bytes(self) -> TrainingBytes:
        """What this rank holds for training, in bytes."""
        # Which the ranks share out between them: known once there is an optimizer.
        sent = sync_mode(self.hybrid.sync).sent_weights(self._shard_group())
        kept = 0 if sent is None else sent.bytes_for(parts_of(self.module).merged_shapes)
        return rank_bytes(self.module, self._base_snapshot, kept)

    @property
    def scaling(self) -> float:
        """LoRA's scaling s = alpha / rank."""
        return self.model_config.lora_alpha / self.model_config.lora_rank

    # -- building ---------------------------------------------------------------------------------------------

    def _build_module(self):
        self._ranks.from_first(self._check_base)
        # verl holds a whole model in one type; only what trains needs fp32, and is made so with its adapters.
        given = self.engine_config
        # Rank 0's: a machine without the checkpoint's files could not tell.
        dtype = [frozen_dtype(self.hybrid.frozen_dtype, stored_dtypes(self.model_config.local_path))]
        torch.distributed.broadcast_object_list(dtype)
        self.engine_config = copy.copy(given)
        self._base_dtype = str(dtype[0]).removeprefix("torch.")
        check_moved_dtype(self.hybrid, dtype[0], rollout_dtype(self.model_config))
        object.__setattr__(self.engine_config, "model_dtype", self._base_dtype)
        if self.rank == 0:
            print(f"hybrid_lora: frozen weights in {dtype[0]}".replace("torch.", ""))
        try:
            with only_parameters_cast():
                module = super()._build_module()
        finally:
            self.engine_config = given
        self._ranks.from_first(self._check_fetched)
        return module

    def _check_base(self) -> None:
        """Refuse a model that the driver could not see before its weights are read; its modules are looked at later."""
        refuse_config(self.model_config.hf_config)
        check_model_dropout(self.hybrid, self.model_config.hf_config)
        ulysses = ACTOR + "fsdp_config.ulysses_sequence_parallel_size"
        requirements.check_sequence_parallel(
            self.model_config.hf_config,
            self.engine_config.ulysses_sequence_parallel_size,
            str(self._kind.place(ulysses)),
        )
        folder = Path(self.model_config.local_path)
        if folder.is_dir():
            check_model_folder(folder, safetensors=False)
            # verl loads it without looking at what transformers says about it.
            check_weights(folder, bool(self.model_config.trust_remote_code))
            self._base_weights = weight_digests(folder)

    def _check_fetched(self) -> None:
        """The same of a model of a hub, whose weights are on this machine only now."""
        if not Path(self.model_config.local_path).is_dir():
            check_weights(self.model_config.local_path, bool(self.model_config.trust_remote_code))
            self._base_weights = weight_digests(self.model_config.local_path)

    def _build_lora_module(self, module):
        # As in verl: the embedding output needs a gradient for checkpointed layers below the first adapter.
        module.enable_input_require_grads()
        return apply_allocation(
            module,
            self.allocation,
            rank=self.model_config.lora_rank,
            alpha=self.model_config.lora_alpha,
            dropout=self.hybrid.lora.dropout,
        )

    def _build_fsdp_module(self, module):
        module = super()._build_fsdp_module(module)
        if self.engine_config.forward_only:
            return module
        # Here the weights are the checkpoint's and no step has been taken, also when a run resumes later.
        get_torch_device().synchronize()
        self._base_snapshot = BaseSnapshot(trainable_groups(module)["full"])
        if self.hybrid.zeroth_order.enabled:
            self._zeroth_order = ZerothOrder(
                module, self.allocation, self.hybrid.zeroth_order, computes_in=self._autocast_dtype
            )
        if self.rank == 0:
            print(f"hybrid_lora: {parts_of(module).counts}; {len(self.allocation.full_names)} modules fully tuned")
        return module

    def _build_optimizer(self, module):
        groups = trainable_groups(module)
        rates = {"lora": self.hybrid.lora.lr, "full": self.hybrid.full_lr}
        names = [plain_name(name) for name, _ in groups["full"]]
        self._full_rate = FullRate(factors_of(self.hybrid.full_lr_factors), self.hybrid.full_warmup_steps, names)
        # LoRA first, as in every checkpoint; verl logs the first group's rate as actor/lr.
        return build_optimizer(
            [
                {"params": [parameter for _, parameter in groups[kind]], "lr": rates[kind], "name": kind}
                for kind in ("lora", "full")
            ],
            self.optimizer_config,
        )

    # -- training ---------------------------------------------------------------------------------------------

    def train_batch(self, data, loss_function):
        rates = self._rates()
        surrogate = surrogate_of(loss_function) if self._zeroth_order is not None else None
        outputs = super().train_batch(data, loss_function)
        metrics = self._norms | {f"lr_{kind}": rate for kind, rate in rates.items()}
        if surrogate is not None:
            metrics |= self._move_frozen(data, surrogate)
        if self.is_mp_src_rank_with_outputs():
            # Lists, like the per-micro-batch metrics: verl chains them over ranks and mini-batches.
            for name, value in metrics.items():
                outputs["metrics"][name] = [value]
        return outputs

    def _move_frozen(self, data, surrogate) -> dict[str, float]:
        """The step of zeroth order that follows an optimizer step, on the same rows in the same micro-batches."""
        passes = data.clone(recurse=False)
        tu.assign_non_tensor(passes, calculate_entropy=False)

        def measure() -> float:
            losses = self.infer_batch(passes, loss_function=surrogate)["loss"]
            # The root keeps what it gathered for a pass, and the weights are about to be written.
            self._reshard()
            # verl's losses are of the whole mini-batch, times the ranks: the mean over these is the loss.
            return mean_over_ranks(math.fsum(losses), 1.0, get_device_id())

        lora = self.optimizer.param_groups[0]
        training = self.module.training
        self._reshard()
        self.module.eval()
        try:
            return self._zeroth_order.step(measure, lora["lr"] / lora["initial_lr"])
        finally:
            self.module.train(training)

    def _rates(self) -> dict[str, float]:
        """What the next step trains at: ``lora``, ``full``, and ``full_TYPE`` of types with a factor of their own."""
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        step, full = self.lr_scheduler.last_epoch, rates["full"]
        rates["full"] = full * self._full_rate.warmed(step)
        return rates | {f"full_{kind}": full * factor for kind, factor in self._full_rate.of_types(step).items()}

    def optimizer_step(self):
        # Before verl clips: one norm over both groups decides the clipping, these two say where it comes from.
        groups = {group["name"]: group["params"] for group in self.optimizer.param_groups}
        squares = {f"grad_norm_{kind}": sum_of_squares(p.grad for p in params) for kind, params in groups.items()}
        before = {kind: [local_tensor(p).detach().clone() for p in params] for kind, params in groups.items()}
        norm = super().optimizer_step()
        full = [local_tensor(p).detach() for p in groups["full"]]
        self._full_rate.scale(before["full"], full, self.lr_scheduler.last_epoch)
        for kind, params in groups.items():
            moved = [old.sub_(local_tensor(p).detach()) for p, old in zip(params, before[kind], strict=True)]
            squares[f"update_norm_{kind}"] = sum_of_squares(moved)
        # One reduction and one wait for the device, for all of them.
        whole = torch.stack([square.to(get_device_id()) for square in squares.values()])
        group = self._shard_group()
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(whole, group=group)
        self._norms = dict(zip(squares, whole.sqrt().tolist(), strict=True))
        return norm

    def _shard_group(self) -> torch.distributed.ProcessGroup | None:
        """The ranks that hold one copy of the trained parameters between them; None where each holds a whole one."""
        if fsdp_version(self.module) == 1:
            alone = self.module.sharding_strategy == ShardingStrategy.NO_SHARD
            return None if alone else self.module.process_group
        parameter = self.optimizer.param_groups[0]["params"][0]
        sharded = [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
        return parameter.device_mesh.get_group(sharded[0]) if sharded else None

    # -- reference policy -------------------------------------------------------------------------------------

    def to(self, device, model=True, optimizer=True, grad=True):
        super().to(device, model, optimizer, grad)
        if model and self._base_snapshot is not None:
            self._base_snapshot.to(device)
            if self._zeroth_order is not None:
                self._zeroth_order.to(device)

    @contextmanager
    def disable_adapter(self):
        """The untouched base model: adapters off and the original values of whatever moved in place."""
        self._reshard()
        with ExitStack() as entered:
            entered.enter_context(self._base_snapshot.swapped_in(trainable_groups(self.module)["full"]))
            if self._zeroth_order is not None:
                entered.enter_context(self._zeroth_order.base_in_place())
            entered.enter_context(adapters_off(self.module))
            try:
                yield
            finally:
                # An all-gathered copy of either state must not outlive it.
                self._reshard()

    def _reshard(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
            elif isinstance(module, FullyShardedDataParallel) and module._is_root is not None:
                # As verl does with the root after an evaluation. Before its first forward pass a unit does not know
                # yet whether it is the root; nothing has been gathered then, and it has no shard to go back to.
                if module._handle and module._handle.uses_sharded_strategy:
                    module._handle.reshard(True)

    # -- rollout ----------------------------------------------------------------------------------------------

    def get_per_tensor_param(self, layered_summon=False, base_sync_done=False, **kwargs):
        """The next weight sync as a stream of named tensors, and the adapter's configuration where the engine runs one.

        With shards every tensor is a collective: every rank must draw the whole stream.
        """
        self._retention.settle()
        mode, device = sync_mode(self.hybrid.sync), get_device_id()
        if self._weight_source is None:
            self._weight_source = WeightSource(self.hybrid, self.model_config, device)
        source, parts = self._weight_source, parts_of(self.module)
        arrival = source.next_arrival()
        # verl syncs engines beside the trainer in this way, and those apart from it without arguments; one step may do
        # both, and they need not hold the same weights before.
        changes = source.next_changes(mode, self._shard_group(), "beside" if base_sync_done else "apart")
        plan = SyncPlan(self.scaling, source.dtype, device, source.rounding, arrival, changes=changes)
        plan = self._from_originals(plan)
        stream = source.stream(
            mode.name,
            self._while_resident(mode.outgoing(self.module, plan)),
            payload_bytes=mode.payload_bytes(parts.counts, source.dtype),
            lora_modules=list(parts.lora_modules),
            base=self._base_digests if mode.partial else None,
            merged=(lambda module: self._merged_digest(mode, module, plan)) if mode.receiver_merges else None,
            arrival=arrival,
            changes=changes,
            fixed_prompt=self._fixed_prompt(source.dtype) if self.hybrid.sync_check == "logprobs" else None,
        )
        # verl asks only whether there is one; what the engine needs of it travels in the stream.
        return stream, {"r": self.model_config.lora_rank} if mode.engine_adapter else None

    def _from_originals(self, plan: SyncPlan) -> SyncPlan:
        """``plan`` for full modules that are rounded from the base model's values."""
        if fsdp_version(self.module) != 1:
            return replace(plan, originals=self._base_snapshot.values)
        if plan.arrival is not None:
            plan = replace(plan, pieces=flat_pieces(self.module, self._base_snapshot.values))
        if plan.rounding.is_stochastic(plan.dtype):
            # FSDP1 keeps pieces of a parameter that begin and end within a row.
            return replace(plan, state_of=lambda model: self._state_on_grid(model, plan.dtype))
        return plan

    def _state_on_grid(self, model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """FSDP1's ``state_dict()``, a copy, with full modules as ``rounding.on_grid`` has them."""
        self._reshard()
        with self._base_snapshot.on_grid(trainable_groups(model)["full"], dtype):
            return model.state_dict()

    def _fixed_prompt(self, dtype: torch.dtype) -> dict:
        if self._log_probs is None:
            self._log_probs = TrainerLogProbs(self)
        return self._log_probs.for_header(self.hybrid, dtype)

    def _base_digests(self) -> dict[str, str]:
        """Digest of every weight that training leaves alone; without digests in the sync "" for each: it is counted."""
        if self.hybrid.sync_check == "off":
            trained = parts_of(self.module).trained
            state = plain_state(self.module).items()
            return {plain: "" for plain, (name, tensor) in state if name not in trained and tensor.is_floating_point()}
        return base_digests(self._while_resident(original_weights(self.module, get_device_id())), self._shard_group())

    def _merged_digest(self, mode: SyncMode, module: str, plan: SyncPlan) -> dict[str, str]:
        with self._resident():
            return mode.merged_digest(self.module, module, plan)

    @contextmanager
    def _resident(self):
        """The model on the device: FSDP1 gathers nothing from the host."""
        moves = self._is_offload_param and fsdp_version(self.module) == 1
        if moves:
            load_fsdp_model_to_gpu(self.module)
        try:
            yield
        finally:
            if moves:
                offload_fsdp_model_to_cpu(self.module)

    def _while_resident(self, tensors):
        with self._resident():
            yield from tensors
