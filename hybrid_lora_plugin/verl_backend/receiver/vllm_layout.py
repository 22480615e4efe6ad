"""Where a plain weight and a LoRA factor lie in vLLM's model (vLLM 0.28 ``model_executor/layers/linear.py``).

vLLM packs q, k, v and gate, up into one parameter each and shards them over tensor-parallel workers; the layers' own
records say where a plain weight lies in there.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers import linear

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.live_weight import LiveWeight

#: the places of a plain module in vLLM's, one behind the other
Places = tuple[int, ...]
#: how vLLM's loader names the places of a packed attention
_ATTENTION = {"q": 0, "k": 1, "v": 2}


class PackedModules:
    """Which of vLLM's modules holds a plain module, and at which places: it packs q, k, v and gate, up into one each.

    A family whose own weights are packed (Phi-3, GLM-4, Falcon-H1's recurrence) has vLLM's module as its plain one, and
    no place in it. Qwen3.5's ``in_proj_qkv`` takes three places of four.
    """

    def __init__(self, model: torch.nn.Module):
        self._parts = dict(model.packed_modules_mapping)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._renamed = {} if mapper is None else dict(mapper.orig_to_new_substr)
        # Packed in the checkpoint, too, and named so by the model's own loader alone: Mamba-2's in_proj and conv1d.
        self._merged = {
            name for name, module in model.named_modules() if isinstance(module, linear.MergedColumnParallelLinear)
        }
        self._owner = {
            part: (owner, (index,)) for owner, parts in self._parts.items() for index, part in enumerate(parts)
        }
        # What the loaders go by, of the whole model or of a part. The mapping above is of adapters, and has no offsets.
        for module in model.modules():
            self._owner |= _stacked(getattr(module, "hf_to_vllm_mapper", None))

    def find(self, module: str) -> tuple[str, Places | None]:
        """(name of vLLM's module, places in it); None in their place where the plain module is all of a packed one."""
        module = self.renamed(module)
        parent, _, last = module.rpartition(".")
        if last in self._parts or not self._merged.isdisjoint((module, f"{module}.base_layer")):
            return module, None
        owner, places = self._owner.get(last, (last, (0,)))
        return (f"{parent}.{owner}" if parent else owner), places

    def beside(self, module: str) -> list[tuple[str, Places]]:
        """The other plain modules in vLLM's module of this one, with their places."""
        (owner, places), (parent, dot, _) = self.find(module), module.rpartition(".")
        last = owner.rpartition(".")[2]
        return [
            (parent + dot + part, other)
            for part, (where, other) in self._owner.items()
            if where == last and places is not None and other != places
        ]

    def renamed(self, name: str) -> str:
        """A plain name with the parts of it that vLLM's loader replaces, as ``WeightsMapper`` does."""
        for part, instead in self._renamed.items():
            if part in name and instead is not None:
                name = name.replace(part, instead, 1)
        return name

    def adapter_names(self, module: str) -> list[str]:
        """The names under which vLLM takes the factors of a plain module: those of its parts where it packs several."""
        parent, _, last = module.rpartition(".")
        parts = self._parts.get(last, [last])
        return [f"{parent}.{part}" for part in parts] if len(parts) > 1 else [module]


def _stacked(mapper: Any) -> dict[str, tuple[str, Places]]:
    """Of each plain module that a loader's ``WeightsMapper`` stacks: vLLM's module, and the places in it."""
    found = {}
    for part, (owner, places) in getattr(mapper, "orig_to_new_stacked", {}).items():
        places = _ATTENTION.get(places, places)
        found[part.rpartition(".")[2]] = owner.rpartition(".")[2], (places,) if isinstance(places, int) else places
    return found


def find_live_weight(modules: dict[str, torch.nn.Module], packed: PackedModules, name: str) -> LiveWeight:
    """The live part of the plain weight ``name``.

    Args:
        modules: those of vLLM's model by name.
        packed: of the same model.
        name: plain Hugging Face name of a weight or bias.

    Raises:
        WeightSyncError: vLLM's model has no such weight in a layout known here.
    """
    prefix, _, plain_leaf = name.rpartition(".")
    owner, places = packed.find(prefix)
    layer = modules.get(owner)
    layer = getattr(layer, "base_layer", layer)
    leaf = packed.renamed(plain_leaf)
    parameter = getattr(layer, leaf, None)
    if not isinstance(parameter, torch.Tensor):
        raise WeightSyncError(
            f"{name}: cannot be read back from the rollout engine's model, whose layout for it is unknown here; "
            "give a model of a family in docs/models.md, without modules of your own",
            see="weight-in-an-unknown-layout",
        )
    value = parameter.detach()
    if plain_leaf == "A_log" and leaf != plain_leaf:
        _refuse_split(name, getattr(layer, "tp_size", 1))
        return LiveWeight(value, tuple(value.shape), None, 0, _decay)
    # Rows of each place, or of each part of a convolution over them, are sharded by themselves.
    if places is None or len(places) > 1 or value.dim() > 2:
        _refuse_split(name, getattr(layer, "tp_size", 1))
    if places is None:
        return LiveWeight(value, tuple(value.shape), None, 0)
    index = places[0]
    if isinstance(layer, linear.QKVParallelLinear):
        width = layer.head_size
        sizes = [layer.num_heads * width, layer.num_kv_heads * width, layer.num_kv_heads * _value_width(layer)]
        total = [layer.total_num_heads * width, layer.total_num_kv_heads * width]
        total.append(layer.total_num_kv_heads * _value_width(layer))
        rank = layer.tp_rank if index == 0 else layer.tp_rank // layer.num_kv_head_replicas
        view = value.narrow(0, sum(sizes[:index]), sizes[index])
        return LiveWeight(view, (total[index], *value.shape[1:]), 0, rank * sizes[index])
    if isinstance(layer, linear.MergedColumnParallelLinear):
        whole = sum(layer.output_sizes[place] for place in places)
        rows, above = whole // layer.tp_size, sum(layer.output_sizes[:index]) // layer.tp_size
        return LiveWeight(value.narrow(0, above, rows), (whole, *value.shape[1:]), 0, layer.tp_rank * rows)
    if isinstance(layer, linear.ColumnParallelLinear):
        return LiveWeight(value, (layer.output_size, *value.shape[1:]), 0, layer.tp_rank * value.shape[0])
    if isinstance(layer, linear.RowParallelLinear) and leaf == "weight":
        return LiveWeight(value, (value.shape[0], layer.input_size), 1, layer.tp_rank * value.shape[1])
    if hasattr(layer, "shard_indices"):  # embedding and output head, padded at the end
        rows = layer.shard_indices
        view = value.narrow(0, 0, rows.num_org_elements)
        return LiveWeight(view, (layer.org_vocab_size, *value.shape[1:]), 0, rows.org_vocab_start_index)
    return LiveWeight(value, tuple(value.shape), None, 0)


def _refuse_split(name: str, workers: int) -> None:
    if workers > 1:
        raise WeightSyncError(
            f"{name}: packs several projections, and each of {workers} workers holds rows of all of them, "
            "which are not read back here; give actor_rollout_ref.rollout.tensor_model_parallel_size=1",
            see="weight-in-an-unknown-layout",
        )


def _decay(logarithm: torch.Tensor) -> torch.Tensor:
    """Mamba-2's A of its ``A_log``, as vLLM's loader makes it (``mamba/mamba_mixer2.py``)."""
    return -torch.exp(logarithm.float())


def _value_width(layer) -> int:
    return getattr(layer, "v_head_size", layer.head_size)


def adapter_slices(layer: Any, places: Places | None, lora_b: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Where vLLM's LoRA layer keeps factor B of a plain module: (slice, rows of B), each slice with A beside it.

    Args:
        layer: of vLLM, around one of its linear layers.
        places: as of ``PackedModules.find``.
        lora_b: [d_out, r] factor B of the plain module.
    """
    if places is None:
        return list(enumerate(packed_rows(layer, len(layer.lora_b_stacked), lora_b)))
    if len(places) == 1:
        return [(places[0], lora_b)]
    sizes = getattr(layer, "base_layer", layer).output_sizes
    return list(zip(places, lora_b.split([sizes[place] for place in places]), strict=True))


def absent_beside(
    packed: PackedModules, modules: dict[str, torch.nn.Module], factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Factors of zeros for plain modules without an adapter that vLLM cannot leave out.

    Where a plain module takes several places, vLLM 0.28 finds these by the factors of all plain modules beside it
    (``expand_packed_lora`` of ``lora/layers/column_parallel_linear.py``), and fails on one that is not there.

    Args:
        packed: of vLLM's model.
        modules: those of vLLM's model by name.
        factors: A [r, d_in] and B [d_out, r] by plain module.
    """
    found = {}
    for module, (lora_a, lora_b) in factors.items():
        (owner, places), others = packed.find(module), packed.beside(module)
        if all(len(each) == 1 for each in [places or (0,), *(other for _, other in others)]):
            continue
        layer = modules[owner]
        sizes = getattr(layer, "base_layer", layer).output_sizes
        for other, theirs in others:
            if other not in factors:
                rows = sum(sizes[place] for place in theirs)
                found[other] = torch.zeros_like(lora_a), lora_b.new_zeros(rows, lora_b.shape[1])
    return found


def packed_rows(layer: Any, parts: int, lora_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Factor B [d_out, r] of a packed weight cut into those of its ``parts``."""
    return (lora_b,) if parts == 1 else lora_b.split(list(getattr(layer, "base_layer", layer).output_sizes))


def adapter_part(layer: Any, index: int, lora_a, lora_b, rows: int):
    """This worker's part of both factors, as ``lora/layers`` of vLLM shards them (without fully sharded LoRA)."""
    base = layer.base_layer
    if getattr(base, "tp_size", 1) == 1:
        return lora_a, lora_b
    if isinstance(base, linear.RowParallelLinear):
        width = base.input_size_per_partition
        return lora_a[:, base.tp_rank * width : (base.tp_rank + 1) * width], lora_b
    rank = base.tp_rank
    if isinstance(base, linear.QKVParallelLinear) and index > 0:
        rank //= base.num_kv_head_replicas
    return lora_a, lora_b[rank * rows : (rank + 1) * rows]


def slice_holds(layer: Any, slot: int, place: int, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> bool:
    """Whether vLLM's LoRA layer has these factors in a slice of one of its slots; it keeps B times ``scaling``."""
    live_a, live_b = layer.lora_a_stacked[place][slot, 0], layer.lora_b_stacked[place][slot, 0]
    wanted_a = lora_a.to(live_a.device, live_a.dtype)
    wanted_b = lora_b.to(live_b.device, live_b.dtype) * scaling
    wanted_a, wanted_b = adapter_part(layer, place, wanted_a, wanted_b, live_b.shape[0])
    rank = wanted_a.shape[0]
    return torch.equal(live_a[:rank, : wanted_a.shape[1]], wanted_a) and torch.equal(
        live_b[: wanted_b.shape[0], :rank], wanted_b
    )
