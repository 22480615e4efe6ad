"""The demo's base model: a small Qwen2 and its tokenizer, trained here in about a minute on a CPU.

**The supervised data is deliberately flawed**, so that verifiable rewards have something to repair: where the unit
digits of a problem carry, `FORGET_RATE` of the rows show the answer with the carry forgotten (``37+45=72``) and only
the rest the right one. The model thus knows how to add, but greedily answers carry problems wrong while sampling
finds the right answer now and then. That is what an RL demo needs and no more than that: the gain measured on this
model says that the training loop works, not how well a method does on a real model.

From the command line: ``python -m recipes.demo.base_model FOLDER``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hybrid_lora_plugin.errors import ConfigurationError
from recipes.demo import task

FINGERPRINT_FILE = "demo_base_model.json"  # written last: a folder that has it is complete
RECIPE_VERSION = 4  # raise it when a change to this file changes the model
FORGET_RATE = 0.7
# verl builds a turn builder for every Qwen2 model and requires this name for the end of a turn.
PAD, EOS, USER, ANSWER = "<pad>", "<|im_end|>", "<user>", "<answer>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<answer>{{ message['content'] }}<|im_end|>{% "
    "else %}<user>{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def build_tokenizer(words: Sequence[str] = ()):
    """A tokenizer with one token per byte, plus pad, eos and the two turn markers: 260 tokens.

    All 256 bytes rather than the dozen characters the task needs: there is then no unknown token, and any text
    verl or vLLM may render (an empty turn, a system line) survives the round trip.

    Args:
        words: more tokens, which no text is split into; a model whose vocabulary has them may still answer with them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, EOS, USER, ANSWER]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet, *words])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))  # no merges: one token per byte
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=None,
        unk_token=None,
        additional_special_tokens=[USER, ANSWER],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_untrained(tokenizer, hidden: int, intermediate: int, layers: int):
    """A freshly initialised float32 Qwen2 that fits `tokenizer`; draws from torch's global generator."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),  # exactly: trainer and rollout engine would disagree about any padding
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        # 32 is a head size that vLLM's CPU attention supports; for Qwen2 it takes hidden size by heads, not head_dim.
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        # At 0.02, meant for wide models, some seeds are still on the first plateau when training ends.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model


def encode_rows(tokenizer, problems: list[task.Problem], answers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Chat rows as tensors, padded on the right.

    Returns:
        Token ids ``[N, S]`` and labels ``[N, S]``: the ids of the response and its eos, -100 elsewhere.
    """
    users = [{"role": "user", "content": problem.prompt} for problem in problems]
    chats = [[user, {"role": "assistant", "content": answer}] for user, answer in zip(users, answers, strict=True)]
    prompts = tokenizer.apply_chat_template([[user] for user in users], add_generation_prompt=True, tokenize=False)
    wholes = tokenizer.apply_chat_template(chats, tokenize=False)
    rows = list(zip(map(len, tokenizer(prompts)["input_ids"]), tokenizer(wholes)["input_ids"], strict=True))
    width = max(len(ids) for _, ids in rows)
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt_length, ids) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return tokens, labels


@torch.no_grad()
def respond(
    model, tokenizer, problems: list[task.Problem], temperature: float = 0.0, generator=None, max_new_tokens: int = 8
) -> list[str]:
    """One response per problem, decoded without special tokens; temperature 0 is greedy."""
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    tokens = torch.tensor(tokenizer(prompts)["input_ids"])  # [N, S]: every prompt has the same length
    prompt_length = tokens.shape[1]
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):  # the sequences are too short for a key-value cache to pay
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]  # [N, V]
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        chosen = chosen.masked_fill(done, tokenizer.pad_token_id)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        done |= chosen == tokenizer.eos_token_id
        if done.all():
            break
    return tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)


def accuracy(model, tokenizer, problems: list[task.Problem], temperature: float = 0.0, seed: int = 0) -> float:
    """Share of problems answered exactly right, by the demo's reward; greedy unless a temperature is given."""
    from recipes.demo.reward import compute_score

    responses = respond(model, tokenizer, problems, temperature, torch.Generator().manual_seed(seed))
    scores = [compute_score(task.DATA_SOURCE, r, p.answer)["acc"] for r, p in zip(responses, problems, strict=True)]
    return sum(scores) / len(scores)


class _Progress:
    """A line with the time left: rewritten in place on a terminal, else a new one every five seconds."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet, self.started = total, quiet, time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.next_at = self.started + (0.2 if self.terminal else 5.0)

    def show(self, step: int, loss: torch.Tensor) -> None:
        now = time.monotonic()
        if self.quiet or (now < self.next_at and step < self.total):
            return
        self.next_at = now + (0.2 if self.terminal else 5.0)
        left = (now - self.started) / step * (self.total - step)
        line = f"base model: step {step}/{self.total}, loss {loss.item():.3f}, {left:.0f} s left"
        end = "\r" if self.terminal and step < self.total else "\n"
        print(line, end=end, file=sys.stderr, flush=True)


def train(
    model, tokenizer, *, seed: int, steps: int, batch_size: int, lr: float, forget_rate: float, quiet: bool
) -> None:
    """Supervised training in place.

    The flaw is drawn anew for every row and step. Drawn once per problem it would be a fact to memorise; drawn
    anew, the model learns its rate and so samples right answers at about ``1 - forget_rate``.
    """
    generator = torch.Generator().manual_seed(seed)
    problems = task.pool("train")
    tokens, labels = encode_rows(tokenizer, problems, [p.answer for p in problems])  # [N, S]
    flawed_tokens, flawed_labels = encode_rows(tokenizer, problems, [task.forget_carry(p) for p in problems])
    if flawed_tokens.shape != tokens.shape:
        raise AssertionError(f"right and flawed rows differ in length: {tokens.shape} and {flawed_tokens.shape}")
    carries = torch.tensor([p.carries for p in problems])

    def batch(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        picked = torch.randint(len(problems), (batch_size,), generator=generator)  # [B]
        flawed = carries[picked] & (torch.rand(batch_size, generator=generator) < forget_rate)
        return (
            torch.where(flawed[:, None], flawed_tokens[picked], tokens[picked]),  # [B, S]
            torch.where(flawed[:, None], flawed_labels[picked], labels[picked]),
        )

    fit(model, batch, steps=steps, lr=lr, quiet=quiet)


def fit(
    model, batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]], *, steps: int, lr: float, quiet: bool
) -> None:
    """Supervised training in place: AdamW, warm-up over a tenth of the steps, then cosine to zero.

    Args:
        model: in float32 on the CPU; left in eval mode.
        batch: step from 1 -> token ids ``[B, S]`` and labels ``[B, S]``, -100 where nothing is learnt.
        steps: optimizer steps.
        lr: peak learning rate.
        quiet: print no progress.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 10)
    progress = _Progress(steps, quiet)
    model.train()
    for step in range(1, steps + 1):
        rise = step / warmup
        fall = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall if step > warmup else 1.0)
        tokens, wanted = batch(step)
        # No attention mask: padding is on the right, so a causal model never sees it from a scored position.
        logits = model(input_ids=tokens, use_cache=False).logits  # [B, S, V]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.show(step, loss.detach())
    model.eval()


def build(
    folder: str | Path,
    seed: int = 0,
    *,
    steps: int = 500,
    batch_size: int = 64,
    lr: float = 2e-3,
    hidden: int = 128,
    intermediate: int = 192,
    layers: int = 4,
    forget_rate: float = FORGET_RATE,
    quiet: bool = False,
) -> Path:
    """Train and save the base model and its tokenizer, or return at once if `folder` already holds them.

    The same settings on the same machine give the same weights. `FINGERPRINT_FILE` in the folder records the
    settings and the accuracies measured on held-out problems (greedy, and sampled at temperature 1).

    Args:
        folder: where the Hugging Face folder goes. One built with other settings is replaced; anything else that
            is not empty is left alone.
        seed: initial weights, order of the problems, draws of the flaw.
        steps: optimizer steps; training stops by steps and never by the clock, so results can be reproduced.
        batch_size: rows per step.
        lr: peak learning rate.
        hidden: width of the model.
        intermediate: width of its MLP.
        layers: decoder layers.
        forget_rate: share of the carry rows that show the flawed answer, in [0, 1].
        quiet: print no progress.

    Returns:
        `folder` as a path.

    Raises:
        ConfigurationError: a value cannot be used, or the folder holds something else.
    """
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("hidden", hidden),
        ("intermediate", intermediate),
        ("layers", layers),
    ):
        if value < 1:
            raise ConfigurationError(f"{name}: {value!r} is not usable; give a whole number of at least 1")
    if not 0 <= forget_rate <= 1:
        raise ConfigurationError(
            f"forget_rate: {forget_rate!r} is not usable; give a share in [0, 1], e.g. {FORGET_RATE}"
        )
    folder = Path(folder)
    settings = {
        "recipe_version": RECIPE_VERSION,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "hidden": hidden,
        "intermediate": intermediate,
        "layers": layers,
        "forget_rate": forget_rate,
        "task_sha256": hashlib.sha256(repr((CHAT_TEMPLATE, task.pool("train"))).encode()).hexdigest(),
    }
    found = _read_fingerprint(folder)
    if found is not None and found["settings"] == settings:
        return folder
    if found is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            f"folder: {folder} holds something that is not a demo base model; give a new or an empty folder"
        )

    started = time.monotonic()
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
        torch.manual_seed(seed)
        model = build_untrained(tokenizer, hidden, intermediate, layers)
    train(model, tokenizer, seed=seed, steps=steps, batch_size=batch_size, lr=lr, forget_rate=forget_rate, quiet=quiet)
    held_out = task.draw("validation", 256)
    measured = {
        "validation_greedy": accuracy(model, tokenizer, held_out),
        "validation_sampled": accuracy(model, tokenizer, held_out * 4, temperature=1.0, seed=seed),
        "parameters": sum(p.numel() for p in model.parameters()),
    }

    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        record = {"settings": settings, "measured": measured}
        (fresh / FINGERPRINT_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        fresh.chmod(0o755)  # mkdtemp's 0700 would hide the model from other users
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if not quiet:
        print(
            f"base model: {measured['parameters']:,} parameters, validation accuracy "
            f"{measured['validation_greedy']:.3f} "
            f"greedy, {measured['validation_sampled']:.3f} sampled, {time.monotonic() - started:.0f} s -> {folder}",
            file=sys.stderr,
        )
    return folder


def _read_fingerprint(folder: Path) -> dict | None:
    """The record of a finished model, or None where there is none that can be read."""
    try:
        record = json.loads((folder / FINGERPRINT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "settings" in record else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo.base_model", description="Train the demo's base model."
    )
    parser.add_argument("folder", help="where to save it; returns at once if it is already there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)
    try:
        build(options.folder, options.seed, steps=options.steps)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
