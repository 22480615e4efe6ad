"""Policy loss ``hybrid_gspo`` and advantage ``hybrid_group``, against slow float64 references."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

verl_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")

from hybrid_lora_plugin.verl_backend.advantages import hybrid_group  # noqa: E402
from hybrid_lora_plugin.verl_backend.losses import hybrid_gspo  # noqa: E402


def reference_loss(log_prob, old_log_prob, advantages, mask, low, high):
    """GSPO, sequence by sequence and token by token, in Python floats; the mean is over all rows of the batch."""
    total = 0.0
    for row in range(len(mask)):
        tokens = [t for t in range(len(mask[row])) if mask[row][t]]
        if not tokens:
            continue
        mean = sum((log_prob[row][t] - old_log_prob[row][t]).item() for t in tokens) / len(tokens)
        ratio, advantage = math.exp(mean), advantages[row][tokens[0]].item()
        total -= min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return total / len(mask)


def configuration(low=0.2, high=0.2, **batch):
    return SimpleNamespace(clip_ratio=0.2, clip_ratio_low=low, clip_ratio_high=high, global_batch_info=batch)


def make_batch(rows=12, length=7, seed=0, dtype=torch.float64, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).to(torch.int64)
    old = -torch.rand(rows, length, generator=generator, dtype=dtype) * 3
    new = old + spread * torch.randn(rows, length, generator=generator, dtype=dtype)
    advantages = torch.randn(rows, 1, generator=generator, dtype=dtype) * mask
    return new, old, advantages, mask


def loss_of(new, old, advantages, mask, config):
    return hybrid_gspo(old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask, config=config)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), low=st.sampled_from([0.2, 3e-4]), high=st.sampled_from([0.2, 4e-4]))
def test_loss_equals_the_token_by_token_reference(seed, low, high):
    batch = make_batch(seed=seed)
    loss, _ = loss_of(*batch, configuration(low, high, global_batch_size=12, dp_size=1))
    assert loss.item() == pytest.approx(reference_loss(*batch, low, high), abs=1e-12)


def test_gradient_equals_finite_differences_of_the_reference():
    new, old, advantages, mask = make_batch(rows=4, length=3, seed=3, spread=0.05)
    new.requires_grad_(True)
    loss_of(new, old, advantages, mask, configuration(global_batch_size=4, dp_size=1))[0].backward()
    for row in range(4):
        for token in range(3):
            step = torch.zeros_like(new)
            step[row, token] = 1e-6
            up, down = (reference_loss(new + sign * step, old, advantages, mask, 0.2, 0.2) for sign in (1, -1))
            assert new.grad[row, token].item() == pytest.approx((up - down) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_loss_is_a_sequence_mean_whatever_loss_agg_mode_says(mode):
    new, old, advantages, mask = make_batch()
    config = configuration(global_batch_size=12, dp_size=1)
    loss, _ = hybrid_gspo(old, new, advantages, mask, loss_agg_mode=mode, config=config)
    assert loss.item() == pytest.approx(reference_loss(new, old, advantages, mask, 0.2, 0.2), abs=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 12])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch_size(micro_batch):
    new, old, advantages, mask = make_batch(seed=1)
    config = configuration(global_batch_size=12, dp_size=1)
    whole = new.clone().requires_grad_(True)
    expected = loss_of(whole, old, advantages, mask, config)[0]
    expected.backward()
    parts, total = new.clone().requires_grad_(True), 0.0
    for start in range(0, 12, micro_batch):
        rows = slice(start, start + micro_batch)
        part = loss_of(parts[rows], old[rows], advantages[rows], mask[rows], config)[0]
        part.backward()
        total += part.item()
    assert total == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("ranks", [2, 4])
def test_mean_over_ranks_is_the_loss_of_one_rank(ranks):
    new, old, advantages, mask = make_batch(seed=2)
    expected = loss_of(new, old, advantages, mask, configuration(global_batch_size=12, dp_size=1))[0].item()
    config = configuration(global_batch_size=12, dp_size=ranks)
    shares = [loss_of(*(t[r::ranks] for t in (new, old, advantages, mask)), config)[0].item() for r in range(ranks)]
    assert sum(shares) / ranks == pytest.approx(expected, abs=1e-12)


def test_fully_masked_row_adds_nothing_and_no_nan():
    new, old, advantages, mask = make_batch()
    mask[3] = 0
    new[3], old[3] = float("nan"), float("inf")
    new.requires_grad_(True)
    loss, metrics = loss_of(new, old, advantages, mask, configuration(global_batch_size=12, dp_size=1))
    loss.backward()
    assert loss.item() == pytest.approx(reference_loss(new, old, advantages, mask, 0.2, 0.2), abs=1e-12)
    assert torch.all(new.grad[3] == 0) and torch.isfinite(new.grad).all()
    assert all(math.isfinite(value) for value in metrics.values())


def test_batch_of_only_masked_rows_gives_zero_not_nan():
    new, old, advantages, mask = make_batch()
    loss, metrics = loss_of(new, old, advantages, mask * 0, configuration())
    assert loss.item() == 0 and all(math.isfinite(value) for value in metrics.values())


def test_clip_fraction_counts_sequences():
    old = torch.zeros(4, 2, dtype=torch.float64)
    # Ratios 2, 2, 0.5, 1: clipped are a raised ratio with A > 0 and a lowered one with A < 0.
    new = torch.tensor([2.0, 2.0, 0.5, 1.0], dtype=torch.float64).log()[:, None].expand(4, 2)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:, None].expand(4, 2)
    mask = torch.ones(4, 2, dtype=torch.int64)
    _, metrics = loss_of(new, old, advantages, mask, configuration(global_batch_size=4, dp_size=1))
    assert metrics["actor/pg_clipfrac"] == 0.5


def test_rollout_correction_weights_scale_each_sequence():
    new, old, advantages, mask = make_batch()
    weights = torch.full_like(new, 0.25) * mask
    config = configuration(global_batch_size=12, dp_size=1)
    plain, _ = loss_of(new, old, advantages, mask, config)
    weighted, _ = hybrid_gspo(old, new, advantages, mask, config=config, rollout_is_weights=weights)
    assert weighted.item() == pytest.approx(0.25 * plain.item(), abs=1e-12)


def test_equals_verls_gspo_only_with_sequence_mean():
    from verl.workers.config import FSDPActorConfig

    new, old, advantages, mask = make_batch(spread=0.05)
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.2
    )
    config.global_batch_info.update(dp_size=1, global_batch_size=12, batch_num_tokens=int(mask.sum()))
    ours, _ = loss_of(new, old, advantages, mask, config)
    gspo = verl_algos.get_policy_loss_fn("gspo")
    same, _ = gspo(old, new, advantages, mask, loss_agg_mode="seq-mean-token-mean", config=config)
    other, _ = gspo(old, new, advantages, mask, loss_agg_mode="token-mean", config=config)
    assert ours.item() == pytest.approx(same.item(), abs=1e-7)
    assert abs(ours.item() - other.item()) > 1e-3


def reference_advantage(rewards, names, epsilon=1e-6):
    result = []
    for reward, name in zip(rewards, names, strict=True):
        group = [r for r, n in zip(rewards, names, strict=True) if n == name]
        mean = sum(group) / len(group)
        result.append((reward - mean) / math.sqrt(sum((r - mean) ** 2 for r in group) / len(group) + epsilon))
    return result


def advantages_of(rewards, names, length=3):
    token_rewards = torch.zeros(len(rewards), length, dtype=torch.float64)
    token_rewards[:, -1] = torch.tensor(rewards, dtype=torch.float64)
    mask = torch.ones(len(rewards), length, dtype=torch.int64)
    return hybrid_group(token_level_rewards=token_rewards, response_mask=mask, index=names)[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-3, 3)), min_size=1, max_size=24))
def test_advantage_equals_equation_18(rows):
    names, rewards = [f"prompt-{group}" for group, _ in rows], [reward for _, reward in rows]
    result = advantages_of(rewards, names)
    torch.testing.assert_close(result[:, 0].tolist(), reference_advantage(rewards, names), rtol=1e-9, atol=1e-9)
    assert torch.equal(result[:, 0], result[:, -1])


@pytest.mark.parametrize("rewards, expected", [([1, 0, 0, 0], [1.7320, -0.5773]), ([1, 1, 0, 0], [1.0, -1.0])])
def test_advantage_uses_the_population_variance(rewards, expected):
    result = advantages_of([float(r) for r in rewards], ["a"] * 4)[:, 0]
    assert [result[0].item(), result[-1].item()] == pytest.approx(expected, abs=1e-4)


def test_group_of_one_has_advantage_zero():
    assert advantages_of([1.0], ["alone"]).abs().max() == 0


def test_padding_rows_belong_to_no_group():
    rewards = torch.tensor([[1.0], [0.0], [5.0]], dtype=torch.float64)
    mask = torch.tensor([[1], [1], [0]])
    result, _ = hybrid_group(token_level_rewards=rewards, response_mask=mask, index=["a", "a", "a"])
    assert result[:, 0].tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-5)


def test_loss_and_advantage_are_found_through_verls_registries():
    import hybrid_lora_plugin.verl_backend.registration  # noqa: F401

    assert verl_algos.get_policy_loss_fn("hybrid_gspo") is hybrid_gspo
    assert verl_algos.get_adv_estimator_fn("hybrid_group") is hybrid_group
