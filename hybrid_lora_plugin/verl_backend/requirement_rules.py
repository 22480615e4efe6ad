"""Which settings of verl Hybrid-LoRA can run with, as a table; ``requirements`` checks them.

One table holds for every run, others for those that build on an earlier sync, send a part, or let vLLM run adapters.
Names of settings are those of a reinforcement learning run; ``run_kinds`` says where another kind of run has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hybrid_lora_plugin.verl_backend.run_kinds import ACTOR, MODEL, ROLLOUT

#: policy losses of which ``surrogate`` knows the surrogate without clipping
SURROGATES = ("vanilla", "gspo", "hybrid_gspo")


def _is_fp32(value: Any) -> bool:
    return value is None or str(value).removeprefix("torch.") in ("fp32", "float32", "float")


class Rule(NamedTuple):
    """What a setting must be."""

    #: whether a value is usable
    usable: Callable[[Any], bool]
    #: usable values in words
    wanted: str
    #: entry of the troubleshooting page
    see: str


#: by setting; one that a caller does not know is not checked
RULES: dict[str, Rule] = {
    # What the run trains with, before the strategy: a file of another engine may say fsdp2 there.
    "model_engine": Rule(
        lambda v: v in (None, "dp"),
        "dp, verl's FSDP, and leave out what belongs to the other engine: in a file of yours "
        "`defaults: [ppo_trainer, _self_]`, on the command line model_engine=dp and no --config-name of that engine",
        see="strategy-not-supported",
    ),
    ACTOR + "_target_": Rule(
        lambda v: v is None or str(v).rpartition(".")[2] == "FSDPActorConfig",
        "verl.workers.config.FSDPActorConfig, verl's FSDP actor, which model_engine=dp chooses",
        see="strategy-not-supported",
    ),
    ACTOR + "strategy": Rule(
        lambda v: v in ("fsdp", "fsdp2"),
        "fsdp2 or fsdp, the strategies this version supports: leave it out or give "
        "actor_rollout_ref.actor.strategy=fsdp2",
        see="strategy-not-supported",
    ),
    "trainer.device": Rule(
        lambda v: v in (None, "cuda", "cpu"),
        "cuda: neither training nor a weight sync was tried on another device",
        see="device-not-supported",
    ),
    "actor_rollout_ref.ref.model": Rule(
        lambda v: not v,
        "null: the reference policy is the model that training starts from, actor_rollout_ref.model.path",
        see="reference-is-the-base-model",
    ),
    # None: not given, which verl itself refuses.
    ROLLOUT + "name": Rule(
        lambda v: v in (None, "vllm"),
        "vllm, the rollout engine this version supports",
        see="rollout-not-supported",
    ),
    # Read in verl 0.9.1: mooncake and kimi cast every tensor to one dtype, kimi also loses their order.
    ROLLOUT + "checkpoint_engine.backend": Rule(
        lambda v: not str(v).startswith("delta") and v not in ("mooncake", "kimi_ckpt_engine"),
        "one that carries named tensors as they are, naive, nccl, nixl or hccl, with any hybrid_lora.sync: this one "
        "changes or splits them",
        see="checkpoint-engine-changes-tensors",
    ),
    ROLLOUT + "disaggregation.enabled": Rule(
        lambda v: not v,
        "false: engines split into prefill and decode are not supported by any sync mode",
        see="rollout-not-supported",
    ),
    ROLLOUT + "quantization": Rule(
        lambda v: v is None,
        "null: quantized weights cannot be compared with the trainer's, so no sync could be proven",
        see="rollout-not-supported",
    ),
    ROLLOUT + "data_parallel_size": Rule(
        lambda v: v in (None, 1),
        "1: vLLM answers for one of several data-parallel engines only; more replicas do the same work",
        see="rollout-not-supported",
    ),
    # Of verl's fully asynchronous trainer.
    **{
        f"async_training.{name}": Rule(
            lambda v: not v,
            "false: rollout engines beside the trainer and apart from it in one run of this trainer were not tried",
            see="rollout-not-supported",
        )
        for name in ("use_trainer_do_validate", "use_dynamic_resource_scheduling")
    },
    **{
        name: Rule(
            lambda v: not v,
            "false: verl's FSDP trains no drafting head, and its weights are not part of a sync",
            see="rollout-not-supported",
        )
        for name in (MODEL + "mtp.enable", ROLLOUT + "mtp.enable_rollout")
    },
    MODEL + "lora_rank": Rule(
        lambda v: isinstance(v, int) and v > 0,
        "a LoRA rank of at least 1, e.g. 16",
        see="lora-setting-of-verl-not-usable",
    ),
    MODEL + "lora_alpha": Rule(
        lambda v: v > 0,
        "a LoRA alpha above 0, e.g. 32",
        see="lora-setting-of-verl-not-usable",
    ),
    MODEL + "lora.merge": Rule(
        lambda v: isinstance(v, bool),
        "leave it as +hybrid_lora=enabled sets it: it follows from hybrid_lora.sync",
        see="set-by-the-plugin",
    ),
    MODEL + "lora.hybrid": Rule(
        lambda v: isinstance(v, Mapping) and bool(v),
        "leave it as +hybrid_lora=enabled sets it: without it workers train plain LoRA",
        see="set-by-the-plugin",
    ),
    MODEL + "lora.rollout_dtype": Rule(
        lambda v: v in ("bfloat16", "bf16", "float16", "fp16", "float32", "fp32"),
        "a type for merged weights: actor_rollout_ref.rollout.dtype=bfloat16, float16 or float32",
        see="type-of-weights-not-supported",
    ),
    MODEL + "lora_adapter_path": Rule(
        lambda v: v is None,
        "null: training starts from the base model",
        see="lora-setting-of-verl-not-usable",
    ),
    MODEL + "target_modules": Rule(
        lambda v: v == "all-linear",
        "all-linear: the allocation decides which modules get LoRA",
        see="lora-setting-of-verl-not-usable",
    ),
    **{
        MODEL + name: Rule(
            lambda v: not v,
            "null: the allocation decides which modules get LoRA, so it would have no effect",
            see="lora-setting-of-verl-not-usable",
        )
        for name in ("exclude_modules", "target_parameters")
    },
    ACTOR + "fsdp_config.model_dtype": Rule(
        _is_fp32,
        "fp32, the type of what trains: in bfloat16 a step of 1e-6 leaves 98 % of the fully tuned weights unchanged "
        "(frozen weights have hybrid_lora.frozen_dtype)",
        see="type-of-weights-not-supported",
    ),
    ACTOR + "fsdp_config.mixed_precision.param_dtype": Rule(
        lambda v: str(v) not in ("fp16", "float16", "half"),
        "bf16 or fp32: float16 is not supported here",
        see="type-of-weights-not-supported",
    ),
    **{
        ACTOR + name: Rule(
            lambda v: not v,
            "false: quantization-aware training is not supported here",
            see="type-of-weights-not-supported",
        )
        for name in ("fsdp_config.qat.enable", "qat.enable")
    },
    # Read in verl 0.9.1: the manager of FSDP's checkpoints does not use it, so nothing would ever be there.
    "trainer.default_hdfs_dir": Rule(
        lambda v: v is None,
        "null: verl copies no FSDP checkpoint there, nor is one resumed from there; save to "
        "trainer.default_local_dir and copy in a trainer.checkpoint_callback_class of your own",
        see="checkpoint-place-not-usable",
    ),
    **{
        name: Rule(
            lambda v: "://" not in str(v),
            "a folder of a file system: each rank saves its shard and resumes from it there",
            see="checkpoint-place-not-usable",
        )
        for name in ("trainer.default_local_dir", "trainer.resume_from_path", "hybrid_lora.output_dir")
    },
    ACTOR + "checkpoint.save_lora_only": Rule(
        lambda v: not v,
        "false: it would drop the fully tuned weights",
        see="lora-setting-of-verl-not-usable",
    ),
}


#: in place of those above in SFT
SFT_RULES: dict[str, Rule] = {
    ACTOR + "_target_": Rule(
        lambda v: v is None or str(v).rpartition(".")[2] == "FSDPEngineConfig",
        "verl.workers.config.FSDPEngineConfig, verl's FSDP: engine=fsdp optim=fsdp, the defaults",
        see="strategy-not-supported",
    ),
}
RECEIVER_MERGE_RULES: dict[str, Rule] = {
    ROLLOUT + "full_determinism": Rule(
        lambda v: not v,
        "false, or hybrid_lora.sync=merge: it replaces the rollout engine's matrix product, and merged weights would "
        "not be the trainer's bit for bit",
        see="setting-does-not-fit-the-sync-mode",
    ),
}
#: the same, for sync modes that leave weights to the rollout engine; with the mode that needs none of it
PARTIAL_RULES: dict[str, Rule] = {
    ROLLOUT + "load_format": Rule(
        lambda v: v in (None, "auto", "safetensors"),
        "safetensors: the rollout engine must start from the checkpoint's weights, or hybrid_lora.sync=merge",
        see="setting-does-not-fit-the-sync-mode",
    ),
}
#: the same, for sync modes that send what changed since an earlier sync
BUILDING_RULES: dict[str, Rule] = {
    MODEL + "lora.rollout_dtype": Rule(
        lambda v: not _is_fp32(v),
        "actor_rollout_ref.rollout.dtype=bfloat16 or float16, or hybrid_lora.sync=merge: in float32 nearly every "
        "weight changes at every step",
        see="setting-does-not-fit-the-sync-mode",
    ),
}
ADAPTER_RULES: dict[str, Rule] = {
    MODEL + "lora.fully_sharded_loras": Rule(
        lambda v: not v,
        "false: a fully sharded adapter cannot be read back here, or hybrid_lora.sync=receiver_merge",
        see="setting-does-not-fit-the-sync-mode",
    ),
    MODEL + "lora_rank": Rule(
        lambda v: v <= 512,
        "at most 512, the largest rank of vLLM's adapters, or hybrid_lora.sync=receiver_merge",
        see="setting-does-not-fit-the-sync-mode",
    ),
}
#: of a run in which frozen weights move without a gradient
ZEROTH_ORDER_RULES: dict[str, Rule] = {
    ACTOR + "strategy": Rule(
        lambda v: v == "fsdp2",
        "fsdp2: FSDP1 hides which rows of a weight a rank holds",
        see="zeroth-order-not-possible",
    ),
    "hybrid_lora.sync": Rule(
        lambda v: v == "merge",
        "merge: the other modes leave frozen weights in the rollout engine as they were",
        see="zeroth-order-not-possible",
    ),
    "hybrid_lora.lora.dropout": Rule(
        lambda v: not v,
        "0.0: slopes are measured without dropout, so they would be those of another loss",
        see="zeroth-order-not-possible",
    ),
    # None: not given, as verl's default.
    ACTOR + "policy_loss.loss_mode": Rule(
        lambda v: v in (None, *SURROGATES),
        f"one of {', '.join(SURROGATES)}, whose surrogate without clipping is known here",
        see="zeroth-order-not-possible",
    ),
    "distillation.enabled": Rule(
        lambda v: not v,
        "false: the surrogate of a distillation is not known here",
        see="zeroth-order-not-possible",
    ),
}
