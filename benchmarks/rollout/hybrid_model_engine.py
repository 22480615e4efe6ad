"""A verl checkpoint engine whose sender is in the same process: a hybrid model that changes by seed, and sends itself.

verl's ``CheckpointEngineWorker`` draws ``receive_weights`` and hands it to the server adapter, which is the plugin's.
What it draws is the trainer's stream, made by the plugin's own sender; a fault is put in between where one is asked for.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.checkpoint_engine.base import CheckpointEngine

from benchmarks.rollout.faults import Fault, with_fault
from hybrid_lora_plugin import load_allocation
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.sync.base_check import base_digests
from hybrid_lora_plugin.sync.hybrid_weights import lora_modules, original_weights
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.training.apply import apply_allocation, census, is_adapter
from hybrid_lora_plugin.verl_backend.weight_source import WeightSource

BACKEND = "hybrid_model"


@CheckpointEngineRegistry.register(BACKEND)
class HybridModelEngine(CheckpointEngine):
    """Trainer and network in one.

    Args:
        bucket_size: not used; there is no network.
        model: folder of the base model.
        allocation: artifact for it; "" sends the plain model under verl's own names, as verl does.
        rank, alpha: of the adapters.
        dtype: of the rollout engine.
        sync_check, sync_base: as in ``hybrid_lora``.
    """

    def __init__(
        self,
        bucket_size: int,
        model: str,
        allocation: str,
        rank: int = 4,
        alpha: int = 8,
        dtype: str = "float32",
        sync_check: str = "digest",
        sync_base: str = "memory_map",
    ):
        torch.set_num_threads(1)
        # Every tensor-parallel worker has a model of its own, and they have to be one.
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model = apply_allocation(plain, load_allocation(allocation), rank=rank, alpha=alpha)
        self.scaling = alpha / rank
        hybrid = HybridLoraConfig(sync_check=sync_check, sync_base=sync_base)
        settings = SimpleNamespace(lora={"rollout_dtype": dtype}, lora_rank=rank, lora_alpha=alpha)
        self.source = WeightSource(hybrid, settings, "cpu")
        self.mode = "merge"
        self.fault: Fault | None = None
        self._before: list[tuple[str, torch.Tensor]] = []
        self.update(0)

    # -- driven by the harness --------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, seed: int) -> None:
        """Move every trained parameter as far as a large optimizer step would."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                size = 0.02 if is_adapter(name) else 0.002
                parameter += size * torch.randn(parameter.shape, generator=generator)

    def configure(self, mode: str, fault: Fault | None, keep: bool) -> None:
        """What the next sync is: its mode, its fault, and whether it is kept to be the stale one of a later fault."""
        self.mode, self.fault, self._keep = mode, fault, keep

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> list[float]:
        """The trainer's log-probability of every token but the first."""
        ids = torch.tensor([tokens])
        logits = self.model(ids).logits.float().log_softmax(-1)
        return logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0].tolist()

    # -- verl's interface -------------------------------------------------------------------------------------

    async def receive_weights(self, global_steps: int | None = None):
        mode = sync_mode(self.mode)
        tensors = mode.outgoing(self.model, self.scaling, self.source.dtype, "cpu")
        if self.fault is not None:
            tensors = self.fault.at_the_source(tensors)
        stream = self.source.stream(
            mode.name,
            tensors,
            payload_bytes=mode.payload_bytes(census(self.model), self.source.dtype),
            lora_modules=lora_modules(self.model),
            base=(lambda: base_digests(original_weights(self.model, "cpu"))) if mode.partial else None,
        )
        kept = []
        for name, tensor in with_fault(stream, self.fault, self._before):
            if self._keep:
                kept.append((name, tensor.clone()))
            yield name, tensor
        if self._keep:
            self._before = kept

    async def send_weights(self, weights, global_steps=None):
        raise NotImplementedError

    def prepare(self):
        raise NotImplementedError

    def init_process_group(self, **kwargs):
        raise NotImplementedError

    def finalize(self):
        raise NotImplementedError

    @classmethod
    def build_topology(cls, *args, **kwargs):
        raise NotImplementedError
