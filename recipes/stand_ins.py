"""Stand-ins for the paper's model and data, to walk every step of the recipes in minutes without a GPU.

    model/              a random Qwen2 with the structure of Qwen2.5, two layers of width 64, and a tokenizer of bytes
    mixture/math/       rows with the columns of Mixture-of-Thoughts; mixture/science/ likewise
    gsm8k.jsonl         problems with the columns of GSM8K; math500.jsonl with those of MATH-500

Nothing can be learnt from them about a method: the model is random, and what it answers is noise.

From the command line: ``python -m recipes.stand_ins FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from recipes.demo.base_model import build_tokenizer

POSITIONS = 2048


def write_model(folder: str | Path, seed: int = 0) -> Path:
    """Save the model in float32 and its tokenizer."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = POSITIONS
    config = Qwen2Config(
        vocab_size=len(tokenizer),  # exactly: trainer and rollout engine would disagree about any padding
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        # A head of 32 is the smallest that vLLM's CPU attention has.
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_rows(folder: str | Path) -> None:
    """Write the files of rows."""
    folder = Path(folder)
    _write(folder / "mixture" / "math" / "rows.jsonl", (_sum_row(number) for number in range(96)))
    _write(folder / "mixture" / "science" / "rows.jsonl", (_choice_row(number) for number in range(16)))
    _write(
        folder / "gsm8k.jsonl",
        (
            {"question": f"A farmer has {n} hens and buys {2 * n}. How many?", "answer": f"Add them.\n#### {3 * n}"}
            for n in range(1, 5)
        ),
    )
    _write(
        folder / "math500.jsonl",
        (
            {
                "problem": f"Compute ${n} \\cdot {n + 1}$.",
                "solution": f"It is $\\boxed{{{n * (n + 1)}}}$.",
                "answer": str(n * (n + 1)),
                "subject": "Algebra",
                "level": 1,
                "unique_id": f"test/algebra/{n}.json",
            }
            for n in range(2, 6)
        ),
    )


def _write(file: Path, rows: Iterable[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _sum_row(number: int) -> dict:
    left, right = 11 + number, 7 + 3 * number
    return _row(f"How much is {left} plus {right}?", f"{left + right}", "open-r1/OpenR1-Math-220k")


def _choice_row(number: int) -> dict:
    question = f"Which of these numbers is {number} more than two?\nA: {number}\nB: {number + 2}\nC: {number + 3}"
    return _row(question, "B", "nvidia/Llama-Nemotron-Post-Training-Dataset")


def _row(question: str, answer: str, origin: str) -> dict:
    response = f"<think>\nCount on.\n</think>\n\n\\boxed{{{answer}}}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return {"messages": turns, "num_tokens": len(question) + len(response), "source": origin}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.stand_ins", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    if not (folder / "model").exists():
        write_rows(folder)
        write_model(folder / "model")
    print(f"stand-ins: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
