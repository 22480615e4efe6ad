"""Ranks of a test, forked from a server that has imported what they need: an import takes longer than their work."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

multiprocessing.set_forkserver_preload(
    [
        "hybrid_lora_plugin.probing.runner",
        "transformers.models.qwen2.modeling_qwen2",
        "peft",
        "tests.support.tiny_probe",
    ]
)


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Call ``function(rank, *arguments)`` on each rank, and raise what one of them raises."""
    start_processes(function, arguments, nprocs=ranks, start_method="forkserver")
