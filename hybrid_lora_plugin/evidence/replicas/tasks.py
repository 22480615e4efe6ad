"""Arithmetic on numbers of a fixed width: what the toy bases learn, and the tasks that shift from it.

A problem is ``a op b = answer``, a token a character and every number written with leading zeros, so that all problems
have one length and nothing is padded. The base adds; each shift changes something else about that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.seeding import generator_for

#: token ids: the digits are their own, then these
PLUS, MINUS, TIMES, EQUALS = 10, 11, 12, 13
VOCABULARY = 16


@dataclass(frozen=True)
class Task:
    """One kind of problem.

    Attributes:
        name: as a plan names it.
        operator: token between the numbers.
        answer: (a, b, limit) -> answer, int64 of a's shape; ``limit`` is 10 to the number of digits of a and b.
        renamed: whether the digits stand for others, in problem and answer: a permutation without a fixed point.
        shift: what differs from addition, for people.
    """

    name: str
    operator: int
    answer: Callable[[Tensor, Tensor, int], Tensor]
    renamed: bool
    shift: str


def _add(a: Tensor, b: Tensor, limit: int) -> Tensor:
    return a + b


TASKS = {
    task.name: task
    for task in (
        Task("add", PLUS, _add, False, "none: what the bases learn"),
        Task("subtract", MINUS, lambda a, b, limit: (a - b) % limit, False, "operator: a − b modulo 10^digits"),
        Task("multiply", TIMES, lambda a, b, limit: (a * b) % limit, False, "operator: a · b modulo 10^digits"),
        Task("double_add", PLUS, lambda a, b, limit: 2 * a + b, False, "rule: 2a + b under the sign of addition"),
        Task("renamed_digits", PLUS, _add, True, "notation: every digit is written as another one"),
    )
}
BASE_TASK = "add"


def task_of(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigurationError: there is none; the message lists those there are.
    """
    if name not in TASKS:
        raise ConfigurationError(f"tasks: {name!r} is unknown; choose among {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Layout:
    """Where a problem's tokens stand.

    Attributes:
        digits: of a and of b.
        least_first: whether answers are written from the last digit on, which is far easier to learn.
    """

    digits: int
    least_first: bool

    @property
    def answer_tokens(self) -> int:
        """Digits of an answer: one more than those of a, which holds 2a + b."""
        return self.digits + 1

    @property
    def prompt_tokens(self) -> int:
        """Tokens up to and with ``=``."""
        return 2 * self.digits + 2

    @property
    def tokens(self) -> int:
        """Tokens of a whole problem."""
        return self.prompt_tokens + self.answer_tokens

    def write(self, task: Task, pairs: Tensor) -> Tensor:
        """Problems ``[..., tokens]`` uint8 for ``pairs`` [...], each ``a · 10^digits + b``."""
        limit = 10**self.digits
        a, b = pairs // limit, pairs % limit
        answer = _digits_of(task.answer(a, b, limit), self.answer_tokens)
        if self.least_first:
            answer = answer.flip(-1)
        numbers = [_digits_of(a, self.digits), _digits_of(b, self.digits), answer]
        if task.renamed:
            names = renaming()
            numbers = [names[number] for number in numbers]
        sign = torch.full((*pairs.shape, 1), task.operator)
        equals = torch.full_like(sign, EQUALS)
        return torch.cat([numbers[0], sign, numbers[1], equals, numbers[2]], dim=-1).to(torch.uint8)


def _digits_of(numbers: Tensor, count: int) -> Tensor:
    return torch.stack([numbers // 10**place % 10 for place in reversed(range(count))], dim=-1)


def renaming() -> Tensor:
    """The name of each digit in the renamed notation, ``[10]``: the same in every study, no digit keeps its own."""
    draws = generator_for("replicas/renaming")
    while True:
        names = torch.randperm(10, generator=draws)
        if (names != torch.arange(10)).all():
            return names


class Problems:
    """Training problems by seed and purpose, and the held-out ones, which no training ever draws.

    The same pairs of numbers are held out in every task, so that a base has not seen them either.
    """

    def __init__(self, layout: Layout, held_out: int) -> None:
        """Split all pairs.

        Args:
            layout: of the problems.
            held_out: pairs set aside.

        Raises:
            ConfigurationError: half of all pairs or more would be held out.
        """
        pairs = 10 ** (2 * layout.digits)
        if not 0 < held_out < pairs // 2:
            raise ConfigurationError(
                f"held_out: {held_out} of {pairs:,} pairs of {layout.digits} digits; give 1 to {pairs // 2 - 1:,}"
            )
        order = torch.randperm(pairs, generator=generator_for("replicas/held-out"))
        self.layout, self._held_out, self._others = layout, order[:held_out], order[held_out:]

    def held_out(self, task: str) -> Tensor:
        """The held-out problems of a task, ``[held_out, tokens]`` uint8."""
        return self.layout.write(task_of(task), self._held_out)

    def drawn(self, task: str, seed: int, purpose: str, batches: int, batch_size: int) -> Tensor:
        """Problems to train on, ``[batches, batch_size, tokens]`` uint8.

        Args:
            task: which.
            seed: of the start.
            purpose: e.g. ``train`` or ``probe``; each has draws of its own.
            batches: how many; fewer are the beginning of more.
            batch_size: problems a batch.
        """
        draws = generator_for(f"replicas/{purpose}/{task}/{seed}")
        chosen = torch.randint(len(self._others), (batches * batch_size,), generator=draws)
        return self.layout.write(task_of(task), self._others[chosen].view(batches, batch_size))

    def reshuffled(self, task: str, seed: int, purpose: str, batches: int, batch_size: int, different: int) -> Tensor:
        """The same problems in every epoch, each time in another order: ``[batches, batch_size, tokens]`` uint8.

        Args:
            task, seed, purpose, batches, batch_size: as of ``drawn``.
            different: problems of an epoch, a multiple of ``batch_size``.

        Raises:
            ConfigurationError: there are not as many.
        """
        if different > len(self._others):
            raise ConfigurationError(
                f"train_problems: {different} of the {len(self._others):,} pairs that are not held out; give fewer"
            )
        draws = generator_for(f"replicas/{purpose}/{task}/{seed}/epochs")
        chosen = self._others[torch.randperm(len(self._others), generator=draws)[:different]]
        epochs = -(-batches * batch_size // different)
        order = torch.cat([torch.randperm(different, generator=draws) for _ in range(epochs)])
        return self.layout.write(task_of(task), chosen[order[: batches * batch_size]].view(batches, batch_size))
