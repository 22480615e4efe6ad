"""Floating point operations of a training run, by one formula for all arms.

For T tokens that go into the model, with a product of n weights counted as 2·n operations a token:

- forward: 2·T over all candidate weights, 4·T·S·(heads·head_dim) a layer for attention over S positions, 2·H·V for each
  token of an answer;
- gradients of activations: the same again, for the layers from the lowest one with anything trained upwards;
- gradients of weights: 2·T over the weights of fully tuned modules;
- adapters: 6·T·r·(d_in + d_out) each, forward and both gradients; with DoRA 6·r·d_in·d_out more a step, for the norm of
  W + s·B·A and its gradient;
- zeroth order: two forward passes a direction more, adapters included (2·T·r·(d_in + d_out) each). Making the signs of
  a direction, a few whole-number operations a weight, is left out.

With N candidate weights and little else this is 6·N·T for full fine-tuning and 4·N·T for LoRA plus its adapters. It
counts what an implementation that trains one model must do. The replicas do more: they form W + s·B·A and the gradient
of every weight, as that needs fewer passes over memory. Norms, biases, softmax, embedding and optimizer are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.evidence.protocol import Choice


def step_flops(
    config: Any,
    candidates: Sequence[Candidate],
    choice: Choice,
    *,
    rows: int,
    positions: int,
    answer_tokens: int,
    zeroth_directions: int = 0,
) -> float:
    """Operations of one optimizer step of one run.

    Args:
        config: a ``Qwen2Config``.
        candidates: of the model.
        choice: what trains.
        rows, positions, answer_tokens: problems a step, S, and positions whose logits are needed.
        zeroth_directions: K of a choice with ``zeroth``.
    """
    tokens, full, frozen = rows * positions, set(choice.full), set(choice.frozen)
    trained_layers = [c.layer for c in candidates if c.name in full or (choice.rank and c.name not in frozen)]
    lowest = min(trained_layers, default=config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * tokens * positions * config.num_attention_heads * head_dim
    head = 2 * rows * answer_tokens * config.hidden_size * config.vocab_size
    total = (1 + bool(trained_layers)) * head
    forward = head + attention * config.num_hidden_layers
    total += attention * (config.num_hidden_layers + 2 * (config.num_hidden_layers - lowest))
    for candidate in candidates:
        product = 2 * tokens * candidate.in_features * candidate.out_features
        total += product * (1 + (candidate.layer >= lowest))
        forward += product
        if candidate.name in frozen:
            continue
        forward += 2 * tokens * candidate.lora_parameters(choice.rank)
        if candidate.name in full:
            total += product
        elif choice.rank:
            total += 6 * tokens * candidate.lora_parameters(choice.rank)
            if choice.dora:
                total += 6 * choice.rank * candidate.in_features * candidate.out_features
    if choice.zeroth:
        total += 2 * zeroth_directions * forward
    return float(total)


def rollout_flops(
    config: Any,
    candidates: Sequence[Candidate],
    *,
    problems: int,
    answers: int,
    prompt_tokens: int,
    answer_tokens: int,
) -> float:
    """Operations of sampling: a forward pass of each prompt once and of each sampled token but the last.

    As a rollout engine has it, which keeps keys and values and lets the answers to a problem share those of its prompt;
    attention is left out. The replicas themselves compute prompts and earlier tokens again for every token.
    """
    sampled = problems * answers * answer_tokens
    tokens = problems * prompt_tokens + sampled - problems * answers
    weights = sum(candidate.in_features * candidate.out_features for candidate in candidates)
    return float(2 * tokens * weights + 2 * sampled * config.hidden_size * config.vocab_size)


def trainable_parameters(candidates: Sequence[Candidate], choice: Choice) -> int:
    """Weights and biases of full modules, and adapters on what is not frozen, with DoRA's magnitudes: what gets a
    gradient.
    """
    full, frozen = set(choice.full), set(choice.frozen)
    total = 0
    for candidate in candidates:
        if candidate.name in full:
            total += candidate.parameters
        elif choice.rank and candidate.name not in frozen:
            total += candidate.lora_parameters(choice.rank) + (candidate.out_features if choice.dora else 0)
    return total
