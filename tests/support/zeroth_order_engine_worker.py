"""Runs under torchrun: frozen weights that move in the real engine, its reference, sync and checkpoints, and a resume.

Writes what it saw to ``OUT/results.json`` and ``OUT/*.safetensors`` (rank 0).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.engine_worker import (
    SAVED,
    build_engine,
    gather_log_probs,
    make_batch,
    policy_loss,
    share_of,
    synced,
    weights_of,
)
from tests.support.zeroth_order_worker import gathered

STEPS = 2


def train(engine, batch, loss, steps: int, ranks: int) -> list[dict]:
    """Metrics of each step, and the moves of all so far as every rank has them."""
    seen = []
    for _ in range(steps):
        with engine.train_mode():
            metrics = engine.train_batch(batch.clone(), loss)["metrics"]
            assert engine.module.training
        engine.lr_scheduler_step()
        seen.append({name: metrics[name] for name in sorted(metrics) if name == "grad_norm"})
        seen[-1] |= {name: value[0] for name, value in metrics.items() if name.startswith(("zeroth", "lr_", "update_"))}
    return seen


def moves_of(engine, ranks: int) -> list[list]:
    """The log, which is the same on every rank."""
    own = [[move.step, move.seed, move.slope, move.rate] for move in engine._zeroth_order.log.moves]
    everybodys = [None] * ranks
    torch.distributed.all_gather_object(everybodys, own)
    assert all(moves == own for moves in everybodys), "every rank moves by the same"
    return own


def state_of(engine) -> dict[str, torch.Tensor]:
    """What the model holds, and the masters."""
    zeroth = engine._zeroth_order
    masters = gathered("master", zeroth.weights, zeroth._named)
    # Of one rank they are its own.
    return weights_of(engine) | {name: master.clone() for name, master in masters.items()}


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    from hybrid_lora_plugin.errors import ConfigurationError

    arguments = json.loads(Path(path).read_text())
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    out, results, tensors = Path(arguments["out"]), {}, {}
    hybrid = {"allocation": arguments["allocation_folder"], "full_lr": 1e-3, "save": arguments.get("save", "full")}
    if "zeroth_order" in arguments:
        hybrid["zeroth_order"] = {"enabled": True, "lr": 1e-4, "directions": 2} | arguments["zeroth_order"]
    build = {name: arguments[name] for name in ("model", "rollout_dtype", "param_dtype") if name in arguments}
    build |= {"hybrid": hybrid, "save_contents": [*SAVED, "hf_model"]}
    engine = build_engine(build)
    loss = policy_loss(arguments.get("loss", "hybrid_gspo"))
    batch = share_of(make_batch(2), rank, ranks)

    def message(engine, checkpoint) -> str:
        try:
            engine.load_checkpoint(str(checkpoint), del_local_after_load=False)
        except ConfigurationError as error:
            return str(error)
        return "accepted"

    if arguments.get("resume"):
        results["refused"] = message(engine, arguments["wrong"]) if "wrong" in arguments else ""
        results["said"] = message(engine, arguments["resume"])
        tensors["resumed"] = state_of(engine)
        results["steps"] = train(engine, batch, loss, STEPS, ranks)
        tensors["end"] = state_of(engine)
        results["moves"] = moves_of(engine, ranks)
    elif arguments.get("only_steps"):
        results["steps"] = []
        for step in range(STEPS):
            results["steps"] += train(engine, batch, loss, 1, ranks)
            tensors[f"step{step}"] = weights_of(engine)
        results["moves"] = moves_of(engine, ranks) if "zeroth_order" in arguments else []
    else:
        tensors["start"] = state_of(engine)
        results["reference_before"] = gather_log_probs(engine, batch, ranks, reference=True)
        results["steps"] = train(engine, batch, loss, STEPS, ranks)
        tensors["trained"] = state_of(engine)
        for name, reference in (("actor", False), ("reference_after", True), ("actor_again", False)):
            results[name] = gather_log_probs(engine, batch, ranks, reference=reference)
        try:
            with engine.eval_mode(), engine.disable_adapter():
                raise ZeroDivisionError
        except ZeroDivisionError:
            tensors["after_error"] = state_of(engine)
        tensors["synced"], _, results["headers"] = synced(engine)
        results["identity"] = engine._base_identity()
        engine.save_checkpoint(str(out / "checkpoint"), global_step=STEPS)
        if rank == 0:
            log = out / "other modules" / "hybrid_lora" / "zeroth_order.json"
            shutil.copytree(out / "checkpoint", log.parent.parent)
            content = json.loads(log.read_text())
            del content["parameters"][min(content["parameters"])]
            log.write_text(json.dumps(content))
        results["saved_moves"] = moves_of(engine, ranks)
        results["steps_on"] = train(engine, batch, loss, STEPS, ranks)
        tensors["end"] = state_of(engine)
        results["moves"] = moves_of(engine, ranks)
        # The same engine from its checkpoint again, after it has moved on.
        assert (said := message(engine, out / "checkpoint")) == "accepted", said
        tensors["again"] = state_of(engine)
    if rank == 0:
        for name, group in tensors.items():
            save_file({key: value.contiguous() for key, value in group.items()}, out / f"{name}.safetensors")
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
