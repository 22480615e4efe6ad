"""Decoder layers whose activations are computed again in the backward pass, so that those of one layer are held.

A model's own switch acts in training mode alone, and scores are taken in evaluation mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_again: ContextVar[bool] = ContextVar("recomputing", default=False)


def is_recomputing() -> bool:
    """Whether a layer is being computed for the second time; a hook that counts must not count twice."""
    return _again.get()


@contextlib.contextmanager
def _second_time() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)


def recompute_activations(layers: Sequence[nn.Module]) -> None:
    """Hold the input of each layer between forward and backward, and nothing of what it computes inside.

    A pass without gradients is as it was. Values and gradients are the same bits wherever a layer is deterministic.

    Args:
        layers: decoder layers; their ``forward`` is replaced, so whatever wraps a layer goes around this.
    """
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)


def _forward(inner, *arguments, **named):
    if not torch.is_grad_enabled():
        return inner(*arguments, **named)
    return checkpoint(inner, *arguments, use_reentrant=False, context_fn=_contexts, **named)


def _contexts():
    return contextlib.nullcontext(), _second_time()
