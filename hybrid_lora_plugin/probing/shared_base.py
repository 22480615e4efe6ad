"""The base of a probe on several ranks: the first reads it, the others get their shards from it.

No other rank opens a weight file or holds more of the base than its shard and one tensor on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from hybrid_lora_plugin.candidates import meta_model
from hybrid_lora_plugin.config import ModelConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.loading import load_model, load_model_config


@dataclass(frozen=True)
class _Stored:
    """A tensor of the first rank's model: its shape, its dtype, and the first name that it has."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    first_name: str

    @classmethod
    def of(cls, tensor: Tensor, first_name: str) -> _Stored:
        return cls(tuple(tensor.shape), tensor.dtype, first_name)


def load_base(config: ModelConfig, ranks: Ranks) -> nn.Module:
    """The model of ``config.path``: on rank 0 loaded into host memory, elsewhere the same modules without values.

    Args:
        config: of the model.
        ranks: who shares it; ``sent_by_first`` gives the others what they miss.

    Returns:
        A model in eval mode; on ranks above 0 its parameters and buffers are on the meta device, in the dtypes of
        rank 0 and tied where those are.

    Raises:
        ConfigurationError: on every rank, as ``load_model``.
        ProbeError: the config of another rank describes another model.
    """
    if ranks.size == 1:
        return load_model(config, ranks.device)
    loaded: list[nn.Module] = []

    def load() -> tuple[dict[str, _Stored], torch.dtype]:
        loaded.append(load_model(config, ranks.device))
        return _described(loaded[0]), loaded[0].dtype

    wanted, dtype = ranks.from_first(load)
    return ranks.on_each(lambda: loaded[0] if ranks.first else _without_values(config, wanted, dtype))


def _without_values(config: ModelConfig, wanted: dict[str, _Stored], dtype: torch.dtype) -> nn.Module:
    model_config = load_model_config(config)
    model_config.dtype = dtype
    model = meta_model(model_config, config.trust_remote_code).eval()
    own = {name: tuple(tensor.shape) for name, tensor, _ in _tensors(model)}
    if own != {name: stored.shape for name, stored in wanted.items()}:
        differing = sorted(own.items() ^ {(name, stored.shape) for name, stored in wanted.items()})
        raise ProbeError(
            f"model.path: {config.path!r} is another model here than on the first rank, beginning with "
            f"{differing[0][0]}; give every node the same config.json"
        )
    made: dict[str, Tensor] = {}
    for name, tensor, put in list(_tensors(model)):
        stored = wanted[name]
        if stored.first_name not in made:
            empty = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            made[stored.first_name] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        put(made[stored.first_name])
    return model


def _described(model: nn.Module) -> dict[str, _Stored]:
    first_names: dict[int, str] = {}
    return {name: _Stored.of(tensor, first_names.setdefault(id(tensor), name)) for name, tensor, _ in _tensors(model)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[Tensor], None]]]:
    """Parameters and buffers by name, tied ones under each of theirs, and what puts another tensor in its place."""
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        own += module.named_buffers(recurse=False, remove_duplicate=False)
        for key, tensor in own:
            yield f"{prefix}.{key}".removeprefix("."), tensor, partial(setattr, module, key)


@contextmanager
def sent_by_first(module: nn.Module, replicated: Sequence[nn.Parameter], ranks: Ranks) -> Iterator[None]:
    """Around the sharding of a module: afterwards every rank has its part of what rank 0 had; collective.

    Each tensor is whole on every device for the moment in which it is sent; then rank 0 gives it up.

    Args:
        module: not sharded yet, but for parts of it that were sent; its other tensors have values on rank 0 alone.
        replicated: parameters that are on every rank already.
        ranks: who shares the module.
    """
    own = {id(parameter) for parameter in replicated}
    before = _once(module, own)
    names = [name for name, tensor in before.items() if not isinstance(tensor, DTensor)]
    # Sharding leaves rank 0 no more than its part.
    whole = {name: before[name].detach() for name in names} if ranks.first else {}
    del before
    yield
    after, received = _once(module, own), {}
    for name in names:
        received[id(after[name])] = _received(after[name], whole.pop(name, None), ranks)
    for _, tensor, put in list(_tensors(module)):
        if id(tensor) in received:
            put(received[id(tensor)])


def _once(module: nn.Module, without: set[int]) -> dict[str, Tensor]:
    """Tensors by name, tied ones once, in an order that is the same on every rank."""
    seen, found = set(without), {}
    for name, tensor, _ in _tensors(module):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    # Sharding may have put parameters of a module into another order.
    return dict(sorted(found.items()))


@torch.no_grad()
def _received(tensor: Tensor, whole: Tensor | None, ranks: Ranks) -> Tensor:
    """``tensor`` with its values: itself on rank 0, which has them; elsewhere new, sharded as it is."""
    if whole is not None:
        ranks.give_(whole.to(ranks.device).contiguous())
        return tensor
    whole = ranks.give_(torch.empty(tensor.shape, dtype=tensor.dtype, device=ranks.device))
    if not isinstance(tensor, DTensor):
        return whole
    mesh, placements = tensor.device_mesh, tensor.placements
    part = DTensor.from_local(whole, mesh, [Replicate()], run_check=False).redistribute(placements=placements)
    local = part.to_local()
    if local.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
        # A view would keep the whole tensor.
        local = local.clone()
    shard = DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
    return nn.Parameter(shard, requires_grad=False)
