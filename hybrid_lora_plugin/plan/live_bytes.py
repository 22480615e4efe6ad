"""Bytes of the tensors that are alive while some code runs; on the meta device all is counted, nothing allocated."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts storages made or touched inside it, each once, until the last tensor on it is gone.

    What a kernel takes for itself and gives back before it returns is not seen, nor what an allocator adds.

    Args:
        excluded: tensors that are not counted, such as a model's weights.

    Attributes:
        peak: the most bytes alive after any one operation.
    """

    def __init__(self, excluded: Iterable[torch.Tensor] = ()):
        super().__init__()
        self._excluded = weakref.WeakSet(tensor.untyped_storage() for tensor in excluded)
        # A storage's Python object lives as long as its last tensor, whoever holds that.
        self._alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._excluded:
                self._alive.add(storage)
            del storage
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes alive. A storage that was emptied, as FSDP does with what it gathered, has none."""
        return sum(storage.nbytes() for storage in self._alive)


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)
