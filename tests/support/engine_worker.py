"""Runs under torchrun: the real engine from verl's registry through training, reference, sync and checkpoint.

``python -m torch.distributed.run --nproc-per-node N tests/support/engine_worker.py ARGUMENTS.json`` writes what it saw
to
``OUT/results.json`` and ``OUT/*.safetensors`` (rank 0), for ``tests/test_engine.py`` to compare.
"""

from __future__ import annotations

import copy
import io
import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support import host_flash_attention

#: contents of a checkpoint, verl's default
SAVED = ["model", "optimizer", "extra"]
#: of 16 rows, eight unless more are asked for
PROMPTS = 2 * [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16], [17, 18, 19], [20, 21], [22, 23, 24]]


def make_batch(micro_batch: int, rows: int = 8, **settings):
    """Rows in verl's nested layout; log-probabilities to compare against and advantages are fixed by seed.

    Settings are those that verl's worker sends along, e.g. ``use_remove_padding``.
    """
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(7)
    responses = [torch.randint(5, 60, (3 + row % 4,), generator=generator) for row in range(rows)]
    prompts = [torch.tensor(prompt) for prompt in PROMPTS[:rows]]
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    advantages = torch.randn(rows, generator=generator)
    old = [-4.0 + 0.3 * torch.randn(len(row), generator=generator) for row in responses]
    tensors = {
        "prompts": nested(prompts),
        "responses": nested(responses),
        "input_ids": nested(whole),
        "position_ids": nested([torch.arange(len(row)) for row in whole]),
        "response_mask": nested([torch.ones(len(row), dtype=torch.int64) for row in responses]),
        "loss_mask": nested([torch.ones(len(row), dtype=torch.int64) for row in responses]),
        "old_log_probs": nested(old),
        "advantages": nested([torch.full((len(r),), float(a)) for r, a in zip(responses, advantages, strict=True)]),
    }
    settings = (
        dict(
            temperature=1.0,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=micro_batch,
            use_remove_padding=False,
            use_fused_kernels=False,
            global_batch_size=rows,
            calculate_entropy=False,
        )
        | settings
    )
    return tu.get_tensordict(tensors, non_tensor_dict=settings)


def share_of(batch, rank: int, ranks: int):
    """Rows of this rank, contiguous as verl's dispatch cuts them."""
    from verl.utils import tensordict_utils as tu

    return tu.chunk_tensordict(batch, ranks)[rank]


def gather_log_probs(engine, batch, ranks: int, reference: bool) -> list[list[float]]:
    """Log-probabilities [B][S] of the response tokens of all ranks, from the actor or from the reference policy."""
    from contextlib import nullcontext

    from verl.workers.utils.padding import no_padding_2_padding

    with engine.eval_mode(), engine.disable_adapter() if reference else nullcontext():
        output = engine.infer_batch(batch, loss_function=None)
    mine = []
    if engine.is_mp_src_rank_with_outputs():
        padded = no_padding_2_padding(output["model_output"]["log_probs"], batch)
        lengths = batch["responses"].offsets().diff().tolist()
        mine = [row[:length].tolist() for row, length in zip(padded, lengths, strict=True)]
    everyone = [None] * ranks
    torch.distributed.all_gather_object(everyone, mine)
    return [row for part in everyone for row in part]


def build_engine(arguments: dict):
    """The engine that verl's registry gives for this model, as ``TrainingWorker`` asks for it."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    lora, hybrid = {}, arguments.get("hybrid")
    if arguments.get("lora_rank"):
        lora = {"lora_rank": arguments["lora_rank"], "lora_alpha": 8}
    if arguments.get("allocation"):
        hybrid = {"allocation": arguments["allocation"], "full_lr": 1e-3}
    if hybrid:
        lora = {
            "lora_rank": 4,
            "lora_alpha": 8,
            "external_lib": "hybrid_lora_plugin.verl_backend.engine_registration",
            "lora": {
                "merge": True,
                "rollout_dtype": arguments.get("rollout_dtype", "float32"),
                "hybrid": {"full_lr": 1e-6} | hybrid | {"lora": {"rank": 4, "alpha": 8, "lr": 1e-2}},
            },
        }
    attention = arguments.get("attention", "sdpa")
    if attention == host_flash_attention.NAME:
        host_flash_attention.register()
    model_config = HFModelConfig(
        path=arguments["model"],
        enable_gradient_checkpointing=arguments.get("gradient_checkpointing", False),
        override_config={"attn_implementation": attention},
        **({"use_remove_padding": False} | arguments.get("model_options", {})),
        **lora,
    )
    precision = {"param_dtype": arguments.get("param_dtype", "fp32"), "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine_config = FSDPEngineConfig(
        strategy=arguments.get("strategy", "fsdp2"),
        model_dtype="fp32",
        mixed_precision=precision,
        use_torch_compile=False,
        forward_only=False,
        **({"fsdp_size": -1} | arguments.get("sharding", {})),
    )
    optimizer_config = FSDPOptimizerConfig(
        lr=1e-2, total_training_steps=10, lr_warmup_steps=0, weight_decay=0.0, lr_scheduler_type="constant"
    )
    torch.manual_seed(0)
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=arguments.get("strategy", "fsdp2"),
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=optimizer_config,
        checkpoint_config=CheckpointConfig(save_contents=arguments.get("save_contents", SAVED)),
    )
    engine.initialize()
    return engine


def policy_loss(name: str):
    """verl's ppo_loss with the named policy loss, as ``ActorRolloutRefWorker`` builds it."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=name),
        loss_agg_mode="seq-mean-token-mean",
        clip_ratio=0.2,
    )
    return partial(ppo_loss, config=config)


def train(engine, batch, loss, steps: int, ranks: int) -> list[dict]:
    """Steps of ``train_batch``; the loss is summed over micro-batches and averaged over ranks, as verl reports it."""
    seen = []
    for _ in range(steps):
        with engine.train_mode():
            output = engine.train_batch(batch.clone(), loss)
        engine.lr_scheduler_step()
        value = torch.tensor(sum(output["loss"]), dtype=torch.float64)
        torch.distributed.all_reduce(value)
        grad_norm = output["metrics"].pop("grad_norm", None)  # on the first rank of a sequence group only
        ours = {
            key: seen_values[0]
            for key, seen_values in output["metrics"].items()
            if key.startswith(("lr_", "grad_norm_", "update_norm_"))
        }
        seen.append({"loss": value.item() / ranks, "grad_norm": grad_norm, **ours})
    return seen


def whole(parameter) -> torch.Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().float().cpu().clone()


def weights_of(engine) -> dict[str, torch.Tensor]:
    """All parameters, whole, by their names in the PEFT model; a tied weight once."""
    tied = engine.model_config.hf_config.tie_word_embeddings
    state = engine.module.state_dict()
    return {name: whole(tensor) for name, tensor in state.items() if not (tied and name.endswith("lm_head.weight"))}


def synced(engine) -> tuple[dict[str, torch.Tensor], dict | None, list[dict]]:
    """One weight sync as any rank sends it: its tensors, the adapter's configuration, and its header."""
    from dataclasses import asdict

    stream, peft_config = engine.get_per_tensor_param(base_sync_done=True)
    tensors = {name: tensor.clone() for name, tensor in stream if not name.startswith("hybrid_lora.sync.")}
    return tensors, peft_config, [asdict(stream.header)]


def refused_resumes(engine, checkpoint: str, other_allocation: str) -> dict[str, str]:
    """What the engine says when a run resumes under another allocation, another alpha, or on another base model."""
    from hybrid_lora_plugin import load_allocation
    from hybrid_lora_plugin.errors import ConfigurationError

    def message() -> str:
        try:
            engine.load_checkpoint(checkpoint, del_local_after_load=False)
        except ConfigurationError as error:
            return str(error)
        return "accepted"

    said, own = {}, (engine.allocation, engine.model_config)
    engine.allocation = load_allocation(other_allocation)
    said["allocation"] = message()
    engine.allocation, engine.model_config = own[0], copy.copy(own[1])
    object.__setattr__(engine.model_config, "lora_alpha", 64)
    said["alpha"] = message()
    engine.model_config = own[1]
    frozen = [p for n, p in engine.module.named_parameters() if not p.requires_grad and (".layers.1." in n)]
    with torch.no_grad():
        # The last one: under FSDP1 the layer's one flat parameter, under FSDP2 a norm.
        local = frozen[-1].to_local() if hasattr(frozen[-1], "to_local") else frozen[-1]
        local.add_(1e-3)
    said["base model"] = message()
    said["nothing wrong"] = message()
    return said


def said_at_resumes(engine, checkpoint: str, folder: Path) -> dict[str, list[str]]:
    """What the engine says when a run resumes that rounds rollout weights otherwise, and when it does not."""
    from hybrid_lora_plugin.errors import ConfigurationError

    def lines(of: str) -> list[str]:
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                engine.load_checkpoint(of, del_local_after_load=False)
        except ConfigurationError as error:
            return [f"refused: {error}"]
        return [line for line in said.getvalue().splitlines() if "hybrid_lora" in line]

    said = {"float32": lines(checkpoint)}
    engine.hybrid.sync_seed = 7
    said["float32, another seed"] = lines(checkpoint)
    engine.hybrid.sync_seed = 0
    engine.model_config.lora["rollout_dtype"] = "bfloat16"
    said["bfloat16 after float32"] = lines(checkpoint)
    own = str(folder / "bfloat16")
    engine.save_checkpoint(own, global_step=4)
    said["bfloat16"] = lines(own)
    engine.hybrid.sync_seed = 7
    said["bfloat16, another seed"] = lines(own)
    engine.hybrid.sync_rounding = "nearest"
    said["bfloat16, another rounding"] = lines(own)
    return said


def main(path: str) -> None:
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    arguments = json.loads(Path(path).read_text())
    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(1)
    if arguments.get("import_engine_registration"):
        import hybrid_lora_plugin.verl_backend.engine_registration  # noqa: F401
    elif not arguments.get("allocation"):
        from hybrid_lora_plugin.verl_backend.cpu import platform  # noqa: F401  a plain run still needs its platform
    out = Path(arguments["out"])
    arguments["save_contents"] = [*SAVED, "hf_model"]
    engine = build_engine(arguments)
    loss = policy_loss(arguments.get("loss", "hybrid_gspo"))
    batch = share_of(make_batch(arguments.get("micro_batch", 2)), rank, ranks)
    results = {"engine": f"{type(engine).__module__}.{type(engine).__name__}"}
    tensors = {"start": weights_of(engine)}

    if arguments.get("allocation"):
        from hybrid_lora_plugin.training.apply import parts_of

        dtypes = {name: str(tensor.dtype) for name, tensor in engine.module.state_dict().items()}
        results["trainable"] = {name: dtypes[name] for name in sorted(parts_of(engine.module).trained)}
        results["actor_before"] = gather_log_probs(engine, batch, ranks, reference=False)
    results["steps"] = train(engine, batch, loss, arguments.get("steps", 3), ranks)
    tensors["trained"] = weights_of(engine)

    if arguments.get("allocation"):
        results["actor_after"] = gather_log_probs(engine, batch, ranks, reference=False)
        results["reference_after"] = gather_log_probs(engine, batch, ranks, reference=True)
        results["actor_again"] = gather_log_probs(engine, batch, ranks, reference=False)
        try:
            with engine.eval_mode(), engine.disable_adapter():
                raise ZeroDivisionError
        except ZeroDivisionError:
            results["actor_after_error"] = gather_log_probs(engine, batch, ranks, reference=False)
        tensors["synced"], results["peft_config"], results["headers"] = synced(engine)
        for mode in ("adapter", "receiver_merge"):
            engine.hybrid.sync = mode
            tensors[f"synced_{mode}"], _, headers = synced(engine)
            results["headers"] += headers
        engine.hybrid.sync_check = "logprobs"
        results["headers"] += synced(engine)[2]
        engine.hybrid.sync, engine.hybrid.sync_check = "merge", "digest"

        checkpoint = out / "checkpoint"
        engine.save_checkpoint(str(checkpoint), global_step=3)
        results["steps_on"] = train(engine, batch, loss, 2, ranks)
        tensors["trained_on"] = weights_of(engine)
        engine = build_engine(arguments)
        engine.load_checkpoint(str(checkpoint), del_local_after_load=False)
        results["reference_resumed"] = gather_log_probs(engine, batch, ranks, reference=True)
        results["steps_resumed"] = train(engine, batch, loss, 2, ranks)
        tensors["resumed"] = weights_of(engine)
        results["refused"] = refused_resumes(engine, str(checkpoint), arguments["other_allocation"])
        results["said"] = said_at_resumes(engine, str(checkpoint), out)

    if rank == 0:
        for name, group in tensors.items():
            save_file({key: value.contiguous() for key, value in group.items()}, out / f"{name}.safetensors")
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
