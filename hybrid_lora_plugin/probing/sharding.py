"""The frozen base of a probe, sharded over the ranks by FSDP2; the probe's own parameters stay whole on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.probing.ranks import Ranks


def place(model: nn.Module, candidates: Sequence[Candidate], replicated: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Bring a model that was loaded on the CPU to the ranks' devices, sharded if there are several.

    One FSDP2 unit per decoder layer and one for the rest. The probe's parameters are replicated: they and their Adam
    moments are small, and every rank then takes the same step without a collective of its own.

    Args:
        model: with the probe attached; changed in place.
        candidates: tell where the decoder layers are.
        replicated: the probe's parameters, equal on every rank.
        ranks: who shares the model.
    """
    if ranks.size == 1:
        model.to(ranks.device)
        return
    for parameter in replicated:
        parameter.data = parameter.data.to(ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    ignored = set(replicated)
    for layer in _decoder_layers(model, candidates):
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def _decoder_layers(model: nn.Module, candidates: Sequence[Candidate]) -> list[nn.Module]:
    names = dict.fromkeys(
        candidate.name.partition(f".layers.{candidate.layer}.")[0] + f".layers.{candidate.layer}"
        for candidate in candidates
    )
    return [model.get_submodule(name) for name in names]
