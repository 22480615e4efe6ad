"""Runs under torchrun: ranks that each see a disk of their own under one path, as nodes without a shared one do.

Every rank works in a folder of its own and is given relative paths. Writes to ``OUT/results.json`` what came of each
case, the messages by rank.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch

from hybrid_lora_plugin.training.model_folder import ModelFolder
from tests.support.engine_worker import SAVED, build_engine, make_batch, policy_loss, share_of, train, weights_of


def messages(action) -> list[str]:
    """What each rank's ``action`` raised, ``""`` for nothing; on every rank."""
    said = ""
    try:
        action()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, said)
    return everyone


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    arguments = json.loads(Path(path).read_text())
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    out, results = Path(arguments["out"]), {}
    disk = out / f"disk{rank}"
    disk.mkdir()
    shutil.copytree(arguments["allocation"], disk / ("allocation" if rank == 0 else "on_rank_1"))
    if rank == 1:
        (disk / "blocked").touch()
    os.chdir(disk)

    def settings(**hybrid) -> dict:
        return {"model": arguments["model"], "hybrid": {"allocation": "allocation", "full_lr": 1e-3} | hybrid}

    results["allocation of rank 1"] = messages(lambda: build_engine(settings(allocation="on_rank_1")))
    results["blocked on rank 1"] = messages(lambda: build_engine(settings(checkpoint_dir="blocked")))
    engine = build_engine(settings(checkpoint_dir="checkpoints"))
    results["allocations"] = [None] * ranks
    torch.distributed.all_gather_object(results["allocations"], engine.allocation.full_names)

    loss, batch = policy_loss("hybrid_gspo"), share_of(make_batch(2), rank, ranks)
    train(engine, batch, loss, 1, ranks)
    saved = "checkpoints/global_step_1/actor"
    engine.save_checkpoint(saved, global_step=1)
    wanted = train(engine, batch, loss, 1, ranks), weights_of(engine)
    results["files"] = [None] * ranks
    torch.distributed.all_gather_object(results["files"], sorted(file.name for file in Path(saved).iterdir()))
    engine = build_engine(settings(checkpoint_dir="checkpoints") | {"save_contents": [*SAVED, "hf_model"]})
    engine.load_checkpoint(saved, del_local_after_load=False)
    steps, end = train(engine, batch, loss, 1, ranks), weights_of(engine)
    results["resumed"] = steps == wanted[0] and all(torch.equal(end[name], wanted[1][name]) for name in end)

    def load() -> None:
        engine.load_checkpoint(saved, del_local_after_load=False)

    parts, allocation = Path(saved), engine.allocation
    for name in ("model", "optim"):
        file = parts / f"{name}_world_size_{ranks}_rank_{rank}.pt"
        if rank == 1:
            file.rename(file.with_suffix(".away"))
        results[f"{name} missing on rank 1"] = messages(load)
        if rank == 1:
            file.with_suffix(".away").rename(file)
    object.__setattr__(engine.model_config, "lora_alpha", 64)
    results["another alpha"] = messages(load)
    object.__setattr__(engine.model_config, "lora_alpha", 8)
    description = parts / "hybrid_lora" / "trainables.json"
    text = description.read_text() if rank == 0 else ""
    description.write_text("{") if rank == 0 else None
    results["damaged on rank 0"] = messages(load)
    description.write_text(text) if rank == 0 else None
    engine.checkpoint_manager.checkpoint_load_contents = ["optimizer", "extra"]
    results["without weights"] = messages(load)
    engine.checkpoint_manager.checkpoint_load_contents = ["model", "optimizer", "extra"]
    (parts / "hybrid_lora").rename("away") if rank == 0 else None
    results["without our folder"] = messages(load)
    Path("away").rename(parts / "hybrid_lora") if rank == 0 else None
    for kind, lora in (("full", {}), ("lora", {"lora_rank": 4})):
        other = f"{kind}/global_step_7/actor"
        build_engine({"model": arguments["model"]} | lora).save_checkpoint(other, global_step=7)
        results[f"{kind} fine-tuning"] = messages(lambda other=other: engine.load_checkpoint(other))
    if rank == 1:
        frozen = [p for name, p in engine.module.named_parameters() if not p.requires_grad and ".layers.1." in name]
        with torch.no_grad():
            frozen[0].to_local().add_(1.0)
    results["another base on rank 1"] = messages(load)
    assert engine.allocation is allocation
    # Last: rank 0 cannot write a checkpoint at all, and then no plain model beside one.
    Path("taken").touch() if rank == 0 else None
    results["rank 0 cannot save"] = messages(lambda: engine.save_checkpoint("taken/actor", global_step=2))
    engine.save_checkpoint("plain", global_step=2)
    earlier = {file.name: file.read_bytes() for file in Path("plain").iterdir() if file.is_file()}
    with mock.patch.object(ModelFolder, "add", side_effect=OSError("no space left")):
        results["rank 0 cannot save a plain model"] = messages(lambda: engine.save_checkpoint("plain", global_step=3))
    now = {file.name: file.read_bytes() for file in Path("plain").iterdir() if file.is_file()}
    beside = [path.name for path in Path().iterdir() if path.name.startswith(".")]
    results["left of it"] = [None] * ranks
    torch.distributed.all_gather_object(results["left of it"], (earlier == now and len(now) > 2, beside))
    if rank == 0:
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
