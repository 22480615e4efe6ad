"""Protocol ``policy``: the replicas learn from their own answers, by a policy gradient with a group baseline.

A run begins at a policy that is right now and then: the base, trained on the task itself until the mean reward is
``start_reward``. Each step samples ``answers`` answers to each of ``batch_size`` problems at temperature 1, rewards
those that are right in every token with 1, takes the advantage of each within its group (paper Eq. 18, as
``verl_backend/advantages.py`` has it), and makes one AdamW step on the GSPO loss (``verl_backend/losses.py``). With one
step a rollout the ratio of that loss is 1, so nothing is clipped; only its gradient matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_lora_plugin.config_field import Bound, above, at_least, documented
from hybrid_lora_plugin.evidence.protocol import Choice, Start
from hybrid_lora_plugin.evidence.replicas.base import digest_of, load_base, save_base, train_policy
from hybrid_lora_plugin.evidence.replicas.flops import rollout_flops
from hybrid_lora_plugin.evidence.replicas.forward import SharedParts, Weights, answer_log_probs
from hybrid_lora_plugin.evidence.replicas.settings import ReplicaSettings
from hybrid_lora_plugin.evidence.replicas.sft import SftProtocol
from hybrid_lora_plugin.evidence.replicas.updates import Replicas
from hybrid_lora_plugin.files import complete_folder
from hybrid_lora_plugin.seeding import generator_for

#: of the variance within a group (``verl_backend/advantages.py``)
EPSILON = 1e-6


@dataclass
class PolicySettings(ReplicaSettings):
    """What the runs of the protocol ``policy`` have in common; ``batch_size`` counts problems, not answers."""

    batch_size: int = documented(8, "Problems a step.", source="own choice", bound=at_least(1, "at least 1"))
    answers: int = documented(8, "Answers to each.", source="own choice", bound=at_least(2, "at least 2"))
    start_reward: float = documented(
        0.2,
        "Mean reward on held-out problems that the policy begins with.",
        source="own choice: most groups then hold right and wrong answers",
        bound=Bound(lambda value: 0 < value < 1, "a fraction in (0, 1), e.g. 0.2"),
    )
    start_lr: float = documented(
        3.0e-4, "Rate of the training up to there.", source="own choice", bound=above(0, "above 0, e.g. 3e-4")
    )
    start_steps: int = documented(
        2000, "Steps at which that is given up.", source="own choice", bound=at_least(1, "at least 1")
    )


class PolicyProtocol(SftProtocol):
    """Small Qwen2 policies, R at once.

    The measure is the probability of the right answer, averaged over held-out problems: what the mean reward would be
    if each were sampled without end. Arms are chosen by a probe on right answers (objective ``sft``), as a policy loss
    in the probe needs verl.
    """

    name = "policy"
    settings_kind = PolicySettings
    settings: PolicySettings
    #: 2: the answers to a problem share their prompt, which rounds otherwise.
    version = 2
    measure = "expected_reward"
    lower_is_better = False

    def prepare(self, say: Callable[[str], None]) -> None:
        """Train the bases, and from each the policies that runs of the plan's tasks begin at."""
        super().prepare(say)
        for base in self.bases:
            for task in self.tasks:
                folder = self._policy_folder(base.name, task)
                if (folder / "config.json").is_file():
                    say(f"policy {base.name}, {task}: kept from {folder}")
                    continue
                model = train_policy(
                    self.model(base.name),
                    self.problems,
                    task,
                    target=self.settings.start_reward,
                    lr=self.settings.start_lr,
                    most_steps=self.settings.start_steps,
                    device=self.device,
                    say=lambda text, base=base: say(f"policy {base.name}, {text}"),
                )
                folder.parent.mkdir(parents=True, exist_ok=True)
                with complete_folder(folder) as unfinished:
                    save_base(model, unfinished)

    def identity(self) -> dict[str, Any]:
        """As of ``sft``, with a digest of each policy that there is."""
        policies = {
            f"{base.name}/{task}": digest_of(self._origin_model(base.name, task))
            for base in self.bases
            for task in self.tasks
        }
        return super().identity() | {"policies": policies}

    def _policy_folder(self, base: str, task: str) -> Path:
        return self.folder / "policies" / base / task

    def _origin(self, start: Start) -> tuple[str, ...]:
        return start.base, start.task

    def _load_origin(self, base: str, task: str) -> torch.nn.Module:
        return load_base(self._settings_of(base), self._policy_folder(base, task))

    def step_flops(self, base: str, choice: Choice) -> float:
        """One step: a rollout (see ``flops.rollout_flops``), then a step on all its answers."""
        rows = self.settings.batch_size
        trained = self._step_flops(base, choice, rows * self.settings.answers)
        return trained + rollout_flops(
            self.model(base).config,
            self._candidates(base),
            problems=rows,
            answers=self.settings.answers,
            prompt_tokens=self.layout.prompt_tokens,
            answer_tokens=self.layout.answer_tokens,
        )

    def _drawn(self, task: str, seed: int, steps: int) -> tuple[Tensor, ...]:
        """Problems ``[steps, B, tokens]`` uint8, and what their answers are drawn by, ``[steps, B · G, P]`` float32."""
        (problems,) = super()._drawn(task, seed, steps)
        draws = generator_for(f"replicas/rollout/{task}/{seed}")
        rows = self.settings.batch_size * self.settings.answers
        # Step by step, so that fewer steps are the beginning of more.
        uniform = [torch.rand(rows, self.layout.answer_tokens, generator=draws) for _ in range(steps)]
        return problems, torch.stack(uniform)

    @property
    def _rows(self) -> int:
        return self.settings.batch_size * self.settings.answers

    def _values(self, log_probs: Tensor) -> Tensor:
        return log_probs.sum(dim=-1).exp()

    def _train_step(self, replicas: Replicas, problems: Tensor, uniform: Tensor) -> Tensor:
        """One step on problems ``[R, B, tokens]``, answers drawn by ``[R, B · G, P]``; returns the losses ``[R]``."""
        problems = problems.long()
        prompts, right = problems.split([self.layout.prompt_tokens, self.layout.answer_tokens], dim=-1)
        weights = replicas.weights()
        answers = sample_answers(replicas.base, weights, prompts, uniform.unflatten(1, (-1, self.settings.answers)))
        rewards = (answers == right.unsqueeze(2)).all(-1).flatten(1)  # [R, B·G], a group side by side
        advantages = group_advantages(rewards.to(self.dtype), self.settings.answers)

        def log_probs_of(weights: Weights) -> Tensor:
            logits = answers_logits(replicas.base, weights, prompts, answers)
            return answer_log_probs(logits.flatten(1, 2), answers.flatten(1, 2))

        log_probs = log_probs_of(weights)
        losses = surrogate_loss(log_probs, log_probs.detach(), advantages)
        replicas.step(losses)
        # The ratio to the policy that sampled, and nothing clipped: a clipped loss has no slope where the gradient step
        # has been.
        replicas.zeroth_step(lambda moved: surrogate_loss(log_probs_of(moved), log_probs.detach(), advantages))
        return losses.detach()


@torch.no_grad()
def sample_answers(base: SharedParts, weights: Weights, prompts: Tensor, uniform: Tensor) -> Tensor:
    """G answers to each prompt, drawn at temperature 1.

    Args:
        base, weights: the R models.
        prompts: ``[R, B, S]`` int64.
        uniform: ``[R, B, G, P]``, in [0, 1): a token is the first at which the sum of probabilities exceeds it.

    Returns:
        ``[R, B, G, P]`` int64.
    """
    answers, length = uniform.shape[2:]
    branches = base.branches(prompts.shape[-1], answers, length - 1)
    rows, drawn = prompts, []
    for place in range(length):
        # The first token of all answers to a prompt has one distribution.
        probabilities = base.logits(weights, rows, answers if place else 1, branches).softmax(-1)  # [R, B, G or 1, V]
        replicas, problems, kept, vocabulary = probabilities.shape
        # A product, as a running sum has no fixed order on CUDA.
        up_to = torch.ones(vocabulary, vocabulary, device=rows.device, dtype=probabilities.dtype).triu()
        sums = torch.bmm(probabilities.flatten(1, 2), up_to.expand(replicas, -1, -1))
        sums = sums.view(replicas, problems, kept, vocabulary)
        token = (sums <= uniform[..., place, None]).sum(-1).clamp(max=vocabulary - 1)  # [R, B, G]
        drawn.append(token)
        rows = torch.cat([rows, token], dim=-1)
    return torch.stack(drawn, dim=-1)


def answers_logits(base: SharedParts, weights: Weights, prompts: Tensor, answers: Tensor) -> Tensor:
    """Logits of every token of G answers to each prompt; the prompt is computed once for all of them.

    Args:
        base, weights: the R models.
        prompts: ``[R, B, S]`` int64.
        answers: ``[R, B, G, P]`` int64.

    Returns:
        ``[R, B, G, P, V]``.
    """
    count, length = answers.shape[2:]
    branches = base.branches(prompts.shape[-1], count, length - 1)
    # The last token of an answer predicts nothing.
    rows = torch.cat([prompts, answers[..., :-1].transpose(2, 3).flatten(2)], dim=-1)
    logits = base.logits(weights, rows, 1 + count * (length - 1), branches)
    first = logits[:, :, :1].unsqueeze(2).expand(-1, -1, count, -1, -1)  # [R, B, G, 1, V]
    return torch.cat([first, logits[:, :, 1:].unflatten(2, (length - 1, count)).transpose(2, 3)], dim=3)


def group_advantages(rewards: Tensor, answers: int) -> Tensor:
    """``(r − μ) / sqrt(mean (r − μ)² + ε)`` within each group, as ``verl_backend.advantages.group_advantage``.

    Args:
        rewards: ``[R, B · G]``, a group side by side.
        answers: G.

    Returns:
        ``[R, B · G]``.
    """
    groups = rewards.unflatten(1, (-1, answers))
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()).flatten(1)


def surrogate_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """GSPO's loss without clipping, ``[R]``.

    Args:
        log_probs: ``[R, B, P]``, of the tokens that were sampled.
        old_log_probs: ``[R, B, P]``, of the policy that sampled; where it is the one that learns nothing is clipped.
        advantages: ``[R, B]``.
    """
    ratios = (log_probs - old_log_probs).mean(-1).exp()
    return -(advantages * ratios).mean(-1)
