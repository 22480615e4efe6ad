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
        self._alive: weakref.WeakKeyDictionary[torch.UntypedStorage, _Size] = weakref.WeakKeyDictionary()
        self._total = [0]
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._excluded:
                self._alive.setdefault(storage, _Size(self._total)).become(storage.nbytes())
            del storage
        if self._total[0] > self.peak:
            # Some may have been emptied since they were seen.
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes alive. A storage that was emptied, as FSDP does with what it gathered, has none."""
        for storage, size in list(self._alive.items()):
            size.become(storage.nbytes())
        return self._total[0]


class _Size:
    """A storage's part of a total, which it leaves when it goes."""

    def __init__(self, total: list[int]):
        self._shared, self._bytes = total, 0

    def become(self, size: int) -> None:
        self._shared[0] += size - self._bytes
        self._bytes = size

    def __del__(self) -> None:
        self._shared[0] -= self._bytes


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)
