"""Policy loss ``hybrid_gspo``: Group Sequence Policy Optimization, always averaged over sequences.

Source: Zheng et al. 2025 (arXiv 2507.18071) Eq. 5–7; clip range ±0.2 in the Hybrid-LoRA paper (§4.3). verl's
own ``gspo`` averages over tokens unless the user also sets ``loss_agg_mode=seq-mean-token-mean``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def sequence_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each row: values [B, S], mask [B, S] -> [B]; 0 for a row without tokens."""
    mask = mask.to(values.dtype)
    # where, not a product: a masked position may hold inf or NaN.
    return torch.where(mask > 0, values, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1.0)


def gspo_sequence_losses(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of each sequence, before averaging over sequences.

    ``s_i = exp(mean_t(log_prob − old_log_prob))``; loss ``−min(s_i A_i, clip(s_i, 1−low, 1+high) A_i)``.

    Args:
        log_prob, old_log_prob: [B, S] log-probabilities of the response tokens (nats); the first has a gradient.
        advantages: [B, S], the same value on every token of a row; its mean over the row is A_i.
        mask: [B, S], 1 on response tokens.
        clip_low, clip_high: clip range of the ratio below and above 1.

    Returns:
        losses [B], 0 for a row without tokens; clipped [B] bool, where the clipped term was the larger loss;
        log_ratio [B], the mean log-ratio of each row (detached).
    """
    log_ratio = sequence_mean(log_prob - old_log_prob, mask)
    ratio = log_ratio.exp()
    advantage = sequence_mean(advantages, mask)
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.maximum(plain, bounded), (bounded > plain).detach(), log_ratio.detach()


def sequence_agg_loss(losses: torch.Tensor, mask: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """The mean of losses of sequences over the whole mini-batch, of the part that is given here.

    Args:
        losses: [B], 0 for a row without tokens.
        mask: [B, S], 1 on response tokens.
        batch: verl's ``global_batch_info``.

    Returns:
        A scalar, times the number of data-parallel ranks, as ``agg_loss`` has it.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    has_tokens = mask.any(dim=-1).to(losses.dtype)
    batch = dict(batch)
    if batch.get("global_batch_size") is None and batch.get("dp_size", 1) == 1:
        # verl would divide by the local number of non-empty rows, which may be 0.
        batch["global_batch_size"] = has_tokens.sum().clamp(min=1.0)
    # One column per sequence: "token-sum" over that column is the sequence's own loss, without verl's 1e-8.
    return agg_loss(losses.unsqueeze(-1), has_tokens.unsqueeze(-1), "seq-mean-token-sum", **batch)


def hybrid_gspo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config=None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """verl's policy-loss signature (``verl/trainer/ppo/core_algos.py`` ``PolicyLossFn``, as
    ``compute_policy_loss_gspo`` has it); all tensors [B, S].

    The sum over sequences is divided by the global number of sequences from ``config.global_batch_info``, so the
    loss does not depend on how a mini-batch is cut into micro-batches or spread over ranks.

    Args:
        loss_agg_mode: ignored: a sequence-level ratio has one meaningful average.
        config: verl ``ActorConfig``: ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``, ``global_batch_info``.
        rollout_is_weights: [B, S] rollout-correction weights; a row is weighted by their mean over its tokens.

    Returns:
        The scalar loss, and ``actor/pg_clipfrac`` (share of sequences clipped), ``actor/ppo_kl``,
        ``actor/pg_clipfrac_lower`` (0: GSPO has no dual clip).
    """
    clip_low = config.clip_ratio_low if config.clip_ratio_low is not None else config.clip_ratio
    clip_high = config.clip_ratio_high if config.clip_ratio_high is not None else config.clip_ratio
    losses, clipped, log_ratio = gspo_sequence_losses(
        log_prob, old_log_prob, advantages, response_mask, clip_low, clip_high
    )
    if rollout_is_weights is not None:
        losses = losses * sequence_mean(rollout_is_weights, response_mask)

    has_tokens = response_mask.any(dim=-1).to(losses.dtype)
    sequences = has_tokens.sum().clamp(min=1.0)
    loss = sequence_agg_loss(losses, response_mask, config.global_batch_info)
    return loss, {
        "actor/pg_clipfrac": ((clipped * has_tokens).sum() / sequences).item(),
        "actor/ppo_kl": ((-log_ratio * has_tokens).sum() / sequences).item(),
        "actor/pg_clipfrac_lower": 0.0,
    }


def register() -> None:
    """Put ``hybrid_gspo`` into verl's registry (which would silently replace a loss of the same name)."""
    from verl.trainer.ppo.core_algos import register_policy_loss

    register_policy_loss("hybrid_gspo")(hybrid_gspo)
