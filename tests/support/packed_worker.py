"""Runs under torchrun: what the engine says of packed rows under one setting after the other.

Writes to ``OUT/results.json`` (rank 0) of each setting the lines that its engine printed, or the line that it was
refused with; and whether every rank has the same.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from tests.support.engine_worker import build_engine

#: attention that sees one long row where several are packed, as a kernel that reads no position ids does
BOUNDLESS = "boundless_attention"


def boundless(module, query, key, value, attention_mask, scaling=None, **_):
    """Causal attention from the first token of the pack; query [B, H, S, D] -> [B, S, H, D]."""
    result = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return result.transpose(1, 2).contiguous(), None


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(BOUNDLESS, boundless)
    AttentionMaskInterface.register(BOUNDLESS, lambda *_, **__: None)


def said(arguments: dict) -> list[str]:
    """What an engine prints until it is ready, or the refusal, as one line of this rank."""
    from hybrid_lora_plugin.errors import ConfigurationError

    lines = io.StringIO()
    try:
        with redirect_stdout(lines):
            build_engine(arguments)
    except ConfigurationError as error:
        return [f"refused: {error}"]
    return [line for line in lines.getvalue().splitlines() if "packed rows" in line]


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    arguments = json.loads(Path(path).read_text())
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    register()
    results = {}
    for name, setting in arguments["settings"].items():
        everyone: list = [None] * ranks
        torch.distributed.all_gather_object(everyone, said(arguments | setting))
        results[name] = everyone
    if rank == 0:
        (Path(arguments["out"]) / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
