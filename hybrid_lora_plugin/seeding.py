"""One independent random stream per purpose, so that no draw depends on how far another got."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator determined by its arguments alone.

    Args:
        seed: ``probe.seed``.
        purpose: what is drawn, e.g. ``"partition"``.
        index: which draw of that purpose.
    """
    return generator_for(f"{seed}/{purpose}/{index}")


def generator_for(key: str) -> torch.Generator:
    """A CPU generator determined by a text."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
