"""Replicas that learn from their own answers: the project's formulas, and a reward that rises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.protocol import Choice, Run, Start
from hybrid_lora_plugin.evidence.replicas import PolicyProtocol
from hybrid_lora_plugin.evidence.replicas.base import answer_logits, random_base
from hybrid_lora_plugin.evidence.replicas.forward import SharedParts, Weights, answer_log_probs
from hybrid_lora_plugin.evidence.replicas.policy import (
    answers_logits,
    group_advantages,
    sample_answers,
    surrogate_loss,
)
from hybrid_lora_plugin.evidence.replicas.settings import ReplicaSettings, read_settings
from hybrid_lora_plugin.evidence.replicas.tasks import Layout, task_of
from hybrid_lora_plugin.evidence.replicas.updates import Replicas
from hybrid_lora_plugin.verl_backend.advantages import group_advantage
from hybrid_lora_plugin.verl_backend.losses import gspo_sequence_losses

BASE = {"name": "tiny", "hidden_size": 16, "layers": 2, "intermediate_size": 32, "heads": 2, "kv_heads": 1}
BLOCK = {
    "bases": [BASE | {"steps": 150, "batch_size": 32, "lr": 4e-3}],
    "digits": 1,
    "batch_size": 8,
    "answers": 8,
    "eval_every": 80,
    "held_out": 30,
    "group_size": 3,
    "start_reward": 0.1,
    "start_lr": 3e-3,
}
TASK = "double_add"


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    said = []
    made = PolicyProtocol(BLOCK, tmp_path_factory.mktemp("policy"), "cpu", ["tiny"], [TASK])
    made.prepare(said.append)
    made.prepare(said.append)
    assert sum("kept from" in line for line in said) == 2, "what is there is kept"
    return made


def train(protocol, runs):
    found = {}
    protocol.train(runs, lambda run, outcome: found.update({run.arm: outcome}))
    return found


def full_run(protocol, arm="full", seed=0, lr=3e-4, steps=160) -> Run:
    names = tuple(candidate.name for candidate in protocol.candidates("tiny"))
    return Run(arm, Start("tiny", TASK, seed), Choice(names, 0), lr, 0.0, steps)


def test_the_advantages_and_the_loss_are_the_projects():
    draws = torch.Generator().manual_seed(0)
    rewards = (torch.rand(3, 4 * 6, generator=draws, dtype=torch.float64) < 0.3).double()
    found = group_advantages(rewards, 6)
    groups = torch.arange(4).repeat_interleave(6)
    for replica in range(3):
        torch.testing.assert_close(found[replica], group_advantage(rewards[replica], groups), rtol=0, atol=1e-14)

    log_probs = torch.randn(3, 24, 2, generator=draws, dtype=torch.float64).requires_grad_(True)
    loss = surrogate_loss(log_probs, log_probs.detach(), found)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    for replica in range(3):
        own = log_probs[replica].detach().requires_grad_(True)
        each, _, _ = gspo_sequence_losses(
            own, own.detach(), found[replica, :, None].expand(-1, 2), torch.ones(24, 2), 0.2, 0.2
        )
        each.mean().backward()
        assert loss[replica].item() == pytest.approx(each.mean().item(), abs=1e-14)
        torch.testing.assert_close(gradient[replica], own.grad, rtol=1e-12, atol=1e-15)

    # At other weights than those that sampled it is the loss without clipping.
    moved = log_probs.detach() + torch.randn(3, 24, 2, generator=draws, dtype=torch.float64)
    loss = surrogate_loss(moved, log_probs.detach(), found)
    for replica in range(3):
        arguments = (
            moved[replica],
            log_probs[replica].detach(),
            found[replica, :, None].expand(-1, 2),
            torch.ones(24, 2),
        )
        wide, narrow = (
            gspo_sequence_losses(*arguments, low, high)[0].mean().item() for low, high in ((1, 1e9), (0.2, 0.2))
        )
        assert loss[replica].item() == pytest.approx(wide, abs=1e-12) and abs(wide - narrow) > 0.01


def test_answers_are_drawn_from_the_policys_own_distribution(protocol):
    model = protocol._origin_model("tiny", TASK)
    shared = SharedParts(model, 5, torch.device("cpu"), torch.float32)
    replicas = Replicas(shared, [full_run(protocol)], 2.0, 0.0, 1.0)
    rows, layout = 4000, protocol.layout
    problem = protocol.problems.held_out(TASK)[:1].long()
    prompts = problem[None, :, : layout.prompt_tokens].expand(1, rows // 8, -1)
    uniform = torch.rand(1, rows // 8, 8, layout.answer_tokens, generator=torch.Generator().manual_seed(1))
    answers = sample_answers(shared, replicas.weights(), prompts, uniform)[0].flatten(0, 1)
    with torch.no_grad():
        first = answer_logits(model, problem, layout.answer_tokens)[0, 0].softmax(-1)
    shares = torch.bincount(answers[:, 0], minlength=16) / rows
    assert (shares - first).abs().max() < 4 * (0.25 / rows) ** 0.5
    # The second token follows the first that was drawn, not the right one.
    likely = answers[:, 0].mode().values
    drawn = torch.cat([problem[0, : layout.prompt_tokens], likely[None], likely[None]])[None]
    with torch.no_grad():
        second = answer_logits(model, drawn, layout.answer_tokens)[0, 1].softmax(-1)
    after = answers[answers[:, 0] == likely, 1]
    shares = torch.bincount(after, minlength=16) / len(after)
    assert (shares - second).abs().max() < 4 * (0.25 / len(after)) ** 0.5


def test_answers_that_share_their_prompt_are_those_of_rows_of_their_own():
    """Logits, gradients and draws of one row with all answers to a problem, and of a row for each, in float64."""
    block = BASE | {"hidden_size": 32, "heads": 4, "kv_heads": 2}
    (settings,) = read_settings(ReplicaSettings, {"bases": [block], "digits": 3}).bases
    layout, draws = Layout(3, False), torch.Generator().manual_seed(5)
    base = SharedParts(random_base(settings), layout.tokens - 1, torch.device("cpu"), torch.float64)
    matrices = {
        type_: (4 * torch.randn(2, 3, *found.shape[1:], generator=draws, dtype=torch.float64) / found.shape[-1] ** 0.5)
        for type_, found in base.matrices.items()
    }
    matrices = {type_: found.requires_grad_(True) for type_, found in matrices.items()}
    biases = {type_: found.unsqueeze(1).repeat(1, 3, 1) for type_, found in base.biases.items()}
    weights, answers, kept = Weights(matrices, biases), 5, layout.answer_tokens
    prompts = torch.randint(0, 14, (3, 4, layout.prompt_tokens), generator=draws)
    uniform = torch.rand(3, 4, answers, kept, generator=draws, dtype=torch.float64)

    def of_rows(written):
        """Logits ``[R, B, G, P, V]`` of prompts with ``written`` ``[R, B, G, Q]``, the last P = Q + 1 places."""
        rows = torch.cat([prompts.unsqueeze(2).expand(-1, -1, answers, -1), written], dim=-1).flatten(1, 2)
        return base.logits(weights, rows, written.shape[-1] + 1).unflatten(1, (4, answers))

    sampled = sample_answers(base, weights, prompts, uniform)
    assert len(sampled.flatten(0, 2).unique(dim=0)) > 40
    for place in range(kept):
        with torch.no_grad():
            sums = of_rows(sampled[..., :place])[..., -1, :].softmax(-1).cumsum(-1)
        expected = (sums <= uniform[..., place, None]).sum(-1).clamp(max=15)
        assert torch.equal(sampled[..., place], expected)

    found, expected = answers_logits(base, weights, prompts, sampled), of_rows(sampled[..., :-1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    advantages = torch.randn(3, 4, answers, kept, generator=draws, dtype=torch.float64)

    def gradients_of(logits):
        values = answer_log_probs(logits.flatten(1, 2), sampled.flatten(1, 2)).view_as(advantages)
        return torch.autograd.grad((values * advantages).sum(), [*matrices.values()])

    gradients = gradients_of(found), gradients_of(expected)
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_the_reward_rises_and_does_not_depend_on_the_runs_beside(protocol, monkeypatch):
    assert train(protocol, [full_run(protocol, steps=1)])["full"].curve[0][1] == pytest.approx(0.1, abs=0.05)
    # On what it trains on: a model of this size carries nothing over to other pairs.
    trained_on = protocol.layout.write(task_of(TASK), protocol.problems._others)
    monkeypatch.setattr(protocol.problems, "held_out", lambda task: trained_on)
    asked = full_run(protocol)
    alone = train(protocol, [asked])["full"]
    assert [step for step, _ in alone.curve] == [0, 80, 160]
    assert alone.curve[-1][1] > 1.05 * alone.curve[0][1]
    asked = dataclasses.replace(asked, steps=20)
    alone = train(protocol, [asked])["full"]
    others = [
        full_run(protocol, name, seed, lr, steps=20)
        for name, seed, lr in (("a", 1, 1e-3), ("b", 2, 1e-2), ("c", 0, 1e-4))
    ]
    together = train(protocol, [*others[:2], asked, others[2]])
    assert together["full"] == alone
    assert together["c"].curve[-1] != alone.curve[-1]
    adapted = dataclasses.replace(asked, arm="lora", choice=Choice((), 2), lora_lr=5e-3)
    assert train(protocol, [adapted])["lora"].flops < alone.flops


def test_zeroth_order_moves_on_the_answers_that_were_sampled(protocol):
    zeroth = Run("zeroth", Start("tiny", TASK, 1), Choice((), 2, zeroth=True), 0.0, 5e-3, 20, 1e-2)
    lora = dataclasses.replace(zeroth, arm="lora", choice=Choice((), 2), zeroth_lr=0.0)
    other = dataclasses.replace(zeroth, arm="other", start=Start("tiny", TASK, 2), zeroth_lr=1e-3)
    found = train(protocol, [other, lora, zeroth])
    assert train(protocol, [zeroth])["zeroth"] == found["zeroth"]
    assert not found["zeroth"].diverged and found["zeroth"].curve[0] == pytest.approx(found["lora"].curve[0])
    assert found["zeroth"].curve[-1] != pytest.approx(found["lora"].curve[-1])
    assert found["zeroth"].flops > 1.3 * found["lora"].flops
    # One step of the weights alone.
    model = protocol._origin_model("tiny", TASK)
    shared = SharedParts(model, protocol.layout.tokens - 1, torch.device("cpu"), torch.float64)
    still = dataclasses.replace(zeroth, lora_lr=0.0, steps=1)
    replicas = Replicas(shared, [still], 2.0, 0.0, 1.0, 1e-3, 1)
    before = {name: values.clone() for name, values in replicas.frozen.held.items()}
    problems, uniform = protocol._drawn(TASK, 1, 1)
    protocol._train_step(replicas, problems[:1], uniform[:1].double())
    steps = torch.cat([(values - before[name]).abs().flatten() for name, values in replicas.frozen.held.items()])
    assert steps.min() > 0 and steps.max() - steps.min() < 1e-12, "every weight moves by the same length, up or down"


def test_a_policy_that_does_not_get_started_is_refused(tmp_path):
    block = BLOCK | {"start_reward": 0.9, "start_steps": 5, "bases": [BLOCK["bases"][0] | {"steps": 2}]}
    protocol = PolicyProtocol(block, tmp_path, "cpu", ["tiny"], [TASK])
    with pytest.raises(ConfigurationError, match="start_reward: 0.9 was not reached on double_add in 5 steps"):
        protocol.prepare(lambda text: None)
