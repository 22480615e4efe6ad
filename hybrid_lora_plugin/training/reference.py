"""The original values of the fully tuned weights: the reference policy is the untouched base model.

Turning adapters off is not enough once full modules have moved. A snapshot is taken before the first step and
swapped in for the reference forward passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer

from hybrid_lora_plugin.training.dtensor import local_tensor
from hybrid_lora_plugin.training.rounding import on_grid


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Every LoRA layer computes its base layer alone inside the ``with``, and its adapter again after it.

    PEFT's own ``disable_adapter`` also takes the gradient from the factors meanwhile. FSDP2 settles at the first
    forward pass, from what requires a gradient then, in which type it reduces gradients: were that a reference pass,
    the first update would fail. Here a flag is set and no parameter touched.

    Args:
        model: a hybrid model, also when FSDP has wrapped it.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _compact(values: torch.Tensor) -> torch.Tensor:
    """A copy in bfloat16 where that loses nothing (a bf16 checkpoint in fp32 masters), else in its own dtype."""
    # A copy also of what is in bfloat16 already: the weight itself will move.
    half = values.to(torch.bfloat16, copy=True)
    return half if torch.equal(half.to(values.dtype), values) else values.clone()


class BaseSnapshot:
    """This rank's shards of the original full-module weights.

    Args:
        parameters: (name, parameter) of the full modules, holding their original values: take it before the first
            optimizer step and before a checkpoint is loaded.
    """

    @torch.no_grad()
    def __init__(self, parameters: Iterable[tuple[str, torch.Tensor]]):
        self.values = {name: _compact(local_tensor(p).detach()) for name, p in parameters}

    @property
    def bytes(self) -> int:
        """Bytes this rank keeps for the snapshot."""
        return sum(v.numel() * v.element_size() for v in self.values.values())

    def to(self, device) -> None:
        """Keep the snapshot there from now on; where the parameters are does not matter."""
        # Waits for each copy: a host may not read one that is on its way, and these are the reference policy.
        self.values = {name: values.to(device) for name, values in self.values.items()}

    @contextmanager
    def on_grid(self, parameters: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[None]:
        """The trained values as ``rounding.on_grid`` has them for ``dtype`` inside the ``with``, themselves after it.

        For FSDP1, whose parameters do not show which rows they hold; in any sharding the values are the same. As with
        ``swapped_in``, nothing may be unsharded while entering or leaving.
        """
        named = {name: parameter for name, parameter in parameters if self.values[name].dtype != dtype}
        with torch.no_grad():
            trained = {name: local_tensor(p).detach().clone() for name, p in named.items()}
            for name, parameter in named.items():
                values = local_tensor(parameter)
                on_grid(values, self.values[name].to(values.device), dtype, out=values)
        try:
            yield
        finally:
            _put_back(named, trained)

    @contextmanager
    def swapped_in(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """The original values inside the ``with``, the trained ones again after it, also when the body raises.

        Values are copied into the parameters' own storage, so FSDP's views of it and the optimizer's references
        to it stay valid. Nothing may be unsharded while entering or leaving.

        Raises:
            RuntimeError: the parameters are not those of the snapshot.
        """
        named = dict(parameters)
        if named.keys() != self.values.keys():
            wrong = sorted(named.keys() ^ self.values.keys())[0]
            raise RuntimeError(
                f"reference snapshot: {wrong!r} is not in both the snapshot and the model's full modules"
            )
        with torch.no_grad():
            trained = {name: local_tensor(p).detach().clone() for name, p in named.items()}
            for name, parameter in named.items():
                local_tensor(parameter).copy_(self.values[name])
        try:
            yield
        finally:
            _put_back(named, trained)


@torch.no_grad()
def _put_back(named: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> None:
    for name, parameter in named.items():
        local_tensor(parameter).copy_(trained[name])
