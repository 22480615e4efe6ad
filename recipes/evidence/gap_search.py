"""Where does LoRA lag full fine-tuning under a policy gradient? GSPO on the demo's model, in plain torch.

    python -m recipes.demo.noisy_adder outputs/last-digits
    python -m recipes.evidence.gap_search --task last_digits --arm full --full-lr 5e-4 --seeds 0 1 2 --file gaps.jsonl
    python -m recipes.evidence.gap_search --task last_digits --arm lora --lora-lr 5e-3 --seeds 0 1 2 --file gaps.jsonl

A search that is cheap enough to try tasks before verl runs on them: 90 steps took 15 seconds of an idle core. The loss,
the group advantage, the batch (16 problems, 8 answers each, two AdamW steps a rollout) and the reward are those of
recipes/evidence/last_digits_rl.yaml; there is no vLLM. What it found is in docs/evidence/gap-search/.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import find_candidates
from recipes.demo import task
from recipes.demo.digits_reward import compute_score
from recipes.demo.noisy_adder import TASKS

CLIP, EPSILON = 0.2, 1e-6
MOST_TOKENS, VALIDATION = 8, 256


class Lora(nn.Module):
    """A frozen linear module with factors A, uniform in ±1/√d_in, and B, 0; alpha is twice the rank."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear, width = linear.requires_grad_(False), linear.in_features
        self.A = nn.Parameter((2 * torch.rand(rank, width, generator=generator) - 1) / math.sqrt(width))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 2.0 * (x @ self.A.T) @ self.B.T


def trained_groups(
    model: nn.Module, arm: str, rank: int, full: Sequence[str], full_lr: float, lora_lr: float, seed: int
) -> list[dict]:
    """Optimizer groups of an arm, whose adapters are put into the model.

    Args:
        model: the base, changed in place.
        arm: ``full`` (all weights), ``linears`` (all linear modules of the layers), ``lora`` or ``hybrid``.
        rank: of the adapters.
        full: names of the modules that ``hybrid`` tunes fully.
        full_lr, lora_lr: rates.
        seed: of the factors A.
    """
    if arm == "full":
        return [{"params": list(model.parameters()), "lr": full_lr}]
    names = [candidate.name for candidate in find_candidates(model)]
    tuned = set(names if arm == "linears" else full if arm == "hybrid" else ())
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    whole, factors = [], []
    for name in names:
        if name in tuned:
            whole += [parameter.requires_grad_(True) for parameter in model.get_submodule(name).parameters()]
            continue
        parent, _, leaf = name.rpartition(".")
        adapted = Lora(model.get_submodule(name), rank, generator)
        setattr(model.get_submodule(parent), leaf, adapted)
        factors += [adapted.A, adapted.B]
    groups = [{"params": whole, "lr": full_lr}, {"params": factors, "lr": lora_lr}]
    return [group for group in groups if group["params"]]


class Policy:
    """A model that answers prompts of one length."""

    def __init__(self, model: nn.Module, tokenizer, seed: int):
        self.model, self.tokenizer = model, tokenizer
        self._draws = torch.Generator().manual_seed(seed)

    def prompts(self, problems: Sequence[task.Problem]) -> Tensor:
        """Token ids ``[N, S]``."""
        turns = [[{"role": "user", "content": problem.prompt}] for problem in problems]
        texts = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return torch.tensor(self.tokenizer(texts)["input_ids"])

    @torch.no_grad()
    def answers(self, prompts: Tensor, greedy: bool) -> Tensor:
        """Answers ``[N, P]``, padded behind their end; drawn at temperature 1 unless ``greedy``."""
        done, cache, tokens, answers = torch.zeros(len(prompts), dtype=torch.bool), None, prompts, []
        for _ in range(MOST_TOKENS):
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1]
            if greedy:
                chosen = logits.argmax(-1)
            else:
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=self._draws)[:, 0]
            chosen = chosen.masked_fill(done, self.tokenizer.pad_token_id)
            answers.append(chosen)
            done |= chosen == self.tokenizer.eos_token_id
            tokens = chosen[:, None]
            if done.all():
                break
        return torch.stack(answers, 1)

    def log_probs(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Of the tokens of the answers, ``[N, P]``."""
        whole, first = torch.cat([prompts, answers], 1), prompts.shape[1] - 1
        logits = self.model(input_ids=whole[:, :-1], use_cache=False).logits[:, first:]
        return logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]

    def texts(self, answers: Tensor) -> list[str]:
        """The answers in characters."""
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)


def sequence_ratios(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """GSPO's ratio of each answer, ``[N]``: ``exp`` of the mean log-ratio over its tokens; all ``[N, P]``."""
    return (((new - old) * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()


def run(
    folder: Path, name: str, *, arm: str, rank: int, full: Sequence[str], full_lr: float, lora_lr: float, steps: int,
    seed: int, eval_every: int, problems: int, answers: int, updates: int,
) -> dict:  # fmt: skip
    """One run, of so many problems a step, answers to each and optimizer steps on them.

    Returns its curve of greedy validation accuracy and its mean reward over the last five steps.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started, right = time.monotonic(), TASKS[name]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()
    policy = Policy(model, AutoTokenizer.from_pretrained(folder / "model"), seed)
    groups = trained_groups(model, arm, rank, full, full_lr, lora_lr, seed)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.01)
    parameters = [parameter for group in groups for parameter in group["params"]]
    pool, held_out = task.pool("train"), task.pool("validation")
    random.Random(0).shuffle(held_out)
    held_out = held_out[:VALIDATION]
    prompts, validation = policy.prompts(pool), policy.prompts(held_out)
    draws, order, rewards, curve = random.Random(seed), [], [], []

    def evaluate(step: int) -> None:
        given = policy.texts(policy.answers(validation, greedy=True))
        curve.append([step, sum(a == right(p) for a, p in zip(given, held_out, strict=True)) / len(held_out)])

    for step in range(steps):
        if step % eval_every == 0:
            evaluate(step)
        if len(order) < problems:
            order = list(range(len(pool)))
            draws.shuffle(order)
        drawn = [order.pop() for _ in range(problems)]
        asked = prompts[drawn].repeat_interleave(answers, 0)  # [N, S], a group side by side
        given = policy.answers(asked, greedy=False)  # [N, P]
        scores = [
            compute_score("", text, right(pool[drawn[at // answers]]))["score"]
            for at, text in enumerate(policy.texts(given))
        ]
        rewards.append(sum(scores) / len(scores))
        grouped = torch.tensor(scores).view(-1, answers)
        centred = grouped - grouped.mean(1, keepdim=True)
        advantages = (centred / (centred.square().mean(1, keepdim=True) + EPSILON).sqrt()).flatten()
        mask, share = (given != policy.tokenizer.pad_token_id).float(), len(asked) // updates
        with torch.no_grad():
            old = policy.log_probs(asked, given)
        for update in range(updates):
            rows = slice(update * share, (update + 1) * share)
            ratios = sequence_ratios(policy.log_probs(asked[rows], given[rows]), old[rows], mask[rows])
            gain = advantages[rows]
            loss = torch.maximum(-gain * ratios, -gain * ratios.clamp(1 - CLIP, 1 + CLIP)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    evaluate(steps)
    return {
        "task": name, "arm": arm, "rank": 0 if arm in ("full", "linears") else rank, "full": list(full),
        "full_lr": full_lr if arm != "lora" else 0.0, "lora_lr": lora_lr if arm in ("lora", "hybrid") else 0.0,
        "steps": steps, "seed": seed, "problems": problems, "answers": answers, "updates": updates,
        "trainable": sum(parameter.numel() for parameter in parameters),
        "accuracy": curve, "reward": round(sum(rewards[-5:]) / len(rewards[-5:]), 4),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence.gap_search", description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("outputs/last-digits"), help="folder of noisy_adder")
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--arm", choices=("full", "linears", "lora", "hybrid"), required=True)
    parser.add_argument("--rank", type=int, default=1, help="of the adapters (default 1)")
    parser.add_argument("--full-modules", nargs="*", default=[], metavar="NAME", help="that hybrid tunes fully")
    parser.add_argument("--full-lr", type=float, default=5e-4, help="of what is fully tuned")
    parser.add_argument("--lora-lr", type=float, default=3e-3, help="of the adapters")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--problems", type=int, default=16, help="of a step")
    parser.add_argument("--answers", type=int, default=8, help="to each problem")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps on the answers of a step")
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--file", type=Path, required=True, help="a line is added to it for each run")
    options = parser.parse_args(arguments)
    if (options.arm == "hybrid") != bool(options.full_modules):
        parser.error("--full-modules: names are needed with --arm hybrid, and with no other")
    for seed in options.seeds:
        result = run(
            options.base, options.task, arm=options.arm, rank=options.rank, full=options.full_modules,
            full_lr=options.full_lr, lora_lr=options.lora_lr, steps=options.steps, seed=seed,
            eval_every=options.eval_every, problems=options.problems, answers=options.answers,
            updates=options.updates,
        )  # fmt: skip
        with options.file.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
