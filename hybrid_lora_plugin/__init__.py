"""Hybrid-LoRA for verl: full fine-tuning for a few modules, LoRA for the rest, chosen by a probe.

Names below are imported on first use, so that importing the package costs nothing in every verl process,
and none of them needs verl.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "find_candidates": "hybrid_lora_plugin.candidates",
    "hybrid_score": "hybrid_lora_plugin.scoring",
    "allocate": "hybrid_lora_plugin.allocation",
    "load_allocation": "hybrid_lora_plugin.allocation",
    "apply_allocation": "hybrid_lora_plugin.training.apply",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
