"""What the engine saves and resumes: verl's checkpoint, what training changed beside it, each whole or not at all."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from verl.utils.device import get_device_id, get_torch_device
from verl.utils.fsdp_utils import offload_fsdp_optimizer

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.names import plain_name, wire_name
from hybrid_lora_plugin.sync.base_weights import base_digests
from hybrid_lora_plugin.sync.hybrid_weights import original_weights
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.training.apply import parts_of, trainable_groups
from hybrid_lora_plugin.training.checkpoint import (
    FOLDER,
    CheckpointDescription,
    load_moves,
    other_rounding,
    require_same_moves,
    require_same_rounding,
    require_same_setting,
    save_trained,
)
from hybrid_lora_plugin.training.dtensor import local_tensor, whole, with_local
from hybrid_lora_plugin.training.rounding import Rounding
from hybrid_lora_plugin.verl_backend import hugging_face_output
from hybrid_lora_plugin.verl_backend.checkpoint_files import require_shards
from hybrid_lora_plugin.verl_backend.checkpoint_retention import Retention
from hybrid_lora_plugin.verl_backend.checkpoint_writing import Disks, tidy, unwritable_explained, written_whole
from hybrid_lora_plugin.verl_backend.earlier_checkpoint import require_hybrid, require_weights
from hybrid_lora_plugin.verl_backend.run_kinds import MODEL
from hybrid_lora_plugin.verl_backend.sender.weight_source import rollout_dtype
from hybrid_lora_plugin.verl_backend.trainable_state import (
    gathered_optimizer,
    load_optimizer,
    load_weights,
    read_state,
    save_state,
)


class Checkpoints:
    """``save_checkpoint`` and ``load_checkpoint`` of ``HybridLoraEngine``, in front of those of verl's engine."""

    _retention: Retention
    _saves_hf_model: bool
    #: whether a checkpoint has the state of ``hybrid_lora.save=trainable``
    _saves_state: bool
    _base_identity_kept: str | None = None

    def initialize(self):
        super().initialize()
        manager = self.checkpoint_manager
        hf_model = hugging_face_output.take_over(manager)
        self._saves_hf_model = hf_model or self.hybrid.export_at_save
        contents = manager.checkpoint_save_contents
        self._saves_state = self.hybrid.save == "trainable" and "model" in contents
        if self._saves_state:
            manager.checkpoint_save_contents = [name for name in contents if name not in ("model", "optimizer")]
        self._retention = Retention(self._ranks, self.hybrid.best.keep)

    def train_batch(self, data, loss_function):
        self._retention.settle()
        return super().train_batch(data, loss_function)

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None, **kwargs):
        folder = Path(local_path)
        self._retention.make_room(max_ckpt_to_keep)
        with written_whole(folder, self._ranks) as unfinished:
            # The limit is not verl's to keep, whose deletion comes too early.
            super().save_checkpoint(str(unfinished), hdfs_path, global_step, None, **kwargs)
            description = self._description(global_step)
            tensors, optimizer, base = self._gathered(), {}, ""
            if self._saves_state:
                optimizer = gathered_optimizer(self.optimizer, self._trained_names(), self._ranks)
                base = self._base_identity()

            def write() -> None:
                with unwritable_explained(folder):
                    moves = self._zeroth_order.log if self._zeroth_order is not None else None
                    recorded = self._allocation_json, self._base_weights, moves
                    kept = save_trained(unfinished, tensors, description, *recorded)
                    if self._saves_state:
                        schedule = self.lr_scheduler.state_dict()
                        save_state(kept, self.optimizer, optimizer, schedule, base, self._ranks.size)
                    hugging_face_output.end_mergers(unfinished)

            # A disk that is full ends every rank, instead of leaving the others to wait for the first.
            self._ranks.from_first(write)
            if self._saves_hf_model:
                self._save_merged(unfinished, description)
        self._retention.add(folder)
        if self._weight_source is not None:
            # The sync that verl makes next is of these very weights.
            self._weight_source.read_all_back()

    def _description(self, global_step: int | None) -> CheckpointDescription:
        return CheckpointDescription(
            base_model=str(self.model_config.path),
            rank=self.model_config.lora_rank,
            alpha=self.model_config.lora_alpha,
            global_step=int(global_step or 0),
            rollout_dtype=str(rollout_dtype(self.model_config)).removeprefix("torch."),
            rounding_mode=self.hybrid.sync_rounding,
            rounding_seed=self.hybrid.sync_seed,
            base_dtype=self._base_dtype,
            zeroth_order=self._zeroth_order is not None,
            recipe={"run": self._kind.name, "full_lr": self.hybrid.full_lr, "lora_lr": self.hybrid.lora.lr},
        )

    def _gathered(self) -> dict[str, torch.Tensor]:
        """On rank 0 everything that trains, whole, in float32 and on the host; elsewhere nothing."""
        tensors = {}
        for name, tensor in self._while_resident(self._trained_state()):
            gathered = whole(tensor, get_device_id())
            if self.rank == 0:
                tensors[wire_name(name)] = gathered.float().cpu().contiguous()
        return tensors

    def _save_merged(self, folder: Path, description: CheckpointDescription) -> None:
        dtype = rollout_dtype(self.model_config)
        plan = self._from_originals(SyncPlan(description.scaling, dtype, get_device_id(), description.rounding))
        with self._resident():
            hugging_face_output.save_merged(self.module, plan, folder, self._ranks, self.model_config, self._base_dtype)

    def _trained_state(self):
        state = self.module.state_dict()
        # A KeyError rather than a checkpoint that lacks one.
        for name in sorted(parts_of(self.module).trained):
            yield name, state[name]

    def _trained_names(self) -> dict[int, str]:
        """Name on the wire by ``id`` of each parameter that trains."""
        groups = trainable_groups(self.module)
        return {id(parameter): wire_name(name) for group in groups.values() for name, parameter in group}

    def _base_identity(self) -> str:
        """Digest of the base model's values, whatever types and shards they are held in: 64 hexadecimal digits."""
        if self._base_identity_kept is None:
            device = get_device_id()

            def weights():
                yield from self._while_resident(original_weights(self.module, device))
                for name, parameter in trainable_groups(self.module)["full"]:
                    original = self._base_snapshot.values[name].to(device)
                    yield plain_name(name), whole(with_local(parameter, original), device)

            self._reshard()
            with self._zeroth_order.base_in_place() if self._zeroth_order is not None else nullcontext():
                digests = json.dumps(base_digests(weights(), self._shard_group()), sort_keys=True)
            self._base_identity_kept = hashlib.sha256(digests.encode()).hexdigest()
        return self._base_identity_kept

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=True, **kwargs):
        if local_path is not None:
            folder = Path(local_path)
            Disks(folder, self._ranks).in_turn(lambda: tidy(folder))
            self._ranks.from_first(lambda: self._compare_setting(folder / FOLDER))
            state = self._ranks.from_first(lambda: read_state(folder / FOLDER))
            if state is not None:
                self._load_trainable(folder, state, hdfs_path, del_local_after_load, **kwargs)
                return
            self._ranks.on_each(lambda: self._require_shards(local_path))
        self._resume_moves(folder / FOLDER if local_path is not None else None)
        base = self._frozen_sums()
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load, **kwargs)
        # On each rank: a difference may lie in one rank's shard alone.
        self._ranks.on_each(lambda: self._require_same_base(base, local_path))

    def _load_trainable(self, folder: Path, state: dict, hdfs_path, del_local_after_load, **kwargs) -> None:
        """Resume from a checkpoint of ``hybrid_lora.save=trainable``, saved by any number of ranks."""
        manager, kept, ranks = self.checkpoint_manager, folder / FOLDER, self._ranks
        given = manager.checkpoint_load_contents
        require_weights(given, folder, self._kind)
        identity = self._base_identity()
        ranks.on_each(lambda: None if identity == state["base"] else self._refuse_base(folder))
        same_ranks = state["ranks"] == ranks.size
        own = ["extra"] if same_ranks and manager.should_load_extra else []
        if own:
            ranks.on_each(lambda: require_shards(str(folder), ["extra_state"], ranks.rank, ranks.size))
        try:
            manager.checkpoint_load_contents = own
            super().load_checkpoint(str(folder), hdfs_path, del_local_after_load, **kwargs)
        finally:
            manager.checkpoint_load_contents = given
        self._resume_moves(kept)
        names = self._trained_names()
        groups = trainable_groups(self.module)
        load_weights(kept, [(names[id(p)], p) for kind in ("lora", "full") for _, p in groups[kind]], ranks)
        if manager.should_load_optimizer:
            load_optimizer(kept, self.optimizer, state, names, ranks)
            if self._is_offload_optimizer:
                offload_fsdp_optimizer(self.optimizer)
        if not own and manager.should_load_extra:
            self.lr_scheduler.load_state_dict(state["schedule"])
            if ranks.first:
                print(
                    f"hybrid_lora: resumed on {ranks.size} ranks from a checkpoint of {state['ranks']}: weights, "
                    "optimizer and schedule go on; random states are those of this start",
                    flush=True,
                )

    def _resume_moves(self, kept: Path | None) -> None:
        """Make the moves of a checkpoint's frozen weights again, from the base model's; every rank must call it.

        What verl then loads from a checkpoint with all weights has to be the same.
        """
        if kept is None or self._zeroth_order is None:
            return
        log = self._ranks.from_first(lambda: load_moves(kept))
        self._reshard()
        self._zeroth_order.resume(log)

    def _compare_setting(self, kept: Path) -> None:
        """Refuse a checkpoint of another model, and say on rank 0 where rollouts will be rounded otherwise."""
        if not kept.is_dir():
            # Another node's disk may be the one that has it, and then that of the shards too.
            require_hybrid(kept.parent)
            return
        require_same_setting(kept, self.allocation, self.model_config.lora_rank, self.model_config.lora_alpha)
        require_same_moves(kept, self.hybrid.zeroth_order.enabled)
        rounding = Rounding(self.hybrid.sync_rounding, self.hybrid.sync_seed)
        dtype = str(rollout_dtype(self.model_config)).removeprefix("torch.")
        require_same_rounding(kept, dtype, rounding)
        difference = other_rounding(kept, dtype, rounding)
        if difference:
            difference = self._kind.text(difference)
            print(f"hybrid_lora: WARNING: {difference} [docs/weight-sync.md#rollouts-in-16-bits]", flush=True)

    def _require_shards(self, folder: str) -> None:
        manager = self.checkpoint_manager
        require_weights(manager.checkpoint_load_contents, Path(folder), self._kind)
        loaded = {
            "model": manager.should_load_model,
            "optim": manager.should_load_optimizer,
            "extra_state": manager.should_load_extra,
        }
        ranks = torch.distributed.get_world_size()
        require_shards(folder, [kind for kind, wanted in loaded.items() if wanted], self.rank, ranks)

    def _require_same_base(self, base: dict[str, tuple[float, float]], local_path: str) -> None:
        # The checkpoint holds frozen weights too. If they are not those of model.path, the reference snapshot, which
        # was taken from there, belongs to another base model.
        changed = [name for name, sums in self._frozen_sums().items() if sums != base[name]]
        if changed:
            self._refuse_base(local_path, f", first difference {plain_name(changed[0])!r}")

    def _refuse_base(self, folder, difference: str = "") -> None:
        raise ConfigurationError(
            f"{self._kind.place(MODEL + 'path')}: {self.model_config.path!r} is not the base model of the checkpoint "
            f"in {str(folder)!r}{difference}; give the model the run started from",
            see="checkpoint-of-another-base-model",
        )

    def _frozen_sums(self) -> dict[str, tuple[float, float]]:
        """Sum and absolute sum of this rank's shard of each frozen weight: enough to tell one base from another."""
        # verl offloads without waiting for the copies to end.
        get_torch_device().synchronize()
        shards = {n: local_tensor(p).detach() for n, p in self.module.named_parameters() if not p.requires_grad}
        return {
            n: (s.sum(dtype=torch.float64).item(), s.abs().sum(dtype=torch.float64).item()) for n, s in shards.items()
        }
