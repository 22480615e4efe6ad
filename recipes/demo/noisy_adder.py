"""A small model that can add and answers with noise, and tasks that its prompts stand for something else in.

The prompt stays the demo's, ``37+45=``, and what is right moves: to the last digit of each number, ``75``, or to the
sum and 37, modulo 100, ``19``. The base learnt to add, then to write a digit at random in 70 % of the places, so that
its samples meet the right digit now and then; by the reward of each digit it has to learn another rule for both of
them. How far LoRA lags full fine-tuning on each of the tasks is in docs/evidence/gap-search/.

From the command line: ``python -m recipes.demo.noisy_adder FOLDER --task last_digits`` writes ``model/``,
``train.parquet``, ``validation.parquet`` and ``probe.jsonl``; a minute on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from hybrid_lora_plugin.errors import ConfigurationError
from recipes.demo import base_model, task

SHIFT = 37
#: another name for each digit; none keeps its own
RENAMED = "3907152864"
#: name -> problem -> right answer, of two digits
TASKS: dict[str, Callable[[task.Problem], str]] = {
    "last_digits": lambda problem: f"{problem.left % 10}{problem.right % 10}",
    "shifted": lambda problem: f"{(problem.left + problem.right + SHIFT) % 100:02d}",
    "renamed": lambda problem: "".join(RENAMED[int(digit)] for digit in problem.answer),
    "mirrored": lambda problem: problem.answer[::-1],
    "complement": lambda problem: f"{99 - problem.left - problem.right:02d}",
    "difference": lambda problem: f"{(problem.left - problem.right) % 100:02d}",
    "first_number": lambda problem: str(problem.left),
    "first_renamed": lambda problem: "".join(RENAMED[int(digit)] for digit in str(problem.left)),
    "first_looked_up": lambda problem: f"{LOOKED_UP[problem.left]:02d}",
    "tens_looked_up": lambda problem: f"{LOOKED_UP[problem.left + problem.right] // 10}{problem.answer[1]}",
    "last_looked_up": lambda problem: (
        f"{problem.answer[0]}{RENAMED_BY_TENS[int(problem.answer[0])][int(problem.answer[1])]}"
    ),
    "looked_up": lambda problem: f"{LOOKED_UP[problem.left + problem.right]:02d}",
}
_draws = random.Random(5)
#: a number of two digits for each number of two digits, without a rule
LOOKED_UP = list(range(100))
_draws.shuffle(LOOKED_UP)
#: another name for each last digit, by the digit before it
RENAMED_BY_TENS = [_draws.sample(range(10), 10) for _ in range(10)]
#: share of the digits that the base's rows show at random, once it can add
NOISE = 0.7
STEPS, CLEAN_STEPS, BATCH_SIZE, LR = 450, 270, 64, 2e-3
TRAIN_ROWS, VALIDATION_ROWS, PROBE_ROWS = 1600, 256, 1024
#: says what a folder was made for
TASK_FILE = "task.json"


def train_base(seed: int = 0, steps: int = STEPS, clean_steps: int = CLEAN_STEPS, quiet: bool = True):
    """The base model and its tokenizer; the same seed on the same machine gives the same weights."""
    tokenizer = base_model.build_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
        torch.manual_seed(seed)
        model = base_model.build_untrained(tokenizer, hidden=128, intermediate=192, layers=4)
    problems = task.pool("train")
    tokens, labels = base_model.encode_rows(tokenizer, problems, [problem.answer for problem in problems])  # [N, S]
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    in_answer, generator = torch.isin(labels, digits), torch.Generator().manual_seed(seed)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        picked = torch.randint(len(problems), (BATCH_SIZE,), generator=generator)  # [B]
        shape = (BATCH_SIZE, tokens.shape[1])
        drawn = digits[torch.randint(len(digits), shape, generator=generator)]
        noise = NOISE if step > clean_steps else 0.0
        noisy = in_answer[picked] & (torch.rand(shape, generator=generator) < noise)
        return torch.where(noisy, drawn, tokens[picked]), torch.where(noisy, drawn, labels[picked])

    base_model.fit(model, batch, steps=steps, lr=LR, quiet=quiet)
    return model, tokenizer


def rl_row(name: str, problem: task.Problem, split: str, index: int) -> dict:
    """One row of a task in verl's RL format; its data source is ``hybrid_lora/NAME``."""
    row = task.rl_row(problem, split, index)
    right = TASKS[name](problem)
    return row | {"data_source": f"hybrid_lora/{name}", "reward_model": {"style": "rule", "ground_truth": right}}


def write(folder: str | Path, name: str, seed: int = 0, quiet: bool = False) -> Path:
    """Write base model and rows, or return at once where the folder is there.

    Args:
        folder: made complete or not at all.
        name: of the task.
        seed: of the base model.
        quiet: print no progress.

    Raises:
        ConfigurationError: the folder is there with rows of another task.
    """
    import pandas

    folder = Path(folder)
    if folder.exists():
        refuse_other_task(folder, name)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model, tokenizer = train_base(seed, quiet=quiet)
        model.save_pretrained(fresh / "model")
        tokenizer.save_pretrained(fresh / "model")
        for split, count in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS)):
            rows = [rl_row(name, problem, split, index) for index, problem in enumerate(task.draw(split, count))]
            pandas.DataFrame(rows).to_parquet(fresh / f"{split}.parquet", index=False)
        lines = [
            {"messages": [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": TASKS[name](p)}]}
            for p in task.draw("train", PROBE_ROWS, seed=1)
        ]
        (fresh / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (fresh / TASK_FILE).write_text(json.dumps({"task": name, "seed": seed}) + "\n", encoding="utf-8")
        fresh.chmod(0o755)  # mkdtemp's 0700 would hide it from other users
        os.rename(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return folder


def refuse_other_task(folder: Path, name: str) -> None:
    """Let a folder through that was made for this task.

    Raises:
        ConfigurationError: it was made for another one, or not by this module.
    """
    file = folder / TASK_FILE
    made = json.loads(file.read_text(encoding="utf-8"))["task"] if file.exists() else None
    if made != name:
        holds = f"rows of {made}" if made else f"no {TASK_FILE}"
        raise ConfigurationError(f"folder: {folder} has {holds}, wanted rows of {name}; give another folder")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo.noisy_adder", description="Base model and rows of a task it has to learn."
    )
    parser.add_argument("folder", help="where to write them; returns at once if they are there")
    parser.add_argument("--task", choices=list(TASKS), default="last_digits")
    parser.add_argument("--seed", type=int, default=0, help="of the base model")
    options = parser.parse_args(arguments)
    try:
        write(options.folder, options.task, options.seed)
    except ConfigurationError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
