"""One candidate of a trial: the hybrid model that a run would train, its optimizer and its state, on all ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from hybrid_lora_plugin.allocation.budget_modes import FIXED, BudgetRecord
from hybrid_lora_plugin.allocation.schema import Allocation, ModelIdentity, ModuleRecord, SelectionRecord
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.names import ADAPTER, plain_name
from hybrid_lora_plugin.probing.distributed import Ranks, decoder_layers
from hybrid_lora_plugin.probing.forward import Batch, Passes, negative_log_likelihood, response_logits
from hybrid_lora_plugin.probing.recompute import recompute_activations
from hybrid_lora_plugin.probing.trial.options import TrialSettings
from hybrid_lora_plugin.probing.trial.portfolio import Contender
from hybrid_lora_plugin.seeding import generator
from hybrid_lora_plugin.training.apply import apply_allocation, trainable_groups
from hybrid_lora_plugin.training.dtensor import local_tensor, whole
from hybrid_lora_plugin.training.full_rate import FullRate, factors_of

_MOMENTS = ("exp_avg", "exp_avg_sq")
#: steps that AdamW has taken
_TAKEN = "taken"


class ContenderModel:
    """A hybrid model in training. Every rank makes the same calls with the same batches.

    One process computes in the type of the base under autocast; several shard the model by FSDP2, a unit for each
    decoder layer and one for the rest, as a run does. What trains is float32.

    Attributes:
        step: optimizer steps taken.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Sequence[Candidate],
        allocation: Allocation,
        *,
        rank: int,
        settings: TrialSettings,
        probe: ProbeConfig,
        ranks: Ranks,
    ) -> None:
        """Turn a plain model into the hybrid one; it is changed and belongs to this object.

        Args:
            model: a Hugging Face model as it was loaded, on the CPU, or on the device of the only rank.
            candidates: the M candidates.
            allocation: which of them are fully tuned; it may be none.
            rank: of the adapters; their alpha is ``settings.scale`` times it.
            settings: how to train.
            probe: seed, micro-batches and gradient checkpointing.
            ranks: who shares the work.
        """
        self.step, self._ranks, self._settings, self._probe = 0, ranks, settings, probe
        self._dtype = model.dtype
        layers = decoder_layers(model, candidates)
        with torch.random.fork_rng(devices=[]):
            self._model = apply_allocation(model, allocation, rank=rank, alpha=settings.scale * rank)
        set_adapters(self._model, probe.seed)
        self._model.eval()  # as of the probe: no dropout, and a step is a function of its rows
        if probe.gradient_checkpointing:
            recompute_activations(layers)
        self._place(layers)
        groups = trainable_groups(self._model)
        self._parameters = {plain_name(name): one for kind in ("lora", "full") for name, one in groups[kind]}
        self._full = [parameter for _, parameter in groups["full"]]
        rates = {"lora": settings.lora_lr, "full": settings.full_lr}
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [one for _, one in groups[kind]], "lr": rates[kind]}
                for kind in ("lora", "full")
                if groups[kind]
            ],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        names = [plain_name(name) for name, _ in groups["full"]]
        types = {name.rpartition(".")[0].rpartition(".")[2] for name in names}
        factors = factors_of(settings.full_lr_factors)
        self._full_rate = FullRate({kind: factor for kind, factor in factors.items() if kind in types}, 0, names)
        self._scales = bool(factors.keys() & types)
        self._passes = Passes(self._call, ranks, probe.micro_batch_size, probe.micro_batch_tokens)

    def _place(self, layers: Sequence[nn.Module]) -> None:
        ranks = self._ranks
        self._mesh = None
        if ranks.size == 1:
            self._model.to(ranks.device)
            return
        self._mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        half = self._dtype if self._dtype in (torch.bfloat16, torch.float16) else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=None if half is None else torch.float32)
        for layer in layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        fully_shard(self._model, mesh=self._mesh, mp_policy=policy)

    def _call(self, **inputs: Any) -> Any:
        with self._autocast():
            return self._model(**inputs)

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        # Sharded, FSDP2 casts what it gathers.
        if self._mesh is None and self._dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(self._ranks.device.type, dtype=self._dtype):
                yield
        else:
            yield

    def train(self, batch: Batch) -> float:
        """One AdamW step on the mean loss of the response tokens of ``batch`` ``[B, S]``; returns that loss before it.

        As in verl a step whose gradient is not finite moves nothing; a loss that is no number is for the caller to see.
        """
        self._optimizer.zero_grad(set_to_none=True)
        # FSDP2 takes the mean of the ranks' gradients, and each has its own rows of the sum.
        share = (self._ranks.size if self._mesh is not None else 1) / batch.response_tokens
        total = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for micro, _ in self._passes.micro_batches(batch):
            loss = negative_log_likelihood(self._call, micro)
            (loss * share).backward()
            total += loss.detach().double()
        loss = float(self._ranks.sum_(total)) / batch.response_tokens
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.clip_grad)
        if math.isfinite(float(norm.full_tensor() if isinstance(norm, DTensor) else norm)):
            before = [local_tensor(one).detach().clone() for one in self._full] if self._scales else []
            self._optimizer.step()
            if self._scales:
                self._full_rate.scale(before, [local_tensor(one).detach() for one in self._full], self.step)
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    @torch.no_grad()
    def row_losses(self, batch: Batch) -> list[float]:
        """Sum of the losses of each row's response tokens, ``[B]``, equal on all ranks."""
        found = torch.zeros(batch.rows, dtype=torch.float64, device=self._ranks.device)
        mine = list(range(self._ranks.rank, batch.rows, self._ranks.size))
        for rows in self._groups(batch, mine):
            # Without rows of its own a rank passes one to keep the others company.
            micro = batch.take(rows or [0]).to(self._ranks.device)
            logits, targets = response_logits(self._call, micro)
            losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            sums = losses.view(targets.shape).double().sum(dim=1)
            if rows:
                found[rows] = sums
        return self._ranks.sum_(found).tolist()

    def _groups(self, batch: Batch, mine: Sequence[int]) -> Iterator[Sequence[int]]:
        """A rank's rows in turns, of which all ranks have as many."""
        longest = -(-batch.rows // self._ranks.size)
        tokens = self._probe.micro_batch_tokens
        if tokens is None:
            size = self._passes.rows_at_once(batch)
        else:
            size = max(1, tokens // batch.input_ids.shape[1])
        for start in range(0, longest, size):
            yield mine[start : start + size]

    def tensors(self) -> dict[str, Tensor]:
        """What a continuation needs, whole and on the CPU; on other ranks than the first nothing. All ranks call it."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            for key, tensor in {"parameter": parameter, **{m: state[m] for m in _MOMENTS if m in state}}.items():
                gathered = whole(tensor, self._ranks.device)
                if self._ranks.first:
                    found[f"{key}/{name}"] = gathered.detach().to("cpu", copy=True).contiguous()
        moved = next(iter(self._optimizer.state.values()), None)
        if moved is not None and self._ranks.first:
            # Fewer than ``step`` where a gradient was not finite.
            found[_TAKEN] = moved["step"].detach().to("cpu", copy=True)
        return found

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``tensors`` gave after ``step`` steps, bit for bit; ranks but the first give nothing."""
        self.step = step
        taken = self._ranks.from_first(lambda: float(tensors[_TAKEN]) if _TAKEN in tensors else None)
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                local_tensor(parameter).copy_(local_tensor(self._dealt(tensors.get(f"parameter/{name}"), parameter)))
            if taken is not None:
                moments = {moment: self._dealt(tensors.get(f"{moment}/{name}"), parameter) for moment in _MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(taken), **moments}

    def _dealt(self, tensor: Tensor | None, like: nn.Parameter) -> Tensor:
        """The first rank's tensor, placed and sharded as ``like`` is."""
        device = self._ranks.device
        if not isinstance(like, DTensor):
            return tensor.to(device).clone()
        given = torch.empty(like.shape, dtype=like.dtype) if tensor is None else tensor
        return distribute_tensor(given.to(device), like.device_mesh, like.placements)


def allocation_of(one: Contender, identity: ModelIdentity, candidates: Sequence[Candidate]) -> Allocation:
    """An allocation that was not selected by a score: what ``apply_allocation`` reads of one."""
    full = set(one.modules)
    return Allocation(
        model=identity,
        selection=SelectionRecord("explicit", "lowest", "none"),
        budget=BudgetRecord(FIXED, 0.0, "stop", 0, 0, one.rank),
        modules=[
            ModuleRecord(
                **vars(candidate), mean=0.0, std=0.0, score=0.0, signal=True,
                assignment="full" if candidate.name in full else "lora",
            )
            for candidate in candidates
        ],
        environment={},
    )  # fmt: skip


@torch.no_grad()
def set_adapters(model: nn.Module, seed: int) -> None:
    """PEFT's first values, drawn for each module by itself, so that candidates share those of the modules they share.

    A is uniform in ±1/√d_in (kaiming with a = √5), B is 0.

    Args:
        model: a hybrid model.
        seed: of the draws.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            draws = torch.rand(a.shape, generator=generator(seed, f"trial adapter {plain_name(name)}"))
            a.copy_((2 * draws - 1) / math.sqrt(a.shape[1]))
            b.zero_()
