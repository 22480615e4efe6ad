"""Advantage ``hybrid_group``: reward relative to the group of answers to one prompt (paper Eq. 18).

It differs from verl's ``grpo`` in two points: the variance is the population variance with ε inside the
root (verl: the sample standard deviation with ε outside, a factor √(G/(G−1))), and a group of one has advantage 0
(verl: its raw reward).
"""

from __future__ import annotations

import torch

EPSILON = 1e-6


def group_advantage(rewards: torch.Tensor, group: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """``A_i = (r_i − μ) / sqrt(mean_j (r_j − μ)² + ε)`` within each group.

    Args:
        rewards: [B] rewards.
        group: [B] int64 group numbers in 0 … N−1.
        epsilon: added to the variance.

    Returns:
        [B] advantages, dtype of ``rewards``; 0 for a group of one.
    """
    groups = int(group.max()) + 1 if group.numel() else 0
    size = torch.zeros(groups, dtype=rewards.dtype).index_add_(0, group, torch.ones_like(rewards)).clamp(min=1.0)
    mean = torch.zeros(groups, dtype=rewards.dtype).index_add_(0, group, rewards) / size
    centred = rewards - mean[group]
    variance = torch.zeros(groups, dtype=rewards.dtype).index_add_(0, group, centred**2) / size
    return centred / (variance + epsilon).sqrt()[group]


@torch.no_grad()
def hybrid_group(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index, config=None, **_
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's advantage-estimator signature (``verl/trainer/ppo/core_algos.py``).

    Args:
        token_level_rewards: [B, S]; a response's reward is their sum.
        response_mask: [B, S], 1 on response tokens. A row without any (verl pads batches with such rows)
            belongs to no group and gets 0.
        index: [B] prompt identifiers; equal ones form a group.

    Returns:
        advantages [B, S] and returns [B, S] (the same tensor, as in verl's group estimators).
    """
    numbers: dict = {}
    group = torch.tensor([numbers.setdefault(name, len(numbers)) for name in index], dtype=torch.int64)
    rewards = token_level_rewards.sum(dim=-1).double().cpu()
    present = response_mask.any(dim=-1).cpu()
    advantages = torch.zeros_like(rewards)
    if present.any():
        _, dense = torch.unique(group[present], return_inverse=True)
        advantages[present] = group_advantage(rewards[present], dense)
    advantages = advantages.to(token_level_rewards).unsqueeze(-1) * response_mask
    return advantages, advantages


def register() -> None:
    """Put ``hybrid_group`` into verl's registry (which raises if another function holds the name)."""
    from verl.trainer.ppo.core_algos import register_adv_est

    register_adv_est("hybrid_group")(hybrid_group)
