"""``sync_check=logprobs``: the trainer's log-probabilities of fixed prompts, for the rollout engine to compare."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from verl.utils.torch_dtypes import PrecisionType

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.verl_backend.fixed_prompts import fixed_prompts
from hybrid_lora_plugin.verl_backend.row_log_probs import row_log_probs

#: largest difference of a log-probability between two engines with the same weights, by the type that they compute in;
#: of two types the coarser one's
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1.0, torch.float16: 0.2}


class TrainerLogProbs:
    """The fixed prompts under a verl engine's weights: those of the base model once, the present ones at every sync.

    Args:
        engine: a ``HybridLoraEngine``.
    """

    def __init__(self, engine):
        self._engine = engine
        self._tokens = fixed_prompts(engine.model_config.tokenizer, engine.hybrid.sync_texts)
        self._base: list[list[float]] | None = None

    def for_header(self, hybrid: HybridLoraConfig, dtype: torch.dtype) -> dict[str, Any]:
        """What the next sync takes along, as ``SyncHeader.fixed_prompt``.

        With shards a forward pass is a collective: every rank must call this.

        Args:
            hybrid: gives the limits.
            dtype: what the rollout engine computes in.
        """
        if self._base is None:
            self._base = self._log_probs(base=True)
        # As verl reads it.
        mixed = self._engine.engine_config.mixed_precision or {}
        computes_in = PrecisionType.to_dtype(mixed.get("param_dtype", "bf16"))
        return header_entry(self._tokens, self._base, self._log_probs(base=False), computes_in, hybrid, dtype)

    def _log_probs(self, base: bool) -> list[list[float]]:
        """Of every token but the first of each prompt, the same on all ranks."""
        engine = self._engine
        with engine.eval_mode(), engine.disable_adapter() if base else nullcontext():
            # All at once: with shards every micro-batch gathers the model again.
            return row_log_probs(engine, self._tokens, packed=bool(engine.model_config.use_remove_padding))


def header_entry(
    tokens: list[list[int]],
    base: list[list[float]],
    present: list[list[float]],
    computes_in: torch.dtype,
    hybrid: HybridLoraConfig,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """``SyncHeader.fixed_prompt`` of one sync.

    Args:
        tokens: of each prompt.
        base, present: log-probability of every token but the first of each, nats.
        computes_in: type of the trainer's activations.
        hybrid: gives the limits.
        dtype: what the rollout engine computes in.
    """
    limit = max(LIMITS[dtype], LIMITS[computes_in]) if hybrid.sync_logprob_limit is None else hybrid.sync_logprob_limit
    return {
        "tokens": tokens,
        "base_log_probs": base,
        "log_probs": present,
        "trainer_rounds": computes_in != torch.float32,
        "rounding": hybrid.sync_rounding,
        "limit": limit,
        "policy_limit": hybrid.sync_policy_limit,
    }
