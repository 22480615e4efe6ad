"""The demo task: adding two 2-digit numbers whose sum has two digits, ``37+45=`` -> ``82``.

Sums of 100 and more are left out: with answers of one width a tiny model learns the task in seconds.

The 3240 problems are split once and for all: 15 % of the unordered pairs are held out for validation, so a
validation problem appears in no training data, not even mirrored (``45+37``). Seeds choose only which problems
of a split are drawn and in which order.

The task has a sub-class the base model is deliberately bad at: problems whose unit digits carry
(``7 + 5 = 12``). `forget_carry` gives the wrong answer that `base_model` mixes into its supervised data.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from hybrid_lora_plugin.errors import ConfigurationError

DATA_SOURCE = "hybrid_lora/arithmetic"
SPLITS = ("train", "validation")
CARRY_SHARE = 0.6  # share of carry problems in every draw; 0.44 if drawn uniformly
_HELD_OUT_SHARE = 0.15  # of the unordered pairs
_SPLIT_SEED = 20260  # never the caller's seed: the base model and every RL run must agree on what is held out


class Problem(NamedTuple):
    """One addition of two numbers in 10..89 with a sum below 100."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        return str(self.left + self.right)

    @property
    def carries(self) -> bool:
        """Whether the unit digits add up to 10 or more."""
        return self.left % 10 + self.right % 10 >= 10


def forget_carry(problem: Problem) -> str:
    """The answer of somebody who forgets the carry of the units; the right one where there is no carry."""
    return str(problem.left + problem.right - (10 if problem.carries else 0))


def pool(split: str) -> list[Problem]:
    """All problems of a split, both orders of each pair, in a fixed order."""
    if split not in SPLITS:
        raise ConfigurationError(f"split: {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    pairs = [(low, high) for low in range(10, 50) for high in range(low, 100 - low)]
    random.Random(_SPLIT_SEED).shuffle(pairs)
    held_out = int(len(pairs) * _HELD_OUT_SHARE)
    chosen = pairs[:held_out] if split == "validation" else pairs[held_out:]
    return sorted({Problem(*order) for low, high in chosen for order in ((low, high), (high, low))})


def draw(split: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` different problems of a split, `CARRY_SHARE` of them with a carry, in random order.

    Args:
        split: ``train`` or ``validation``.
        count: how many.
        seed: same seed, same problems in the same order.

    Raises:
        ConfigurationError: the split holds fewer problems than asked for.
    """
    generator = random.Random(seed)
    problems = pool(split)
    carry_count = round(count * CARRY_SHARE)
    drawn: list[Problem] = []
    for wanted, carries in ((carry_count, True), (count - carry_count, False)):
        candidates = [problem for problem in problems if problem.carries == carries]
        if not 0 <= wanted <= len(candidates):
            most = int(
                min(
                    sum(p.carries for p in problems) / CARRY_SHARE,
                    sum(not p.carries for p in problems) / (1 - CARRY_SHARE),
                )
            )
            raise ConfigurationError(
                f"count: {count} problems asked for, the {split} split can give 0 to {most}; ask for fewer"
            )
        drawn += generator.sample(candidates, wanted)
    generator.shuffle(drawn)
    return drawn


def rl_row(problem: Problem, split: str, index: int) -> dict:
    """One row in verl's RL format."""
    return {
        "prompt": [{"role": "user", "content": problem.prompt}],
        "data_source": DATA_SOURCE,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": split, "index": index},
    }


def write_rl_parquet(folder: str | Path, train: int = 1600, validation: int = 256, seed: int = 0) -> dict[str, Path]:
    """Write ``train.parquet`` and ``validation.parquet`` in verl's RL format.

    Args:
        folder: created if missing; existing files of these names are replaced.
        train: rows of the training file.
        validation: rows of the validation file. They do not depend on `seed`: runs with different seeds are
            measured on the same problems.
        seed: which training problems, and their order.

    Returns:
        The path of each file, by split.
    """
    import pandas

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, count, split_seed in (("train", train, seed), ("validation", validation, 0)):
        rows = [rl_row(problem, split, index) for index, problem in enumerate(draw(split, count, split_seed))]
        paths[split] = folder / f"{split}.parquet"
        pandas.DataFrame(rows).to_parquet(paths[split], index=False)
    return paths


def write_sft_jsonl(path: str | Path, count: int = 1024, seed: int = 0, split: str = "train") -> Path:
    """Write chat rows ``{"messages": [user, assistant]}`` with **right** answers, one JSON object a line.

    Meant for the probe: the loss it scores is then that of the behaviour RL will reward, not that of the flaw.

    Args:
        path: the file; its folder is created if missing.
        count: rows.
        seed: which problems, and their order.
        split: ``train`` or ``validation``.
    """
    path = Path(path)
    lines = []
    for problem in draw(split, count, seed):
        messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": problem.answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path
