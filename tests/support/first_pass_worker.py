"""Runs under torchrun: engines that compute in bfloat16 through a few steps, each after other first passes.

Writes to ``OUT/results.json`` what each strategy and order gave (rank 0), and the weights after it beside it.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.engine_worker import (
    build_engine,
    gather_log_probs,
    make_batch,
    policy_loss,
    share_of,
    train,
    weights_of,
)

ROWS = 8
STRATEGIES = ("fsdp2", "fsdp")
#: passes before the first update, by name of the order
ORDERS = {
    "update": (),
    "actor": ("actor",),
    "reference": ("reference",),
    "reference, then actor": ("reference", "actor"),
    "failed reference": ("failed reference",),
    "fixed prompts": ("sync",),
    "resumed": ("resume",),
    "resumed, then fixed prompts": ("resume", "sync"),
    "resumed, then actor": ("resume", "actor"),
    "resumed, then reference": ("resume", "reference"),
}


def run_pass(engine, batch, ranks: int, kind: str, checkpoint: str) -> list[list[float]]:
    """One pass before the first update; returns its log-probabilities [B][S] where it has any."""
    if kind == "resume":
        engine.load_checkpoint(checkpoint, del_local_after_load=False)
    elif kind == "sync":
        # Looks at the base model first.
        engine.hybrid.sync_check = "logprobs"
        stream, _ = engine.get_per_tensor_param()
        for _ in stream:
            pass
        return stream.header.fixed_prompt["base_log_probs"]
    elif kind == "failed reference":
        try:
            with engine.eval_mode(), engine.disable_adapter():
                engine.infer_batch(batch, loss_function=None)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
    else:
        return gather_log_probs(engine, batch, ranks, reference=kind == "reference")
    return []


def with_pefts_switch(arguments: dict, batch, loss, ranks: int) -> str:
    """What the first update says after a first pass in which PEFT itself has switched the adapters off."""
    engine = build_engine(arguments)
    with engine.eval_mode(), engine.module.disable_adapter():
        engine.infer_batch(batch, loss_function=None)
    try:
        train(engine, batch, loss, 1, ranks)
    except RuntimeError as error:
        return str(error)
    return ""


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    arguments = json.loads(Path(path).read_text()) | {"param_dtype": "bf16"}
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    out, results, loss = Path(arguments["out"]), {}, policy_loss("hybrid_gspo")
    # One micro-batch an update: FSDP2 accumulates several in the type that it should reduce in.
    batch = share_of(make_batch(ROWS // ranks, ROWS), rank, ranks)
    for strategy in STRATEGIES:
        checkpoint = str(out / f"checkpoint-{strategy}")
        for order, passes in ORDERS.items():
            engine = build_engine(arguments | {"strategy": strategy})
            seen = {kind: run_pass(engine, batch, ranks, kind, checkpoint) for kind in passes}
            steps = []
            if "resume" not in passes:
                steps += train(engine, batch, loss, 1, ranks)
                if order == "update":
                    engine.save_checkpoint(checkpoint, global_step=1)
            steps += train(engine, batch, loss, 1, ranks)
            name = f"{strategy}, {order}"
            results[name] = {"steps": steps, "passes": seen}
            end = weights_of(engine)
            if rank == 0:
                save_file({key: value.contiguous() for key, value in end.items()}, out / f"{name}-end.safetensors")
            del engine
            gc.collect()
    # Last: an update that fails leaves FSDP in no state to go on with.
    results["PEFT's own switch"] = with_pefts_switch(arguments | {"strategy": "fsdp2"}, batch, loss, ranks)
    if rank == 0:
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
