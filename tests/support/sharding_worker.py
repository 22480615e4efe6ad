"""Runs under torchrun: the engine through a few steps under one setting of sharding after the other.

Writes to ``OUT/results.json`` what each setting gave (rank 0), and its first and last weights beside it.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from hybrid_lora_plugin.sync import base_weights
from tests.support.engine_worker import (
    build_engine,
    gather_log_probs,
    make_batch,
    policy_loss,
    share_of,
    train,
    weights_of,
)

ROWS, STEPS = 16, 3


def counted(part, seen: list):
    """``SharedInput.part`` that notes in ``seen`` when it had a product to give."""
    part = getattr(part, "__wrapped__", part)

    @functools.wraps(part)
    def noting(*arguments):
        result = part(*arguments)
        if result is not None:
            seen.append(1)
        return result

    return noting


def tensors_in(stream) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in stream if not name.startswith("hybrid_lora.sync.")}


def synced_in_bf16(engine, ranks: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """A sync in mode ``merge`` to a rollout in bfloat16, and the metrics of what arrived."""
    from hybrid_lora_plugin.verl_backend.sender import sync_metrics

    source = engine._weight_source
    engine.hybrid.sync, given, source.dtype = "merge", source.dtype, torch.bfloat16
    stream, _ = engine.get_per_tensor_param()
    source.dtype = given
    tensors, records = tensors_in(stream), [None] * ranks
    torch.distributed.all_gather_object(records, sync_metrics.last_sync())
    return tensors, sync_metrics.combined(records)


def synced_sparsely(engine, ranks: int) -> tuple[dict[str, dict], dict]:
    """Two syncs in mode ``sparse_merge`` with a small step between them, and one in mode ``merge`` after it.

    Returns:
        What a rollout engine in bfloat16 then holds, and what ``merge`` sends; how many lists of changed elements and
        whole weights there were in the second, its account and its header.
    """
    from hybrid_lora_plugin.sync.element_list import decode

    source = engine._weight_source
    given, source.dtype, engine.hybrid.sync_check = source.dtype, torch.bfloat16, "digest"

    def sync(mode: str):
        engine.hybrid.sync = mode
        stream, _ = engine.get_per_tensor_param(base_sync_done=True)
        return tensors_in(stream), stream

    held, first = sync("sparse_merge")
    # As an optimizer finds it: FSDP1 may hold gathered weights since the last forward pass, and drops them unread.
    engine._reshard()
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1 + 1e-4)
    changes, second = sync("sparse_merge")
    said = engine.training_bytes().sent
    for name, tensor in changes.items():
        if tensor.dtype == torch.int16:
            indices, values = decode(tensor)
            held[name].view(torch.int16).view(-1)[indices] = values
        else:
            held[name] = tensor
    merged, _ = sync("merge")
    source.dtype = given
    accounts = [None] * ranks
    torch.distributed.all_gather_object(accounts, second.manifest())
    assert all(account == accounts[0] for account in accounts), "every rank sends the same"
    lists = [tensor for tensor in changes.values() if tensor.dtype == torch.int16]
    seen = {"lists": len(lists), "elements": sum(map(len, lists)), "base_number": second.header.base_number}
    seen |= {"first": first.header.number, "share": second.changes.share, "kept": source._sent.bytes}
    seen |= {"trains": second.changes.elements, "part": second.changes.part, "said": said}
    return {"synced-sparse": held, "synced-moved": merged}, seen


def run_setting(arguments: dict, setting: dict, rank: int, ranks: int) -> tuple[dict, dict[str, dict]]:
    """Steps, reference log-probabilities, bytes and units of one engine; its weights before and after."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    from hybrid_lora_plugin.training.dtensor import local_tensor
    from hybrid_lora_plugin.training.lora_linear import SharedInput

    engine = build_engine(arguments | setting)
    shares = engine.get_data_parallel_size()
    micro_batch, options = ROWS // shares // setting["accumulation"], setting.get("model_options", {})
    batch = share_of(make_batch(micro_batch, ROWS, **options), engine.get_data_parallel_rank(), shares)
    start = weights_of(engine)
    result = {"buffers": {n: b.tolist() for n, b in engine.module.named_buffers() if n.endswith("inv_freq")}}
    result["buffer_dtypes"] = sorted({str(buffer.dtype) for buffer in engine.module.buffers()})
    parameters, gradients = list(engine.module.parameters()), []

    def look(*_) -> None:
        gradients.append(sum(local_tensor(p.grad).nbytes for p in parameters if p.grad is not None))

    engine.optimizer.register_step_pre_hook(look)
    shared = []
    SharedInput.part = counted(SharedInput.part, shared)
    result |= {"steps": train(engine, batch, policy_loss("hybrid_gspo"), STEPS, ranks)}
    result["shared_products"] = len(shared)
    result["reference"] = gather_log_probs(engine, batch, ranks, reference=True)
    said = engine.training_bytes()
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    result["bytes"] = vars(said) | {"total": said.total}
    result["gradients"] = sorted(set(gradients))
    result["moments"] = sum(local_tensor(value).nbytes for value in states if value.dim())
    result["states"] = len(engine.optimizer.state)
    result["groups"] = [group["name"] for group in engine.optimizer.param_groups]
    result["trained_dtypes"] = sorted({str(p.dtype) for p in engine.module.parameters() if p.requires_grad})
    result["frozen_dtypes"] = sorted({str(p.dtype) for p in engine.module.parameters() if not p.requires_grad})
    layers = len(engine.model_config.hf_config.layer_types)
    units = [n for n, m in engine.module.named_modules() if isinstance(m, FSDPModule | FullyShardedDataParallel)]
    result["units_per_layer"] = sum(".layers." in name for name in units) / layers
    end, synced = weights_of(engine), {}
    for mode in ("merge", "receiver_merge"):
        engine.hybrid.sync = mode
        with mock.patch.object(base_weights, "value_digest", wraps=base_weights.value_digest) as hashed:
            stream, _ = engine.get_per_tensor_param()
        synced[f"synced-{mode}"] = tensors_in(stream)
    result["base"] = [None] * ranks
    torch.distributed.all_gather_object(result["base"], (stream.header.base, hashed.call_count))
    synced["synced-bf16"], result["arrival"] = synced_in_bf16(engine, ranks)
    engine.hybrid.sync_check = "logprobs"
    engine.engine_config.use_remove_padding = options.get("use_remove_padding", False)  # as verl's worker does
    engine.engine_config.use_fused_kernels = options.get("use_fused_kernels", False)
    stream, _ = engine.get_per_tensor_param()
    result["fixed_prompt"] = stream.header.fixed_prompt
    for _ in stream:
        pass
    if "checkpoint" in setting:
        engine.save_checkpoint(str(Path(arguments["out"]) / setting["checkpoint"]), global_step=STEPS)
    # Last: it moves what trains.
    sparse, result["sparse"] = synced_sparsely(engine, ranks)
    return result, {"start": start, "end": end} | synced | sparse


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    arguments = json.loads(Path(path).read_text())
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    out, results = Path(arguments["out"]), {}
    for name, setting in arguments["settings"].items():
        results[name], weights = run_setting(arguments, setting, rank, ranks)
        gc.collect()
        if rank == 0:
            for when, tensors in weights.items():
                save_file(
                    {key: value.contiguous() for key, value in tensors.items()}, out / f"{name}-{when}.safetensors"
                )
    if rank == 0:
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
