"""Runs under torchrun: two-point steps of the frozen weights of a hybrid model that FSDP2 shards, and their replay.

Writes to ``OUT/<dtype>-<ranks>.safetensors`` the masters and what the model holds after the steps, as ``master/NAME``
and ``held/NAME``, and as ``replayed/NAME`` the masters of a fresh model after the log of one rank; the log beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin import apply_allocation, load_allocation
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.training.dtensor import local_tensor, whole, with_local
from hybrid_lora_plugin.training.zeroth_order.move_log import MoveLog
from hybrid_lora_plugin.training.zeroth_order.two_point import mean_over_ranks, two_point_step
from hybrid_lora_plugin.training.zeroth_order.weights import PerturbedWeights

ROWS, TOKENS, STEPS, DIRECTIONS, RATE = 8, 12, 3, 2, 1e-3


def hybrid_model(arguments: dict, dtype: torch.dtype, ranks: int) -> torch.nn.Module:
    """The hybrid model with frozen weights in ``dtype`` and products in float32, one FSDP2 unit a layer."""
    model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=dtype)
    model = apply_allocation(model, load_allocation(arguments["allocation"]), rank=2, alpha=4).eval()
    mesh = init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def moved_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Frozen weights and biases, the embedding with its odd number of rows too; norms stay outside."""
    return [(name, p) for name, p in model.named_parameters() if not p.requires_grad and "norm" not in name]


def problems(vocabulary: int) -> torch.Tensor:
    """Rows ``[ROWS, TOKENS]`` int64, the same on every rank."""
    return torch.randint(0, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))


def run(arguments: dict, dtype: torch.dtype, rank: int, ranks: int) -> None:
    model = hybrid_model(arguments, dtype, ranks)
    moved = moved_parameters(model)
    outside = {name: p for name, p in model.named_parameters() if name not in dict(moved)}
    before = {name: local_tensor(p).detach().clone() for name, p in outside.items()}
    untouched = {name: local_tensor(p).detach().clone() for name, p in moved}
    weights = PerturbedWeights(moved, 1e-3)
    log = MoveLog.of(weights)
    # Neither 2 nor 4 shares of one size: the mean must weigh rows.
    shares = {1: [8], 2: [5, 3], 4: [1, 4, 2, 1]}[ranks]
    own = problems(model.config.vocab_size)[sum(shares[:rank]) : sum(shares[: rank + 1])]
    seen = []

    def measure() -> float:
        logits = model(input_ids=own, use_cache=False).logits[:, :-1].flatten(0, 1).double()
        total = functional.cross_entropy(logits, own[:, 1:].flatten(), reduction="sum").item()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        seen.append(total)
        return mean_over_ranks(total, own[:, 1:].numel())

    class Failure(Exception):
        pass

    def failing() -> float:
        measure()
        raise Failure

    try:
        two_point_step(weights, failing, seed=0, step=0, rate=RATE)
    except Failure:
        assert all(torch.equal(local_tensor(p), untouched[name]) for name, p in moved), "restored exactly"
    for step in range(STEPS):
        done = two_point_step(weights, measure, seed=7, step=step, rate=RATE, directions=DIRECTIONS)
        assert done.skipped == 0
        log.add(done.moves)
    assert any(not torch.equal(local_tensor(p), untouched[name]) for name, p in moved if local_tensor(p).numel())
    assert all(torch.equal(local_tensor(p), before[name]) for name, p in outside.items()), "bit-equal outside"
    everybodys: list = [None] * ranks
    distributed.all_gather_object(everybodys, log.moves)
    assert all(moves == log.moves for moves in everybodys), "every rank moves by the same"

    name = f"{str(dtype).removeprefix('torch.')}-{ranks}"
    tensors = {f"held/{plain_name(n)}": whole(p, "cpu") for n, p in moved}
    tensors |= gathered("master", weights, moved)
    fresh = hybrid_model(arguments, dtype, ranks)
    replay = PerturbedWeights(moved_parameters(fresh), 1e-3)
    one = Path(arguments["out"]) / f"{name.partition('-')[0]}-1.json"
    if rank == 0:
        log.save(one.with_name(f"{name}.json"))
    distributed.barrier()
    MoveLog.load(one).replay(replay)
    tensors |= gathered("replayed", replay, moved_parameters(fresh))
    if rank == 0:
        save_file({n: t.contiguous() for n, t in tensors.items()}, one.with_name(f"{name}.safetensors"))


def gathered(kind: str, weights: PerturbedWeights, parameters) -> dict[str, torch.Tensor]:
    """The masters, whole."""
    found = {}
    for name, parameter in parameters:
        master = weights.masters[plain_name(name)].view(local_tensor(parameter).shape)
        found[f"{kind}/{plain_name(name)}"] = whole(with_local(parameter, master), "cpu")
    return found


def main(path: str) -> None:
    arguments = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for dtype in (torch.float32, torch.bfloat16):
        run(arguments, dtype, rank, ranks)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
