"""``sync_check=logprobs``: the trainer's log-probabilities of a fixed prompt, for the rollout engine to reproduce."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hybrid_lora_plugin.config import HybridLoraConfig

#: Any text would do; it only has to stay the same.
TEXT = "To add 27 and 58, add the tens and the ones: 20 + 50 = 70 and 7 + 8 = 15, so the sum is 85."
LENGTH = 32

#: largest difference of a log-probability between two engines with the same weights, by rollout dtype
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}


def fixed_prompt(engine, hybrid: HybridLoraConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fixed prompt under the trainer's present weights.

    With shards the forward pass is a collective: every rank must call this.

    Args:
        engine: a verl engine with a language model head.
        hybrid: gives ``sync_logprob_limit``.
        dtype: what the rollout engine computes in.

    Returns:
        ``tokens``, ``log_probs`` of every token but the first, and ``limit``, for ``SyncHeader.fixed_prompt``.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    tokens = engine.model_config.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:LENGTH]
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    prompt, response = torch.tensor(tokens[:1]), torch.tensor(tokens[1:])
    batch = tu.get_tensordict(
        {
            "prompts": nested([prompt]),
            "responses": nested([response]),
            "input_ids": nested([torch.tensor(tokens)]),
            "position_ids": nested([torch.arange(len(tokens))]),
            "response_mask": nested([torch.ones(len(response), dtype=torch.int64)]),
            "loss_mask": nested([torch.ones(len(response), dtype=torch.int64)]),
        },
        non_tensor_dict=dict(
            temperature=1.0,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=1,
            use_remove_padding=bool(engine.engine_config.use_remove_padding),
            use_fused_kernels=bool(engine.engine_config.use_fused_kernels),
            global_batch_size=1,
            calculate_entropy=False,
        ),
    )
    with engine.eval_mode():
        output = engine.infer_batch(batch, loss_function=None)
    answer: list[dict[str, Any]] = [{}]
    if "model_output" in output:  # with sequence parallelism only one rank of a group has the outputs
        log_probs = no_padding_2_padding(output["model_output"]["log_probs"], batch)[0, : len(response)]
        answer[0] = {
            "tokens": tokens,
            "log_probs": log_probs.float().tolist(),
            "limit": LIMITS[dtype] if hybrid.sync_logprob_limit is None else hybrid.sync_logprob_limit,
        }
    if torch.distributed.is_initialized():
        # One text on all ranks: verl's relays derive the layout of a bucket from their own stream.
        torch.distributed.broadcast_object_list(answer)
    return answer[0]
