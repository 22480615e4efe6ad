"""The surrogate of a run's policy loss without clipping: what zeroth order measures the slope of (verl 0.9.1).

Where a clipped loss is flat there is no slope. Ratio, aggregation and importance weights are the run's own; entropy and
KL are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.verl_backend.losses import sequence_agg_loss, sequence_mean
from hybrid_lora_plugin.verl_backend.requirement_rules import SURROGATES


def surrogate_of(loss_function: Callable) -> Callable:
    """The surrogate without clipping of the loss that a verl worker trains with.

    Args:
        loss_function: of ``train_batch``: verl's ``ppo_loss`` with the actor's configuration.

    Returns:
        A loss function for verl's engine: ``(model_output, data, dp_group) -> (loss, {})``. The mean of the loss over
        all ranks is the surrogate of the whole mini-batch, float64.

    Raises:
        ConfigurationError: it is another loss, or one whose surrogate is not known here.
    """
    config = getattr(loss_function, "keywords", {}).get("config")
    if getattr(loss_function, "func", None) is not ppo_loss or config is None:
        raise ConfigurationError(
            f"hybrid_lora.zeroth_order.enabled: True, but this run trains with {loss_function!r} and not with verl's "
            "ppo_loss, whose surrogate is known here; leave zeroth order out",
            see="zeroth-order-not-possible",
        )
    kind = config.policy_loss.get("loss_mode", "vanilla")
    if kind not in SURROGATES:
        raise ConfigurationError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode: {kind!r} does not work with "
            f"hybrid_lora.zeroth_order.enabled=true; give one of {', '.join(SURROGATES)}, whose surrogate is known",
            see="zeroth-order-not-possible",
        )
    return partial(_surrogate, kind=kind, mode=config.loss_agg_mode, scale=config.loss_scale_factor)


def _surrogate(
    model_output: dict, data: TensorDict, dp_group=None, *, kind: str, mode: str, scale: float | None
) -> tuple[torch.Tensor, dict]:
    log_prob = no_padding_2_padding(model_output["log_probs"], data).double()
    batch = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    batch["loss_scale_factor"] = scale
    fields = ["response_mask", "old_log_probs", "advantages"]
    weighted = "rollout_is_weights" in data
    padded = data.select(*fields, *(["rollout_is_weights"] if weighted else [])).to_padded_tensor()
    weights = padded["rollout_is_weights"].double() if weighted else None
    mask = padded["response_mask"].to(bool)
    return unclipped(
        kind, log_prob, padded["old_log_probs"].double(), padded["advantages"].double(), mask, weights, mode, batch
    ), {}


def unclipped(
    kind: str,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor | None,
    mode: str,
    batch: dict,
) -> torch.Tensor:
    """``−mean(ratio · advantage)`` over a mini-batch, of the part that is given here.

    Args:
        kind: one of ``SURROGATES``: the ratio of each token, or in the others that of the sequence (arXiv 2507.18071).
        log_prob, old_log_prob: ``[B, S]`` float64, of the response tokens, nats.
        advantages: ``[B, S]`` float64.
        mask: ``[B, S]`` bool, true on response tokens.
        weights: ``[B, S]`` float64, of verl's rollout correction; None without.
        mode: verl's ``loss_agg_mode``; ``hybrid_gspo`` has one of its own.
        batch: what verl's ``agg_loss`` takes of the whole mini-batch.

    Returns:
        A scalar, float64, times the number of data-parallel ranks, as verl's losses are.
    """
    # where, not a product: a masked position may hold inf or NaN.
    difference = torch.where(mask, log_prob - old_log_prob, 0.0)
    if kind == "hybrid_gspo":
        losses = -sequence_mean(advantages, mask) * sequence_mean(difference, mask).exp()
        if weights is not None:
            losses = losses * sequence_mean(weights, mask)
        return sequence_agg_loss(losses, mask, batch)
    if kind == "gspo":
        difference = sequence_mean(difference, mask).unsqueeze(-1).expand_as(difference)
    losses = -torch.where(mask, advantages, 0.0) * difference.exp()
    if weights is not None:
        losses = losses * torch.where(mask, weights, 0.0)
    return agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=mode, **batch)
