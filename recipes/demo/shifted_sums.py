"""Shifted sums: of the tasks that were tried, the one where LoRA of rank 1 learned slowest beside full fine-tuning.

The prompt stays the demo's, ``37+45=``, and what is right moves: the sum and 37, modulo 100, ``19``. The base learnt to
add, then to write a digit at random in 70 % of the places, so that its samples meet the right digit now and then; by
the reward of each digit it has to learn another rule for both of them. That there is a gap to full fine-tuning is not
established: docs/evidence/gap-search/ has what was seen.

From the command line: ``python -m recipes.demo.shifted_sums FOLDER`` writes ``model/``, ``train.parquet``,
``validation.parquet`` and ``probe.jsonl``; a minute on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from recipes.demo import base_model, task

DATA_SOURCE = "hybrid_lora/shifted_sums"
SHIFT = 37
#: share of the digits that the base's rows show at random, once it can add
NOISE = 0.7
STEPS, CLEAN_STEPS, BATCH_SIZE, LR = 450, 270, 64, 2e-3
TRAIN_ROWS, VALIDATION_ROWS, PROBE_ROWS = 1600, 256, 1024


def answer(problem: task.Problem) -> str:
    """The right one, of two digits."""
    return f"{(problem.left + problem.right + SHIFT) % 100:02d}"


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
        random = in_answer[picked] & (torch.rand(shape, generator=generator) < noise)
        return torch.where(random, drawn, tokens[picked]), torch.where(random, drawn, labels[picked])

    base_model.fit(model, batch, steps=steps, lr=LR, quiet=quiet)
    return model, tokenizer


def rl_row(problem: task.Problem, split: str, index: int) -> dict:
    """One row in verl's RL format."""
    row = task.rl_row(problem, split, index)
    return row | {"data_source": DATA_SOURCE, "reward_model": {"style": "rule", "ground_truth": answer(problem)}}


def write(folder: str | Path, seed: int = 0, quiet: bool = False) -> Path:
    """Write base model and rows, or return at once where the folder is there.

    Args:
        folder: made complete or not at all.
        seed: of the base model.
        quiet: print no progress.
    """
    import pandas

    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model, tokenizer = train_base(seed, quiet=quiet)
        model.save_pretrained(fresh / "model")
        tokenizer.save_pretrained(fresh / "model")
        for split, count in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS)):
            rows = [rl_row(problem, split, index) for index, problem in enumerate(task.draw(split, count))]
            pandas.DataFrame(rows).to_parquet(fresh / f"{split}.parquet", index=False)
        lines = [
            {"messages": [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": answer(p)}]}
            for p in task.draw("train", PROBE_ROWS, seed=1)
        ]
        (fresh / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        fresh.chmod(0o755)  # mkdtemp's 0700 would hide it from other users
        os.rename(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo.shifted_sums", description="Base model and rows of the shifted sums."
    )
    parser.add_argument("folder", help="where to write them; returns at once if it is there")
    parser.add_argument("--seed", type=int, default=0, help="of the base model")
    options = parser.parse_args(arguments)
    write(options.folder, options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
