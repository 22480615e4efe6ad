"""Runs under torchrun: the engine with rates of its own for full modules, and where each step leaves their weights."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from tests.support.engine_worker import build_engine, make_batch, policy_loss, share_of, train, weights_of

ROWS, STEPS = 8, 3
SETTINGS = {
    "plain": {},
    "factors": {"full_lr_factors": ["down_proj:0.25"]},
    "warm-up": {"full_warmup_steps": 4, "full_lr_factors": ["down_proj:0.25"]},
}


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from safetensors.torch import save_file
    from verl.utils.distributed import initialize_global_process_group

    arguments = json.loads(Path(path).read_text())
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    out, results, loss = Path(arguments["out"]), {}, policy_loss("hybrid_gspo")
    batch = share_of(make_batch(ROWS // ranks, ROWS), rank, ranks)
    for strategy in ("fsdp2", "fsdp"):
        for name, given in SETTINGS.items():
            hybrid = {"allocation": arguments["allocation"], "full_lr": 1e-3, **given}
            engine = build_engine({"model": arguments["model"], "hybrid": hybrid, "strategy": strategy})
            steps = results[f"{strategy}, {name}"] = []
            for step in range(1 + STEPS):
                if step:
                    steps += train(engine, batch, loss, 1, ranks)
                weights = weights_of(engine)
                if rank == 0:
                    save_file(
                        {key: value.contiguous() for key, value in weights.items()},
                        out / f"{strategy}, {name}, {step}.safetensors",
                    )
            del engine
            gc.collect()
    if rank == 0:
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
