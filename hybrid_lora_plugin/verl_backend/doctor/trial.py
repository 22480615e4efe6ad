"""The look ``run``: a tiny model through verl's real engine, and its weights through verl's real transport into a real
vLLM, in every sync mode, in this one process and without Ray.

The rollout server is not started: it is a Ray actor, and what it needs is looked up by ``source`` and ``import`` only.
"""

from __future__ import annotations

import asyncio
import json
import os
import string
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybrid_lora_plugin.sync.modes import SYNC_MODES, sync_mode

#: LoRA rank and alpha of the tiny model; vLLM takes no smaller rank than 8
RANK, ALPHA = 8, 16
#: what weights are sent and held in
DTYPE = "bfloat16"


class Progress:
    """What has been tried, and how it went; written by ``keep`` at every step."""

    def __init__(self, keep: Callable[..., None]):
        self._keep = keep
        self._tried: list[str] = []
        self._failed: dict[str, str] = {}

    @contextmanager
    def trying(self, *features: str) -> Iterator[None]:
        """Count ``features`` as tried, and as failed where the body raises; it goes on behind either way."""
        self._keep(trying=features)
        try:
            yield
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
            self._failed |= {feature: self._failed.get(feature, said) for feature in features}
        self._tried += [feature for feature in features if feature not in self._tried]
        self._keep(tried=self._tried, failed=self._failed, trying=[])

    def works(self, *features: str) -> bool:
        """Whether all of them were tried and none failed."""
        return all(feature in self._tried and feature not in self._failed for feature in features)


def trial(keep: Callable[..., None]) -> None:
    """Try everything; ``keep`` is given ``tried``, ``failed`` and ``trying`` as in ``child.look``."""
    progress, cpu = Progress(keep), ("cpu",) if not torch.cuda.is_available() else ()
    # The socket of a sync is named after these, and another trial may run on this machine.
    os.environ |= {"VERL_RAY_JOB_ID": f"doctor-{os.getpid()}", "VERL_REPLICA_RANK": "0"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="hybrid-lora-doctor-") as text:
        folder = Path(text)
        with progress.trying("registration", "engine", *cpu):
            model = tiny_model(folder / "model")
            engine = _engine(model, tiny_allocation(model, folder / "allocation"))
        if not progress.works("engine"):
            return
        with progress.trying("engine", "loss", *cpu):
            _train(engine)
        with progress.trying("checkpoint"):
            engine.save_checkpoint(str(folder / "checkpoint"), global_step=1)
            engine.load_checkpoint(str(folder / "checkpoint"), del_local_after_load=False)
        rollout = None
        with progress.trying("adapter", *cpu):
            rollout = _rollout(model, enable_lora=True, max_lora_rank=RANK)
        if rollout is None:
            # The other modes need no adapter in the engine.
            with progress.trying(*(mode for mode in SYNC_MODES if mode != "adapter")):
                rollout = _rollout(model)
        if rollout is None:
            return
        for mode in SYNC_MODES:
            if mode != "adapter" or progress.works("adapter"):
                with progress.trying(mode):
                    asyncio.run(_sync(engine, rollout, mode))


def tiny_model(folder: Path) -> Path:
    """A Qwen2 of two layers with random weights, and a tokenizer of characters."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    folder.mkdir()
    tokens = ["<pad>", "<unk>", "<end>", *string.printable]
    words = {
        "type": "WordLevel",
        "vocab": {token: number for number, token in enumerate(dict.fromkeys(tokens))},
        "unk_token": "<unk>",
    }
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": split,
        "decoder": {"type": "Fuse"},
        "model": words,
    }
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def tiny_allocation(model: Path, folder: Path) -> Path:
    """An allocation that was drawn, not probed."""
    from transformers import AutoConfig

    from hybrid_lora_plugin.allocation.select import select_modules
    from hybrid_lora_plugin.candidates import find_candidates, meta_model
    from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig
    from hybrid_lora_plugin.probing.loading import parameter_count
    from hybrid_lora_plugin.probing.provenance import environment, model_identity
    from hybrid_lora_plugin.report.artifact import save_allocation

    plain = meta_model(AutoConfig.from_pretrained(model))
    candidates = find_candidates(plain)
    identity = model_identity(str(model), plain, candidates, parameter_count(plain))
    settings = AllocateCommandConfig(criterion="random", budget=BudgetConfig(ratio=0.3))
    allocation = select_modules(
        settings, identity, candidates, {}, lora_rank=RANK, probe=None, environment=environment()
    )
    return save_allocation(folder, allocation, {})


def _engine(model: Path, allocation: Path) -> Any:
    """The engine that verl's registry gives for the model, on one rank."""
    from verl.trainer.config import CheckpointConfig
    from verl.utils.distributed import initialize_global_process_group
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    initialize_global_process_group()
    hybrid = {"allocation": str(allocation), "full_lr": 1e-3, "lora": {"rank": RANK, "alpha": ALPHA, "lr": 1e-2}}
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=str(model),
            lora_rank=RANK,
            lora_alpha=ALPHA,
            external_lib="hybrid_lora_plugin.verl_backend.engine_registration",
            lora={"merge": True, "rollout_dtype": DTYPE, "hybrid": hybrid},
            use_remove_padding=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", fsdp_size=-1, model_dtype="fp32", use_torch_compile=False, forward_only=False
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=2),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def _train(engine: Any) -> None:
    """One step on four drawn answers, with the loss ``hybrid_gspo``; RuntimeError where nothing moves."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    rows, prompt, answer = 4, 3, 5
    generator = torch.Generator().manual_seed(0)
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    whole = [torch.randint(3, 90, (prompt + answer,), generator=generator) for _ in range(rows)]
    ones = [torch.ones(answer, dtype=torch.int64) for _ in range(rows)]
    batch = tu.get_tensordict(
        {
            "prompts": nested([row[:prompt] for row in whole]),
            "responses": nested([row[prompt:] for row in whole]),
            "input_ids": nested(whole),
            "position_ids": nested([torch.arange(len(row)) for row in whole]),
            "response_mask": nested(ones),
            "loss_mask": nested(ones),
            "old_log_probs": nested([torch.full((answer,), -4.5) for _ in range(rows)]),
            "advantages": nested([torch.full((answer,), float(2 * (row % 2) - 1)) for row in range(rows)]),
        },
        non_tensor_dict=dict(
            temperature=1.0,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=rows,
            use_remove_padding=False,
            use_fused_kernels=False,
            global_batch_size=rows,
            calculate_entropy=False,
        ),
    )
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode="hybrid_gspo"),
        loss_agg_mode="seq-mean-token-mean",
        clip_ratio=0.2,
    )
    with engine.train_mode():
        metrics = engine.train_batch(batch, partial(ppo_loss, config=config))["metrics"]
    still = [kind for kind in ("lora", "full") if not metrics[f"update_norm_{kind}"][0] > 0]
    if still:
        raise RuntimeError(f"a step moved no weight of {' and none of '.join(still)}")


def _rollout(model: Path, **options: Any) -> Any:
    """vLLM in this process, with our worker extension."""
    from vllm import LLM

    from hybrid_lora_plugin.verl_backend.receiver.worker import HybridLoraWorkerExtension as Extension

    memory = {"gpu_memory_utilization": 0.2} if torch.cuda.is_available() else {}
    return LLM(
        str(model),
        dtype=DTYPE,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        worker_extension_cls=f"{Extension.__module__}.{Extension.__qualname__}",
        **memory,
        **options,
    )


async def _sync(engine: Any, rollout: Any, mode: str) -> None:
    """One weight sync up to its proof, as ``HybridLoraServerAdapter`` sends it; WeightSyncError where it fails."""
    from verl.utils.device import is_support_ipc

    from hybrid_lora_plugin.verl_backend.sender.server_adapter import HybridLoraServerAdapter, PassingWeights
    from hybrid_lora_plugin.verl_backend.sender.waits import Limits
    from hybrid_lora_plugin.verl_backend.transport import LimitedSender, address_of_run

    engine.hybrid.sync, limit, step = mode, 60.0, 1
    weights, _ = engine.get_per_tensor_param(base_sync_done=True)
    weights.step = step
    passing = PassingWeights(weights, Limits(limit, limit, "hybrid_lora.sync_timeout"))
    header = await passing.begin()
    (handle,) = rollout.collective_rpc("_get_zmq_handle")
    shared = not is_support_ipc()
    receive = partial(
        rollout.collective_rpc,
        "receive_hybrid_weights",
        kwargs={"run": header.run, "number": header.number, "step": step, "use_shm": shared, "limit": limit},
    )
    sender = LimitedSender(address_of_run(handle, header.run), 16, shared, limit=limit)
    with ThreadPoolExecutor(1) as thread:
        receiving = thread.submit(receive)
        await sender.async_send_weights(passing)
        reports = receiving.result()
    HybridLoraServerAdapter._compare(passing, sender.answer, step)
    sync_mode(mode).check_reports(header, passing.account, reports)
