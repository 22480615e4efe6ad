"""A verl checkpoint engine whose sender is in the same process: a hybrid model that changes by seed, and sends itself.

verl's ``CheckpointEngineWorker`` draws ``receive_weights`` and hands it to the server adapter, which is the plugin's.
What it draws is the trainer's stream, made by the plugin's own sender; a fault is put in between where one is asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.checkpoint_engine.base import CheckpointEngine

from hybrid_lora_plugin import load_allocation
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.names import is_adapter
from hybrid_lora_plugin.sync.base_weights import base_digests
from hybrid_lora_plugin.sync.hybrid_weights import original_weights
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.training.apply import apply_allocation, parts_of, trainable_groups
from hybrid_lora_plugin.training.reference import BaseSnapshot, adapters_off
from hybrid_lora_plugin.verl_backend.fixed_prompts import fixed_prompts
from hybrid_lora_plugin.verl_backend.sender import server_adapter
from hybrid_lora_plugin.verl_backend.sender.logprob_prompt import header_entry
from hybrid_lora_plugin.verl_backend.sender.weight_source import WeightSource
from hybrid_lora_plugin.verl_backend.transport import LimitedSender
from tests.support.faults import Fault, Pair

BACKEND = "hybrid_model"


class FaultySender(LimitedSender):
    """The plugin's transport with a fault in it, where the next sync is to have one there."""

    #: set by the engine of this process for one sync
    fault: Fault | None = None
    before: list[Pair] = []

    async def async_send_weights(self, weights):
        fault, FaultySender.fault = FaultySender.fault, None
        if fault is not None:
            weights = fault.applied([(name, tensor.clone()) async for name, tensor in weights], FaultySender.before)
        await super().async_send_weights(weights)


@CheckpointEngineRegistry.register(BACKEND)
class HybridModelEngine(CheckpointEngine):
    """Trainer and network in one.

    Args:
        bucket_size: not used; there is no network.
        model: folder of the base model.
        allocation: artifact for it.
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
        self._base_snapshot = BaseSnapshot(trainable_groups(self.model)["full"])
        self._prompts = fixed_prompts(AutoTokenizer.from_pretrained(model))
        self._settings = SimpleNamespace(lora={"rollout_dtype": dtype}, lora_rank=rank, lora_alpha=alpha)
        self._sync_base = sync_base
        self.begin_run(sync_check)
        self.configure("merge", None, False)
        self._before: list[Pair] = []
        server_adapter.LimitedSender = FaultySender
        self.update(0)

    # -- driven by the harness --------------------------------------------------------------------------------

    def begin_run(self, sync_check: str, rounding: str = "stochastic") -> None:
        """Send as another training run from here on, with that ``sync_check`` and ``sync_rounding``."""
        self._hybrid = HybridLoraConfig(sync_check=sync_check, sync_base=self._sync_base, sync_rounding=rounding)
        self._source = WeightSource(self._hybrid, self._settings, "cpu")

    @torch.no_grad()
    def update(self, seed: int, scale: float = 1.0) -> None:
        """Move every trained parameter, by default as far as a large optimizer step would."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                size = 0.02 if is_adapter(name) else 0.002
                parameter += scale * size * torch.randn(parameter.shape, generator=generator)

    def train(self, steps: int, lora_rate: float = 2.5e-5, full_rate: float = 1e-6) -> None:
        """From the base model, so many steps of AdamW on the fixed prompts, by default at the paper's rates."""
        groups = trainable_groups(self.model)
        with torch.no_grad():
            for name, parameter in groups["full"]:
                parameter.copy_(self._base_snapshot.values[name])
            for name, parameter in groups["lora"]:
                if ".lora_B." in name:
                    parameter.zero_()
        rates = {"lora": lora_rate, "full": full_rate}
        optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in groups[kind]], "lr": rate} for kind, rate in rates.items()], weight_decay=0.0
        )
        for _ in range(steps):
            optimizer.zero_grad()
            torch.cat([self._scored(tokens) for tokens in self._prompts]).mean().neg().backward()
            optimizer.step()

    def configure(self, mode: str, fault: Fault | None, keep: bool) -> None:
        """What the next sync is: its mode, its fault, and whether it is kept to be the stale one of a later fault."""
        if mode != getattr(self, "mode", mode):
            self.send_all()
        self.mode, self.fault, self._keep = mode, fault, keep

    def send_all(self) -> None:
        """Let the next sync build on none, as that of a new training process."""
        self._source.send_all()

    def lose_sync(self) -> None:
        """Make a sync that never arrives anywhere."""
        for _ in self._stream():
            pass

    def struck(self) -> Fault | None:
        """The fault of the last sync, which knows by now what it damaged."""
        return self.fault

    def unsent(self, mode: str) -> list[str]:
        """Names of weights that a sync in ``mode`` leaves in the rollout engine as they are."""
        names = {name for name, _ in original_weights(self.model, "cpu")}
        if not sync_mode(mode).engine_adapter:
            names -= {f"{module}.weight" for module in parts_of(self.model).lora_modules}
        return sorted(names) if sync_mode(mode).engine_keeps_weights else []

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> list[float]:
        """The trainer's log-probability of every token but the first."""
        return self._scored(tokens).tolist()

    def _scored(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens])
        logits = self.model(ids).logits.float().log_softmax(-1)
        return logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]

    def _fixed_prompt(self) -> dict:
        present = [self.log_probs(tokens) for tokens in self._prompts]
        with self._base_snapshot.swapped_in(trainable_groups(self.model)["full"]), adapters_off(self.model):
            base = [self.log_probs(tokens) for tokens in self._prompts]
        return header_entry(self._prompts, base, present, torch.float32, self._hybrid, self._source.dtype)

    # -- verl's interface -------------------------------------------------------------------------------------

    async def receive_weights(self, global_steps: int | None = None):
        """The stream of one sync, damaged as asked."""
        kept = []
        for name, tensor in self._stream():
            if self._keep:
                kept.append((name, tensor.clone()))
            yield name, tensor
        if self._keep:
            self._before = kept

    def _stream(self) -> Iterator[Pair]:
        mode, fault, source = sync_mode(self.mode), self.fault, self._source
        changes = source.next_changes(mode, None, "here")
        plan = SyncPlan(self.scaling, source.dtype, "cpu", source.rounding, changes=changes)
        tensors = mode.outgoing(self.model, plan)
        if fault is not None and fault.where == "source":
            tensors = fault.applied(tensors, [])
        stream = source.stream(
            mode.name,
            tensors,
            payload_bytes=mode.payload_bytes(parts_of(self.model).counts, source.dtype),
            lora_modules=list(parts_of(self.model).lora_modules),
            base=(lambda: base_digests(original_weights(self.model, "cpu"))) if mode.partial else None,
            merged=(lambda module: mode.merged_digest(self.model, module, plan)) if mode.receiver_merges else None,
            changes=changes,
            fixed_prompt=self._fixed_prompt() if self._hybrid.sync_check == "logprobs" else None,
        )
        if fault is not None and fault.where == "network":
            return fault.applied([(name, tensor.clone()) for name, tensor in stream], self._before)
        if fault is not None and fault.where == "transport":
            FaultySender.fault, FaultySender.before = fault, self._before
        return iter(stream)

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
