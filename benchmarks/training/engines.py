"""verl's engine in each variant of a comparison: full fine-tuning, LoRA, PEFT's ``modules_to_save``, and ours."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: variant -> what the tables call it
VARIANTS = {
    "full": "verl, full fine-tuning",
    "lora": "verl, LoRA on all linear modules",
    "modules_to_save": "PEFT, LoRA and `modules_to_save`",
    "hybrid": "Hybrid-LoRA",
}
RANK, ALPHA = 16, 32


def _configurations(model: str, lora: dict[str, Any], precision: str, strategy: str, checkpointing: bool):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    return dict(
        model_config=HFModelConfig(
            path=model,
            use_remove_padding=False,
            enable_gradient_checkpointing=checkpointing,
            override_config={"attn_implementation": "sdpa"},
            **lora,
        ),
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            use_torch_compile=False,
            forward_only=False,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1000, lr_warmup_steps=0, weight_decay=0.01),
        checkpoint_config=CheckpointConfig(),
    )


def build_engine(
    variant: str,
    model: str,
    allocation: str,
    *,
    precision: str,
    strategy: str = "fsdp2",
    checkpointing=False,
    options: dict[str, Any] | None = None,
):
    """The engine that verl's registry gives for a variant, initialised.

    Args:
        variant: of ``VARIANTS``.
        model, allocation: folders.
        precision: ``param_dtype`` of verl's mixed precision, "fp32" or "bf16".
        strategy: fsdp or fsdp2.
        checkpointing: of activations.
        options: more of ``hybrid_lora`` for the variant "hybrid".
    """
    from verl.workers.engine import EngineRegistry

    from hybrid_lora_plugin.verl_backend import engine_registration

    settings: dict[str, Any] = {}
    if variant in ("lora", "modules_to_save", "hybrid"):
        settings = {"lora_rank": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    if variant == "hybrid":
        settings["external_lib"] = engine_registration.__name__
        settings["lora"] = {
            "merge": True,
            "rollout_dtype": "bfloat16",
            "hybrid": {
                "allocation": allocation,
                "full_lr": 1e-6,
                "lora": {"rank": RANK, "alpha": ALPHA, "lr": 2.5e-5},
                **(options or {}),
            },
        }
    configurations = _configurations(model, settings, precision, strategy, checkpointing)
    torch.manual_seed(0)
    if variant == "modules_to_save":
        engine = _modules_to_save_engine(allocation)(**configurations)
    else:
        engine = EngineRegistry.new(model_type="language_model", backend=strategy, **configurations)
    engine.initialize()
    return engine


def _modules_to_save_engine(allocation: str):
    """verl's engine with an adapter as PEFT's own documentation would make it for this allocation."""
    from peft import LoraConfig, TaskType, get_peft_model
    from verl.workers.engine import FSDPEngineWithLMHead

    from hybrid_lora_plugin.allocation import load_allocation

    decided = load_allocation(allocation)

    class ModulesToSaveEngine(FSDPEngineWithLMHead):
        def _build_lora_module(self, module):
            module.enable_input_require_grads()
            config = LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=RANK,
                lora_alpha=ALPHA,
                target_modules=sorted(decided.lora_names),
                modules_to_save=sorted(decided.full_names),
            )
            return get_peft_model(module, config)

    return ModulesToSaveEngine


def make_batch(rows: int, micro_batches: int, tokens: int, vocabulary: int, rank: int, ranks: int):
    """This rank's micro-batches of rows in verl's nested layout: half of each row is the prompt."""
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(0)
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    number = rows * micro_batches * ranks
    whole = torch.randint(4, vocabulary, (number, tokens), generator=generator).unbind()
    half = tokens // 2
    ones = [torch.ones(tokens - half, dtype=torch.int64) for _ in whole]
    batch = tu.get_tensordict(
        {
            "prompts": nested([row[:half] for row in whole]),
            "responses": nested([row[half:] for row in whole]),
            "input_ids": nested(list(whole)),
            "position_ids": nested([torch.arange(tokens) for _ in whole]),
            "response_mask": nested(ones),
            "loss_mask": nested(ones),
            "old_log_probs": nested([torch.full((tokens - half,), -10.0) for _ in whole]),
            "advantages": nested([torch.full((tokens - half,), 1.0 - 2.0 * (i % 2)) for i in range(number)]),
        },
        non_tensor_dict=dict(
            temperature=1.0,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=rows,
            use_remove_padding=False,
            use_fused_kernels=False,
            global_batch_size=number,
            calculate_entropy=False,
        ),
    )
    return tu.chunk_tensordict(batch, ranks)[rank]


def policy_loss():
    """verl's PPO loss with GSPO, as the actor worker builds it."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode="gspo"),
        loss_agg_mode="seq-mean-token-mean",
        clip_ratio=0.2,
    )
    return partial(ppo_loss, config=config)


def update(engine, batch, loss) -> dict[str, Any]:
    """One actor update: forward, backward, clip, optimizer; returns its metrics."""
    from verl.utils.device import get_device_id

    with engine.train_mode():
        outputs = engine.train_batch(batch.clone().to(get_device_id()), loss)
    engine.lr_scheduler_step()
    return outputs["metrics"]


def log_probs(engine, batch, reference: bool) -> None:
    """Log-probabilities of the responses, from the actor or from its reference policy."""
    from verl.utils.device import get_device_id

    with engine.eval_mode(), engine.disable_adapter() if reference else nullcontext():
        engine.infer_batch(batch.clone().to(get_device_id()), loss_function=None)


def held_bytes(engine, batch, loss) -> dict[str, int]:
    """Bytes that this rank holds in an update, before its gradients go, counted from the tensors themselves."""
    from hybrid_lora_plugin.training.dtensor import local_tensor

    parameters, gradients = list(engine.module.parameters()), []

    def look(*_) -> None:
        gradients.append(sum(local_tensor(p.grad).nbytes for p in parameters if p.grad is not None))

    hook = engine.optimizer.register_step_pre_hook(look)
    update(engine, batch, loss)
    hook.remove()
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    snapshot = getattr(engine, "_base_snapshot", None)
    return {
        "parameters": sum(local_tensor(p).nbytes for p in parameters),
        "gradients": gradients[0],
        "optimizer": sum(local_tensor(v).nbytes for v in states if torch.is_tensor(v) and v.dim()),
        "reference": 0 if snapshot is None else snapshot.bytes,
    }


def units_per_layer(engine) -> float:
    """FSDP units of a decoder layer, on the average."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    names = [n for n, m in engine.module.named_modules() if isinstance(m, FSDPModule | FullyShardedDataParallel)]
    return sum(".layers." in name for name in names) / engine.model_config.hf_config.num_hidden_layers


@contextmanager
def counted_collectives():
    """Counts what is passed through torch.distributed meanwhile, by kind."""
    counts: dict[str, int] = {}

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            kind = str(function.overloadpacket).partition(".")[2]
            if function.namespace in ("c10d", "_c10d_functional") and kind != "wait_tensor":
                counts[kind] = counts.get(kind, 0) + 1
            return function(*arguments, **(options or {}))

    with Collectives():
        yield counts
