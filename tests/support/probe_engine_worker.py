"""Runs under torchrun: engines that probe on the fly, for ``tests/test_on_the_fly.py``.

With objective ``sft`` the hybrid engine is built without an allocation, and built again as a resumed run would; with
``policy`` the probing engine is warmed up, interrupted at its checkpoint, continued and scored.
"""

from __future__ import annotations

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
    weights_of,
    whole,
)


def sft(arguments: dict) -> tuple[dict, dict]:
    """Probe, build, and build again; then with another budget."""
    import hybrid_lora_plugin.verl_backend.engine_registration  # noqa: F401
    from hybrid_lora_plugin.errors import ConfigurationError

    engine = build_engine(arguments)
    file = Path(arguments["hybrid"]["output_dir"]) / "allocation.json"
    results = {
        "full": engine.allocation.full_names,
        "trainable": [name for name, p in engine.module.named_parameters() if p.requires_grad],
        "written": file.stat().st_mtime_ns,
    }
    tensors = {"start": weights_of(engine)}
    again = build_engine(arguments)
    results["full_again"], results["written_again"] = again.allocation.full_names, file.stat().st_mtime_ns
    try:
        build_engine(arguments | {"hybrid": arguments["hybrid"] | {"budget": {"ratio": 0.5}}})
    except ConfigurationError as error:
        results["refused"] = str(error)
    return results, tensors


def policy(arguments: dict, rank: int, ranks: int) -> tuple[dict, dict]:
    """Warm up for some steps, save, go on; continue from the save in a second engine, and score both."""
    import hybrid_lora_plugin.verl_backend.engine_registration  # noqa: F401

    for folder in (arguments["hybrid"]["output_dir"], arguments["hybrid"]["output_dir"] + "-resumed"):
        # What the driver writes before it starts a probe.
        Path(f"{folder}.partial").mkdir(parents=True, exist_ok=True)
        (Path(f"{folder}.partial") / "settings.json").write_text('{"data.train_batch_size": 8}')
    loss = policy_loss("hybrid_gspo")
    batch = share_of(make_batch(arguments.get("micro_batch", 2)), rank, ranks)

    def steps(engine, count):
        seen = []
        for _ in range(count):
            for _ in range(arguments["mini_batches"]):
                with engine.train_mode():
                    output = engine.train_batch(batch.clone(), loss)
                seen.append(sum(output["loss"]))
            engine.lr_scheduler_step()
        return seen

    engine = build_engine(arguments)
    results = {"engine": type(engine).__name__, "actor_before": gather_log_probs(engine, batch, ranks, reference=False)}
    steps(engine, 2)
    engine.save_checkpoint(str(Path(arguments["out"]) / "checkpoint"), global_step=2)
    results["losses"] = steps(engine, 1)
    results["actor_warm"] = gather_log_probs(engine, batch, ranks, reference=False)
    results["reference_warm"] = gather_log_probs(engine, batch, ranks, reference=True)
    tensors = {
        "warm": weights_of(engine),
        "synced": {
            name: tensor.clone()
            for name, tensor in engine.get_per_tensor_param()[0]
            if not name.startswith("hybrid_lora.sync.")
        },
    }
    steps(engine, arguments["scoring_steps"])
    results["gradients_left"] = [n for n, p in engine.module.named_parameters() if p.grad is not None]
    tensors["scored"] = weights_of(engine)
    tensors["rows"] = {"sensitivities": torch.stack(engine._rows["sensitivities"])}

    hybrid = arguments["hybrid"] | {"output_dir": arguments["hybrid"]["output_dir"] + "-resumed"}
    resumed = build_engine(arguments | {"hybrid": hybrid})
    resumed.load_checkpoint(str(Path(arguments["out"]) / "checkpoint"), del_local_after_load=False)
    results["losses_resumed"] = steps(resumed, 1)
    steps(resumed, arguments["scoring_steps"])
    tensors["rows_resumed"] = {"sensitivities": torch.stack(resumed._rows["sensitivities"])}
    tensors["e"] = {name: whole(layer.e) for name, layer in resumed._layers.items()}

    def more(name, probe, **changes):
        """Another probe, up to its artifact; its folder is that of the first with a name behind it."""
        folder = f"{arguments['hybrid']['output_dir']}-{name}"
        Path(f"{folder}.partial").mkdir(parents=True, exist_ok=True)
        (Path(f"{folder}.partial") / "settings.json").write_text('{"data.train_batch_size": 8}')
        hybrid = arguments["hybrid"] | {"output_dir": folder} | changes
        engine = build_engine(arguments | {"hybrid": hybrid | {"probe": arguments["hybrid"]["probe"] | probe}})
        return engine

    for criterion in ("signal_to_noise", "residual_gradient", "gradient_norm"):
        one = more(criterion, {"warmup_steps": 2}, criterion=criterion)
        while not one._written:
            steps(one, 1)
    auto = {
        "warmup_steps": "auto", "max_warmup_steps": 7, "warmup_check_steps": 2, "warmup_check_partitions": 4,
        "partitions": "auto", "max_partitions": 20, "warmup_agreement": 0.3, "settled_share": 0.3,
    }  # fmt: skip
    engine, stages = more("auto", auto), []
    stopped = None
    while not engine._written:
        stages.append(list(engine._stage))
        if len(stages) == 4:
            # In the middle of a check.
            engine.save_checkpoint(str(Path(arguments["out"]) / "auto-checkpoint"), global_step=3)
            stopped = len(stages) - 1
            resumed = more("auto", auto)
            resumed.load_checkpoint(str(Path(arguments["out"]) / "auto-checkpoint"), del_local_after_load=False)
            engine = resumed
        steps(engine, 1)
    results["stages"], results["stopped"] = stages, stopped
    results["note"] = (Path(f"{arguments['hybrid']['output_dir']}-auto.partial") / "warmup_ended").read_text()
    return results, tensors


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    arguments = json.loads(Path(path).read_text())
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    if arguments["hybrid"].get("phase") == "probe":
        results, tensors = policy(arguments, rank, ranks)
    else:
        results, tensors = sft(arguments)
    if rank == 0:
        out = Path(arguments["out"])
        for name, group in tensors.items():
            save_file({key: value.contiguous() for key, value in group.items()}, out / f"{name}.safetensors")
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
