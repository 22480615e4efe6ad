"""For the tests of weight syncs: trained hybrid models, and a Hugging Face model of its own as the rollout engine."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin import apply_allocation, load_allocation
from hybrid_lora_plugin.allocation import Allocation
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.sync.base_weights import CheckpointWeights
from hybrid_lora_plugin.sync.live_weight import LiveWeight
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.received import ReceivedWeights
from hybrid_lora_plugin.sync.wire import OutgoingWeights, SyncHeader, read_header
from hybrid_lora_plugin.training.apply import parts_of, trainable_groups
from hybrid_lora_plugin.training.rounding import NEAREST
from tests.support.allocations import make_allocation
from tests.support.tiny_models import make_tiny_qwen2

IDS = torch.tensor([[5, 6, 7, 8, 9, 40, 41, 2, 3], [90, 80, 70, 60, 50, 40, 30, 20, 10]])
#: those whose syncs stand for themselves, in any type; ``test_sparse_merge.py`` has the other one
MODES = ["merge", "adapter", "receiver_merge"]
PARTIAL = ["adapter", "receiver_merge"]
DTYPES = [torch.float32, torch.bfloat16]
# A scaling that no binary fraction holds, so that the order of operations shows.
RANK, ALPHA = 6, 8
SCALING = ALPHA / RANK

each_mode = pytest.mark.parametrize("mode", MODES)
each_partial_mode = pytest.mark.parametrize("mode", PARTIAL)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# -- the trainer's side ---------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A checkpoint, an allocation for it, and its hybrid model after some training, which is copied for each test."""

    folder: Path
    allocation: Allocation

    @cached_property
    def _trained(self):
        return hybrid_of(self.folder, self.allocation)

    def hybrid(self):
        return copy.deepcopy(self._trained)


def saved_as(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def cases(tiny_qwen2, tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    untied = make_tiny_qwen2(root / "untied", tie_word_embeddings=False)
    half = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.bfloat16)
    allocation = load_allocation(make_allocation(tiny_qwen2, root / "tied-allocation"))
    return {
        "tied": Case(tiny_qwen2, allocation),
        "untied": Case(untied, load_allocation(make_allocation(untied, root / "untied-allocation"))),
        "bf16": Case(saved_as(half, root / "bf16"), allocation),
    }


@pytest.fixture
def case(cases, request):
    return cases[request.param]


each_case = pytest.mark.parametrize("case", ["tied", "untied", "bf16"], indirect=True)
tied_and_untied = pytest.mark.parametrize("case", ["tied", "untied"], indirect=True)


def hybrid_of(folder, allocation):
    """The trainer's model, fp32 as in training, with adapters and full weights that have moved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = apply_allocation(model, allocation, rank=RANK, alpha=ALPHA).eval()
    update(model, torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def hybrid(cases):
    return cases["tied"].hybrid()


@torch.no_grad()
def update(model, generator, size=0.05):
    """A training step's worth of change to everything that trains, biases too."""
    for group in trainable_groups(model).values():
        for _, parameter in group:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def outgoing(model, mode, dtype=torch.float32, rounding=NEAREST):
    return sync_mode(mode).outgoing(model, SyncPlan(SCALING, dtype, "cpu", rounding))


def tensors_of(model, mode, dtype=torch.float32, rounding=NEAREST):
    """One sync's tensors by name, in memory of their own."""
    pairs = [(name, tensor.clone()) for name, tensor in outgoing(model, mode, dtype, rounding)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def header_for(model, mode, dtype=torch.float32, number=1, **changes):
    fields = dict(
        run="r1",
        number=number,
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
        digests=True,
        lora_rank=RANK,
        lora_alpha=float(ALPHA),
        lora_modules=list(parts_of(model).lora_modules),
        payload_bytes=sync_mode(mode).payload_bytes(parts_of(model).counts, dtype),
    )
    return SyncHeader(**(fields | changes))


def full_names(model):
    """Plain names of every trained weight and bias of a full module."""
    return [plain_name(name) for name, _ in trainable_groups(model)["full"]]


def factor_names(model):
    return [f"{module}.lora_{kind}.weight" for module in parts_of(model).lora_modules for kind in "AB"]


def pair_of(layer):
    """Factors of a PEFT layer."""
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def layers_of(model):
    return {module: model.get_submodule(f"base_model.model.{module}") for module in parts_of(model).lora_modules}


# -- the rollout engine's side --------------------------------------------------------------------------------------


class HuggingFaceRollout:
    """A ``RolloutModel`` that is a plain Hugging Face model of its own, loaded from a checkpoint.

    The adapter is PEFT's: a new one is put on the plain model each time, after the old one was taken off.
    """

    device = torch.device("cpu")

    def __init__(self, folder, dtype=torch.float32, storage="memory_map"):
        self.checkpoint = CheckpointWeights(folder, storage)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        # From before PEFT renames them; the tied head is its embedding.
        self.parameters = dict(self.model.named_parameters())
        self.loaded: list[str] = []
        self.adapters = 0
        self.trained = frozenset()
        self._unsent: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def load(self, weights):
        for name, tensor in weights:
            live = self.parameters[name]
            assert (tensor.shape, tensor.dtype) == (live.shape, live.dtype), name
            live.copy_(tensor)
            self.loaded.append(name)

    def live(self, name):
        parameter = self.parameters[name].detach()
        return LiveWeight(parameter, tuple(parameter.shape), None, 0)

    def begin_building(self, run, trained, unsent):
        self.trained, self._unsent = trained, {name: self.parameters[name].detach().clone() for name in unsent}

    def read_back_unsent(self, part):
        for name in sorted(self._unsent)[part]:
            assert torch.equal(self.parameters[name], self._unsent[name]), name

    @torch.no_grad()
    def replace_adapter(self, factors, header):
        if self.adapters:
            self.model = self.model.unload()
        config = LoraConfig(r=header.lora_rank, lora_alpha=header.lora_alpha, target_modules=sorted(factors))
        self.model = get_peft_model(self.model, config).eval()
        for module, factors_of_it in factors.items():
            layer = self.model.get_submodule(f"base_model.model.{module}")
            for live, factor in zip(pair_of(layer), factors_of_it, strict=True):
                live.copy_(factor)
        self.adapters += 1

    @torch.no_grad()
    def logits(self):
        return self.model(IDS).logits


class TransferBuffer:
    """Hands tensors out as views of one buffer that is overwritten before the next ones, as verl's transport does."""

    def __init__(self, size=1 << 20):
        self.bytes = torch.empty(size, dtype=torch.uint8)

    def buckets(self, pairs, at_once):
        pairs = iter(pairs)
        while bucket := list(islice(pairs, at_once)):
            views, end = [], 0
            for name, tensor in bucket:
                # Aligned to the element, no more: verl does the same.
                start = math.ceil(end / tensor.itemsize) * tensor.itemsize
                end = start + tensor.nbytes
                view = self.bytes[start:end].view(tensor.dtype).view(tensor.shape)
                views.append((name, view.copy_(tensor)))
            yield views
            self.bytes[:end] = 0xA5


def deliver(stream, rollout, number=1, at_once=5):
    """The receiver's part of a sync."""
    buckets = TransferBuffer().buckets(stream, at_once)
    (first, *rest) = next(buckets)
    header = read_header(*first)
    received = ReceivedWeights(header, "r1", number)
    receiver = sync_mode(header.mode).receiver(header, rollout)

    def take(bucket):
        receiver.take([pair for pair in bucket if received.take(*pair) is not None])

    take(rest)
    for bucket in buckets:
        take(bucket)
    entries = received.finish()
    receiver.finish()
    return entries


def sync(model, rollout, mode, dtype=torch.float32, number=1, at_once=5):
    stream = OutgoingWeights(header_for(model, mode, dtype, number), outgoing(model, mode, dtype))
    deliver(stream, rollout, number, at_once)
    return stream


def receiver_for(model, rollout, mode, dtype=torch.float32, **changes):
    header = header_for(model, mode, dtype, **changes)
    return sync_mode(mode).receiver(header, rollout)


def take_all(receiver, pairs):
    for pair in pairs:
        receiver.take([pair])
    receiver.finish()


def without(pairs, *names):
    assert set(names) <= {name for name, _ in pairs}
    return [pair for pair in pairs if pair[0] not in names]
