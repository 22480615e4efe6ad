"""Runs under torchrun: saves under ``hybrid_lora.save=trainable``, or resumes from such a checkpoint in this process.

``OUT/results.json`` has losses and norms of the steps, what the engine held before and after, and what it refused.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file

from tests.support.engine_worker import build_engine, make_batch, policy_loss, share_of, train, weights_of


def held_by(engine) -> dict:
    """Everything that a step depends on besides weights, in JSON: optimizer, schedule, random states, allocation."""
    whole = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value  # noqa: E731
    state = {}
    for group in engine.optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            for key, value in engine.optimizer.state[parameter].items():
                exact = whole(value).double()
                state[f"{group['name']} {index} {key}"] = [exact.sum().item(), exact.abs().sum().item()]
    return {
        "optimizer": state,
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups],
        "schedule": engine.lr_scheduler.state_dict(),
        "random": [
            torch.get_rng_state().sum().item(),
            random.getstate()[1][-1],
            int(numpy.random.get_state()[1].sum()),
        ],
        "allocation": [list(engine.allocation.full_names), list(engine.allocation.lora_names)],
        "base": engine._base_identity(),
    }


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    from hybrid_lora_plugin.errors import ConfigurationError

    arguments = json.loads(Path(path).read_text())
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    out, results = Path(arguments["out"]), {}
    hybrid = {"allocation": arguments["allocation_folder"], "full_lr": 1e-3, "save": arguments.get("save", "trainable")}
    engine = build_engine({"model": arguments["model"], "hybrid": hybrid})
    loss, batch = policy_loss("hybrid_gspo"), share_of(make_batch(2), rank, ranks)

    def message(checkpoint) -> str:
        try:
            engine.load_checkpoint(str(checkpoint), del_local_after_load=False)
        except ConfigurationError as error:
            return str(error)
        return "accepted"

    if arguments.get("resume"):
        results["refused"] = {}
        for name, checkpoint in arguments.get("wrong", {}).items():
            results["refused"][name] = message(checkpoint)
        engine.load_checkpoint(arguments["resume"], del_local_after_load=False)
        results["held"] = held_by(engine)
        results["steps"] = train(engine, batch, loss, 2, ranks)
    else:
        train(engine, batch, loss, 2, ranks)
        random.random(), torch.rand(3), numpy.random.rand(2)
        engine.save_checkpoint(str(out / "checkpoint"), global_step=2)
        results["held"] = held_by(engine)
        results["steps"] = train(engine, batch, loss, 2, ranks)
        if rank == 0:
            for name in ("another base", "cut optimizer", "cut weights"):
                shutil.copytree(out / "checkpoint", out / name)
            file = out / "another base" / "hybrid_lora" / "resume.json"
            file.write_text(file.read_text().replace(results["held"]["base"], 64 * "0"))
            for name, file in (("cut optimizer", "optimizer"), ("cut weights", "trainables")):
                cut = out / name / "hybrid_lora" / f"{file}.safetensors"
                cut.write_bytes(cut.read_bytes()[:-100])
        torch.distributed.barrier()
    end = weights_of(engine)
    if rank == 0:
        save_file({key: value.contiguous() for key, value in end.items()}, out / "end.safetensors")
        assert load_file(out / "end.safetensors")
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
