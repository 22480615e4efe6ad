"""The live vLLM model as a weight sync sees it: load by plain name, and read back what the forward pass reads.

Written for vLLM 0.28 (``lora/model_manager.py``, ``v1/worker``); where a plain weight lies is in ``vllm_layout``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from verl.utils.vllm import TensorLoRARequest
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.names import PEFT_PREFIX, split_factor, wire_factor
from hybrid_lora_plugin.sync.base_weights import CheckpointWeights, checkpoint_folder
from hybrid_lora_plugin.sync.digest import digest_of, digest_soon
from hybrid_lora_plugin.sync.live_weight import LiveWeight
from hybrid_lora_plugin.sync.wire import SyncHeader
from hybrid_lora_plugin.verl_backend.receiver.vllm_layout import (
    PackedModules,
    absent_beside,
    adapter_slices,
    find_live_weight,
    packed_rows,
    slice_holds,
)


class VllmRolloutModel:
    """One worker's model through one sync after another.

    Args:
        worker: vLLM's worker with verl's extension.
    """

    def __init__(self, worker):
        self._worker = worker
        self._storage = "memory_map"
        #: digest that a loaded weight must have when it is read back
        self._expected: dict[str, Callable[[], str]] = {}
        #: weights whose digest the manifest says: they were loaded as they arrived
        self._as_arrived: set[str] = set()
        self._adapter: tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], SyncHeader] | None = None
        self._live: dict[str, LiveWeight] = {}
        #: of all parameters when ``_live`` was begun
        self._seen: list[int] = []
        #: samples of the weights that no sync sends, from when they were proven
        self._unsent: dict[str, torch.Tensor] = {}
        self._unsent_proven_for = ""
        #: digest of all of each, where a mode has it read back in turns
        self._unsent_digests: dict[str, str] = {}
        self.trained: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        return self._worker.device

    @property
    def model(self) -> torch.nn.Module:
        return self._worker.model_runner.model

    @cached_property
    def checkpoint(self) -> CheckpointWeights:
        config = self._worker.model_config
        return CheckpointWeights(checkpoint_folder(config.model, config.revision), self._storage)

    @property
    def share(self) -> slice:
        """Of things that one look at this machine's checkpoint settles for all of the engine's workers, this one's."""
        parallel = self._worker.vllm_config.parallel_config
        # Workers of several machines may read a checkpoint each. Ray places them without saying where.
        if parallel.nnodes > 1 or parallel.distributed_executor_backend not in ("mp", "uni"):
            return slice(None)
        return slice(self._worker.rank, None, parallel.world_size)

    def checkpoint_names(self) -> list[str]:
        """Names of the checkpoint's weights, the output head left out where it is the embedding.

        Empty where the engine's checkpoint is not in safetensors: then nothing is known of it.
        """
        try:
            names = list(self.checkpoint)
        except WeightSyncError:
            return []
        tied = bool(getattr(self._worker.model_config.hf_config, "tie_word_embeddings", False))
        return [name for name in names if not (tied and name == "lm_head.weight")]

    @cached_property
    def _checkpoint_names(self) -> frozenset[str]:
        return frozenset(self.checkpoint_names())

    def begin(self, header: SyncHeader) -> None:
        """Forget what an earlier sync expected, and where weights were if a sleep has moved them."""
        addresses = self._addresses()
        if addresses != self._seen:
            self._live, self._seen = {}, addresses
        self._storage = header.base_storage
        self._digests = header.digests
        self._expected, self._as_arrived, self._adapter = {}, set(), None
        if header.run != self._unsent_proven_for:
            # Another run may train them.
            self._unsent, self._unsent_digests, self._unsent_proven_for = {}, {}, ""

    def live(self, name: str) -> LiveWeight:
        """Where the plain weight ``name`` lies, found once and found again when vLLM replaced its parameter."""
        if name not in self._live:
            self._live[name] = find_live_weight(self._modules, self._packed, name)
        return self._live[name]

    @cached_property
    def _modules(self) -> dict[str, torch.nn.Module]:
        return dict(self.model.named_modules())

    @cached_property
    def _packed(self) -> PackedModules:
        return PackedModules(self.model)

    # -- loading ----------------------------------------------------------------------------------------------

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self._expect(name, tensor)
        # verl's own loader. With a peft_config it looks for LoRA layers' inner names, without base_sync_done it loads.
        peft = {} if self._worker.vllm_config.lora_config is None else {"lora": True}
        try:
            self._worker._update_weights(weights, peft_config=peft or None, base_sync_done=False)
        except Exception as error:
            names = ", ".join(name for name, _ in weights[:3]) + (", …" if len(weights) > 3 else "")
            raise WeightSyncError(
                f"vLLM cannot load one of {names}: {type(error).__name__}: {error}", see="engine-cannot-load-a-weight"
            ) from error

    def load_part(self, name: str, part: torch.Tensor) -> None:
        live = self.live(name)
        if self._digests:
            self._expected[name] = digest_soon(part.to(live.view.dtype))
        live.view.copy_(part)

    def _expect(self, name: str, tensor: torch.Tensor) -> None:
        """Check the shape, which vLLM's loader does not in every case, and begin the digest of what must be there."""
        try:
            live = self.live(name)
        except WeightSyncError:
            if self._digests:
                raise
            if name in self._checkpoint_names:
                return  # not to be read back, so its layout need not be known
            raise WeightSyncError(
                f"{name}: neither in the rollout engine's model in a layout known here nor in its checkpoint, and "
                "vLLM may drop what it does not know; let trainer and engine read one checkpoint",
                see="weight-in-an-unknown-layout",
            ) from None
        if tuple(tensor.shape) != live.shape:
            raise WeightSyncError(
                f"{name}: received with shape {tuple(tensor.shape)}, wanted {live.shape}",
                see="tensor-of-another-shape-or-dtype",
            )
        if self._digests and name not in self._as_arrived:
            # Waited for when everything of this bucket has been loaded.
            self._expected[name] = digest_soon(live.part_of(tensor).to(live.view.dtype))

    def will_read_back(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether ``verify`` will hash the very bytes of an arriving tensor, so that nobody has to hash them before.

        Not with tensor parallelism, where this worker keeps a part, nor for factors.
        """
        if not self._digests or split_factor(name) is not None:
            return False
        try:
            live = self.live(name)
        except WeightSyncError:
            return False  # said when it is loaded
        view = live.view
        alike = (tensor.shape, tensor.dtype, tensor.device.type) == (view.shape, view.dtype, view.device.type)
        whole = alike and live.transform is None
        if whole:
            self._as_arrived.add(name)
        return whole

    def settle(self) -> None:
        """Wait for every digest begun: the tensors that were loaded may go now."""
        for digest in self._expected.values():
            digest()

    def finish_loading(self) -> None:
        """Let vLLM do what it does after loading, as verl does after every full sync."""
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        for model, config in self._worker._iter_all_models_with_config():
            process_weights_after_loading(model, config, self.device)
        addresses = self._addresses()
        if addresses != self._seen:
            if not self._worker.model_config.enforce_eager:
                raise WeightSyncError(
                    "vLLM replaced parameters after loading, and captured graphs still read the old ones; give "
                    "actor_rollout_ref.rollout.enforce_eager=true",
                    see="captured-graphs-read-old-parameters",
                )
            # Look where weights are now.
            self._live, self._seen = {}, addresses

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.model.parameters()]

    # -- adapter ----------------------------------------------------------------------------------------------

    def replace_adapter(self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], header: SyncHeader) -> None:
        """Replace the engine's adapter by this one.

        Args:
            factors: A [r, d_in] and B [d_out, r] by module.
            header: gives rank and alpha.

        Raises:
            WeightSyncError: the old one stays, or vLLM takes no new one.
        """
        self._worker.remove_lora(VLLM_LORA_INT_ID)
        if VLLM_LORA_INT_ID in self._worker.list_loras():
            raise WeightSyncError(
                "the rollout engine kept its old adapter when told to remove it", see="adapter-not-held-by-the-engine"
            )
        tensors, names = {}, []
        absent = absent_beside(self._packed, self._modules, factors)
        for module, (lora_a, lora_b) in (factors | absent).items():
            parts = self._packed.adapter_names(module)
            rows = packed_rows(self._modules[self._packed.find(module)[0]], len(parts), lora_b)
            for part, part_b in zip(parts, rows, strict=True):
                names.append(part)
                for kind, factor in (("A", lora_a), ("B", part_b)):
                    # Clones: vLLM multiplies B by alpha / r in place.
                    tensors[PEFT_PREFIX + wire_factor(part, kind)] = factor.clone()
        config = {
            "r": header.lora_rank,
            "lora_alpha": header.lora_alpha,
            "target_modules": sorted(names),
            "bias": "none",
        }
        # verl has put a loader of its own in place of vLLM's `_load_adapter`, which takes tensors from memory.
        request = TensorLoRARequest(
            lora_name=VLLM_LORA_NAME,
            lora_int_id=VLLM_LORA_INT_ID,
            lora_path=VLLM_LORA_PATH,
            peft_config=config,
            lora_tensors=tensors,
        )
        if not self._worker.add_lora(request):
            raise WeightSyncError(
                "the rollout engine refused the adapter: add_lora returned False", see="adapter-not-held-by-the-engine"
            )
        if self._digests:
            self._adapter = (factors, header)

    # -- proof ------------------------------------------------------------------------------------------------

    def verify(self) -> dict[str, str]:
        """Read back everything this sync loaded, and samples of what it relies on.

        Returns:
            Digest by name of each weight that ``will_read_back`` promised, as it is in the model.

        Raises:
            WeightSyncError: naming the first weight whose live values are not those that arrived.
        """
        reading = {name: digest_soon(self.live(name).view) for name in (*self._as_arrived, *self._expected)}
        found = {name: digest() for name, digest in reading.items()}
        for name, digest in self._expected.items():
            if found[name] != digest():
                raise WeightSyncError(
                    f"{name}: arrived whole, but the rollout engine's model holds other values",
                    see="engine-holds-other-weights",
                )
        self.check_unsent()
        if self._adapter is not None:
            self._verify_adapter(*self._adapter)
            # Nothing reads the factors again: vLLM has its own.
            self._adapter = None
        return {name: found[name] for name in self._as_arrived}

    def check_unsent(self) -> None:
        """Look at samples of the weights that no sync sends: part of ``verify``, and done also where nothing is proven.

        Raises:
            WeightSyncError: naming the first that is not as it was.
        """
        for name, sample in self._unsent.items():
            if not torch.equal(self.live(name).sample(), sample):
                raise WeightSyncError(
                    f"{name}: changed in the rollout engine without being sent; a sleep that discards weights loses "
                    f"those that a sync does not bring back",
                    see="engine-lost-weights-that-are-not-sent",
                )

    def base_proven_for(self, run: str) -> bool:
        """Whether the weights that this run's syncs leave alone have been compared with the checkpoint."""
        return self._unsent_proven_for == run

    def prove_unsent(self, run: str, names: list[str], *, whole: bool = True) -> None:
        """Compare weights that no sync of ``run`` sends with the checkpoint, once, and remember a sample of each.

        Args:
            run: the training run.
            names: of these weights.
            whole: compare all of them; else the samples alone, and none of a weight in a layout unknown here.

        Raises:
            WeightSyncError: naming the first that differs, or that the checkpoint has not.
        """
        for name in names:
            try:
                live = self.live(name)
            except WeightSyncError:
                if whole:
                    raise
                continue
            if not self._is_original(name, live, whole):
                raise WeightSyncError(
                    f"{name}: the rollout engine holds other values than its checkpoint {self.checkpoint.folder}; give "
                    "actor_rollout_ref.rollout.load_format=safetensors",
                    see="engine-did-not-start-from-its-checkpoint",
                )
            self._unsent[name] = live.sample().clone()
        self._unsent_proven_for = run

    def _is_original(self, name: str, live: LiveWeight, whole: bool) -> bool:
        try:
            original = live.part_of(self.checkpoint.read(name))
        except KeyError:
            raise WeightSyncError(
                f"{name}: the trainer has this weight and the checkpoint of the rollout engine, "
                f"{self.checkpoint.folder}, has not; give hybrid_lora.sync=merge, which needs no checkpoint there",
                see="checkpoints-of-trainer-and-engine-differ",
            ) from None
        if whole:
            return digest_of(live.view.cpu()) == digest_of(original.to(live.view.dtype))
        # A file that is memory-mapped is read only where the sample lies.
        sample = replace(live, view=original).sample()
        return torch.equal(live.sample(), sample.to(live.view.device, live.view.dtype))

    def begin_building(self, run: str, trained: frozenset[str], unsent: list[str]) -> None:
        """Remember which weights later syncs change, and what the others, which have just been loaded, hold."""
        self.trained, self._unsent_proven_for = trained, run
        for name in unsent:
            try:
                live = self.live(name)
            except WeightSyncError:
                if self._digests:
                    raise
                continue
            self._unsent[name] = live.sample().clone()
            if self._digests:
                self._unsent_digests[name] = digest_of(live.view)

    def read_back_unsent(self, part: slice) -> None:
        for name in sorted(self._unsent_digests)[part]:
            if digest_of(self.live(name).view) != self._unsent_digests[name]:
                raise WeightSyncError(
                    f"{name}: changed in the rollout engine without being sent; read back in full",
                    see="engine-lost-weights-that-are-not-sent",
                )

    def _verify_adapter(self, factors, header: SyncHeader) -> None:
        manager = self._worker.model_runner.lora_manager._adapter_manager
        if VLLM_LORA_INT_ID not in manager.lora_index_to_id:
            raise WeightSyncError(
                "the adapter arrived, but the rollout engine has not activated it", see="adapter-not-held-by-the-engine"
            )
        slot = manager.lora_index_to_id.index(VLLM_LORA_INT_ID)
        filled = set()
        for module, (lora_a, lora_b) in factors.items():
            owner, places = self._packed.find(module)
            layer = manager.modules.get(owner)
            if layer is None:
                raise WeightSyncError(
                    f"{module}: the rollout engine has no adapter slot for it", see="adapter-not-held-by-the-engine"
                )
            for place, part_b in adapter_slices(layer, places, lora_b):
                if not slice_holds(layer, slot, place, lora_a, part_b, header.scaling):
                    raise WeightSyncError(
                        f"{module}: the rollout engine's adapter holds other factors than arrived",
                        see="adapter-not-held-by-the-engine",
                    )
                filled.add((owner, place))
        for name, layer in manager.modules.items():
            for index, live_b in enumerate(getattr(layer, "lora_b_stacked", ())):
                if (name, index) not in filled and live_b[slot].any():
                    raise WeightSyncError(
                        f"{name}: the rollout engine's adapter has factors here that were never sent",
                        see="adapter-not-held-by-the-engine",
                    )
