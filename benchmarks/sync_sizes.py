"""What a weight sync of Qwen2.5 1.5B, 3B and 7B carries and needs, computed: no weight of them is allocated.

    python -m benchmarks.sync_sizes [--ratio 0.1] [--rank 16] [--seed 0] [--write docs/sync-cost.md]

The plugin's own sender and receiver run on tensors that have shape and type but no memory. Bytes are those they would
stream, header and manifest included; extra memory is the most that was alive at one time beside the model's weights.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from omegaconf import OmegaConf
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.pages import write_page
from hybrid_lora_plugin.allocation import Allocation
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.candidates import find_candidates, meta_model
from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig, ControlConfig
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.probing.loading import parameter_count
from hybrid_lora_plugin.probing.provenance import model_identity
from hybrid_lora_plugin.sync import hybrid_weights
from hybrid_lora_plugin.sync.element_list import ELEMENT_BYTES
from hybrid_lora_plugin.sync.hybrid_weights import original_weights
from hybrid_lora_plugin.sync.live_weight import LiveWeight
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.wire import OutgoingWeights, SyncHeader, bucket_mebibytes, packed
from hybrid_lora_plugin.training import merge as training_merge
from hybrid_lora_plugin.training import rounding as training_rounding
from hybrid_lora_plugin.training.apply import apply_allocation, parts_of

#: Hugging Face's config.json of Qwen/Qwen2.5-*-Instruct, what decides shapes
SHAPES = {
    "Qwen2.5-1.5B": dict(
        hidden_size=1536, num_hidden_layers=28, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "Qwen2.5-3B": dict(
        hidden_size=2048, num_hidden_layers=36, intermediate_size=11008, num_attention_heads=16, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": dict(
        hidden_size=3584, num_hidden_layers=28, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip
MODES = ("merge", "adapter", "receiver_merge")
#: by type of the rollout and optimizer steps between two syncs, the share of what trains that changes in
#: ``sparse_merge``: the largest measured on SmolLM2-135M at the paper's rates (docs/sync-fidelity.md)
CHANGED = {"bfloat16": {1: 0.010, 4: 0.032}, "float16": {1: 0.054, 4: 0.154}}
#: the same for the bytes that were wanted of such a sync, against verl's merge
WANTED = {"bfloat16": {1: 0.05, 4: 0.15}, "float16": {1: 0.1, 4: 0.3}}
ROLLOUT_DTYPE = torch.bfloat16
BEGIN, END = "<!-- computed by benchmarks/sync_sizes.py -->", "<!-- end of the computed part -->"


def draw_allocation(config, name: str, *, rank: int, ratio: float, seed: int) -> Allocation:
    """The allocation that criterion ``random`` with this seed gives the model of a Hugging Face config."""
    plain = meta_model(config)
    candidates = find_candidates(plain)
    model = model_identity(name, plain, candidates, parameter_count(plain))
    settings = AllocateCommandConfig(
        criterion="random", budget=BudgetConfig(ratio=ratio), control=ControlConfig(seed=seed)
    )
    return select_modules(settings, model, candidates, {}, lora_rank=rank, environment={"torch": torch.__version__})


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside it that were alive after any one operation."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self._weights = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._weights:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                del storage
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@contextmanager
def _without_memory() -> Iterator[None]:
    """Let sender and receiver run on meta tensors, and take a copy of every tensor as gathering its shards does."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(hybrid_weights, "whole", lambda tensor, device: tensor.detach().clone()))
        for module in (training_merge, training_rounding):
            stack.enter_context(mock.patch.object(module, "require_numbers", lambda *_: None))
        # It asks for a precision, which the meta device has no idea of.
        stack.enter_context(mock.patch.object(training_merge, "_exact_fp32", nullcontext))
        yield


class _Engine:
    """Stands for the rollout engine: takes whole tensors, keeps nothing but what the plugin's own keeps."""

    device = torch.device("meta")

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.checkpoint = self
        self._shapes, self._dtype = shapes, dtype
        self.merged_into: dict[str, int] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        # On an accelerator W0 comes from the host, into memory of its own.
        base = torch.empty(self._shapes[name], dtype=self._dtype, device="meta")
        self.merged_into[name] = base.nbytes
        return base

    def live(self, name: str) -> LiveWeight:
        # One worker holds all of it.
        return LiveWeight(torch.empty(self._shapes[name], device="meta"), self._shapes[name], None, 0)

    def load(self, weights) -> None:
        pass

    def replace_adapter(self, factors, header) -> None:
        # What verl_backend.receiver.vllm_model does: vLLM scales what it is given in place.
        _ = [factor.clone() for pair in factors.values() for factor in pair]


@dataclass(frozen=True)
class SyncSize:
    """One sync of one mode, in bytes."""

    mode: str
    tensors: int
    #: tensors, header and manifest
    sent: int
    #: the mode's formula: 2·N, 2·F + 2·A or 2·F + 4·A
    formula: int
    largest: int
    buffer: int
    trainer: int
    receiver: int
    #: original weights that the receiver merges into
    bases: int


class PaperModel:
    """A hybrid model with shapes and no memory.

    Args:
        name: for messages.
        config: a ``Qwen2Config``.
        rank, ratio, seed: of the adapters and of the drawn allocation.
    """

    def __init__(self, name: str, config, *, rank: int = 16, ratio: float = 0.1, seed: int = 0):
        self.name, self.config, self.rank = name, config, rank
        self.allocation = draw_allocation(config, name, rank=rank, ratio=ratio, seed=seed)

    @cached_property
    def model(self) -> torch.nn.Module:
        # Frozen weights as a bf16 checkpoint has them; what trains becomes fp32.
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
            return apply_allocation(plain, self.allocation, rank=self.rank, alpha=2 * self.rank)

    @cached_property
    def counts(self):
        return parts_of(self.model).counts

    def _plain_state(self) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config).state_dict()

    def verl_merge_bytes(self) -> int:
        """verl's ``merge=true``: every entry of the state dictionary, so a tied output head travels twice."""
        return sum(tensor.numel() * ROLLOUT_DTYPE.itemsize for tensor in self._plain_state().values())

    def verl_adapter_bytes(self) -> int:
        """verl's own adapter on all candidates: fp32 factors, nothing fully tuned."""
        lora = sum(candidate.lora_parameters(self.rank) for candidate in self.allocation.modules)
        return lora * torch.float32.itemsize

    def changed_elements_bytes(
        self, share: float, dtype: str = "bfloat16", digest: str = "keyed:" + "0" * 16
    ) -> tuple[int, int]:
        """A later sync of ``sparse_merge`` in which that share of every weight that trains changed.

        Args:
            share: of the elements, spread evenly.
            dtype: of the rollout, of 16 bits.
            digest: as in ``sync``.

        Returns:
            Bytes sent, and those of the formula 4·E.
        """
        parts, state = parts_of(self.model), self._plain_state()
        names = {f"{module}.weight" for module in parts.lora_modules} | {plain_name(name) for name in parts.trained}
        elements = {name: math.ceil(share * state[name].numel()) for name in state if name in names}
        # Numbers as long as the sums are.
        row = {"changed": 10**6, "sent": 10**6, "new": -(2**62), "old": -(2**62), "in_full": -(2**62)}
        manifest = {
            "run": "0" * 12, "number": 100, "step": 100,
            "tensors": [[name, [count, 2], "int16", digest] for name, count in elements.items()],
            "account": {"part": 10, "parts": 16, "tensors": dict.fromkeys(elements, row)},
        }  # fmt: skip
        header = SyncHeader(
            run="0" * 12, number=100, mode="sparse_merge", dtype=dtype, digests=True, base_number=99,
            lora_rank=self.rank, lora_alpha=2.0 * self.rank, lora_modules=list(parts.lora_modules),
            payload_bytes=self.counts.frozen * 2,
        )  # fmt: skip
        lists = ELEMENT_BYTES * sum(elements.values())
        return lists + packed(asdict(header)).nbytes + packed(manifest).nbytes, lists

    def sync(self, name: str, digest: str = "keyed:" + "0" * 16) -> SyncSize:
        """One sync of mode ``name``.

        Args:
            name: of the mode.
            digest: a text as long as the digests are: ``keyed:`` on an accelerator, ``xxh3:`` on the host.
        """
        mode, model = sync_mode(name), self.model
        with _without_memory():
            base = {}
            if mode.partial:
                base = {weight: "xxh3:" + "0" * 32 for weight, _ in original_weights(model, "meta")}
            # receiver_merge says of one module what its merge must come to; the second one's turn is in the first sync.
            merged = {f"{parts_of(model).lora_modules[1]}.weight": digest} if name == "receiver_merge" else {}
            header = SyncHeader(
                run="0" * 12, number=1, mode=name, dtype=str(ROLLOUT_DTYPE).removeprefix("torch."), digests=True,
                lora_rank=self.rank, lora_alpha=2.0 * self.rank, lora_modules=parts_of(model).lora_modules,
                base=base, merged=merged,
                payload_bytes=mode.payload_bytes(self.counts, ROLLOUT_DTYPE),
            )  # fmt: skip

            def tensors():
                return mode.outgoing(model, SyncPlan(header.scaling, ROLLOUT_DTYPE, "meta"))

            # Without digests, which need values; their texts are put in afterwards.
            stream = OutgoingWeights(replace(header, digests=False), tensors())
            payload = [weight.nbytes for _, weight in list(stream)[1:-1]]
            stream.entries = [replace(entry, digest=digest) for entry in stream.entries]
            around = packed(asdict(header)).nbytes + packed(stream.manifest()).nbytes
            trainer = self._peak(tensors())
            receiver, engine = self._received(mode, replace(header, merged={}), tensors())
        return SyncSize(
            name, len(payload), sum(payload) + around, header.payload_bytes, max(payload),
            bucket_mebibytes(header.payload_bytes, verl_buffer_mebibytes()) << 20, trainer, receiver,
            sum(engine.merged_into.values()),
        )  # fmt: skip

    def _peak(self, tensors) -> int:
        """Most bytes alive while the pairs are drawn one at a time."""
        live = LiveBytes(self.model)
        with live:
            for _, tensor in tensors:
                del tensor
        return live.peak

    def _received(self, mode, header: SyncHeader, tensors) -> tuple[int, _Engine]:
        """The receiver's peak, and the engine's stand-in with what was merged into."""
        engine = _Engine({name: tuple(t.shape) for name, t in self._plain_state().items()}, ROLLOUT_DTYPE)
        receiver = mode.receiver(header, engine)
        pairs = list(tensors)
        live = LiveBytes(self.model)
        # Those of the transfer buffer, which is counted by itself.
        live._weights |= {tensor.untyped_storage()._cdata for _, tensor in pairs}
        with live:
            for pair in pairs:
                receiver.take([pair])
            receiver.finish()
        return live.peak, engine


@cache
def verl_buffer_mebibytes() -> int:
    """verl's own size of a transfer buffer, MiB, from the configuration it ships."""
    folder = Path(next(iter(find_spec("verl").submodule_search_locations)))
    rollout = OmegaConf.load(folder / "trainer/config/rollout/rollout.yaml")
    return rollout.checkpoint_engine.update_weights_bucket_megabytes


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def table(ratio: float = 0.1, rank: int = 16, seed: int = 0) -> str:
    """Both tables as Markdown."""
    models = {
        name: PaperModel(name, Qwen2Config(**shape), rank=rank, ratio=ratio, seed=seed)
        for name, shape in SHAPES.items()
    }
    lines = [
        f"Allocation drawn at random (seed {seed}) within {ratio:.0%} of the candidate parameters, LoRA rank {rank} on "
        f"the other candidates, a bf16 checkpoint, what trains in fp32, rollout in bf16.",
        "",
        "| model | parameters N | candidates | fully tuned F | modules | adapters A |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, model in models.items():
        allocation, counted = model.allocation, model.counts
        lines.append(
            f"| {name} | {counted.frozen + counted.full:,} | {allocation.model.candidate_parameters:,} | "
            f"{counted.full:,} | {len(allocation.full_names)} of {len(allocation.modules)} | {counted.lora:,} |"
        )
    lines += [
        "",
        "| model | sync | sent | over the formula | against verl's merge | largest tensor | transfer buffer | trainer, "
        "extra | receiver, extra | with pinned base |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, model in models.items():
        verl = model.verl_merge_bytes()
        lines.append(f"| {name} | verl, `merge=true` | {_size(verl)} | | 1 | | | | | |")
        adapter = model.verl_adapter_bytes()
        lines.append(
            f"| | verl, own adapter, nothing fully tuned | {_size(adapter)} | | {adapter / verl:.3f} | | | | | |"
        )
        for mode in MODES:
            size = model.sync(mode)
            pinned = f"+ {_size(size.bases)} host" if size.bases else ""
            lines.append(
                f"| | `{mode}` | {_size(size.sent)} | {size.sent / size.formula:.5f} | {size.sent / verl:.3f} | "
                f"{_size(size.largest)} | {_size(size.buffer)} | {_size(size.trainer)} | {_size(size.receiver)} | "
                f"{pinned} |"
            )
        for dtype, shares in CHANGED.items():
            for steps, share in shares.items():
                sent, formula = model.changed_elements_bytes(share, dtype)
                lines.append(
                    f"| | `sparse_merge`, {dtype}, {share:.1%} changed in {steps} optimizer step{'s' * (steps > 1)} | "
                    f"{_size(sent)} | {sent / formula:.5f} | {sent / verl:.3f}, wanted ≤ {WANTED[dtype][steps]} | | | "
                    "| | |"
                )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, or put them into a page; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync_sizes", description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the candidate parameters (default: 0.1)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn allocation (default: 0)")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this page")
    chosen = parser.parse_args(arguments)
    text = table(chosen.ratio, chosen.rank, chosen.seed)
    print(text)
    if chosen.write:
        write_page(chosen.write, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
