"""Toy bases: small Qwen2 models of transformers, trained from random weights to add, kept in a folder."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.replicas.settings import BaseSettings
from hybrid_lora_plugin.evidence.replicas.tasks import BASE_TASK, VOCABULARY, Problems
from hybrid_lora_plugin.seeding import generator_for

#: share of the steps in which the rate rises; afterwards it falls along a cosine to a tenth
WARMUP = 0.05
REPORT_EVERY = 250
_WEIGHTS = "model.safetensors"


def base_config(settings: BaseSettings) -> Qwen2Config:
    """The transformers config of a base; embedding and head are one."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def random_base(settings: BaseSettings) -> Qwen2ForCausalLM:
    """A base with random weights, float32 on the CPU, by its seed alone: N(0, 0.02²), biases 0, norms 1."""
    model = Qwen2ForCausalLM(base_config(settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                draws = generator_for(f"replicas/base/{settings.seed}/{name}")
                parameter.normal_(std=model.config.initializer_range, generator=draws)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def answer_logits(model: torch.nn.Module, problems: Tensor, answer_tokens: int) -> Tensor:
    """Logits ``[B, answer_tokens, V]`` of the tokens of the answers; ``problems`` ``[B, tokens]`` int64."""
    return model(input_ids=problems[:, :-1], use_cache=False, logits_to_keep=answer_tokens).logits


def train_base(
    settings: BaseSettings, problems: Problems, device: torch.device, say: Callable[[str], None]
) -> Qwen2ForCausalLM:
    """Train a base to add: AdamW (betas 0.9, 0.98), warm-up and cosine, gradient norm at most 1."""
    model, tokens = random_base(settings).to(device).train(), problems.layout.answer_tokens
    data = problems.drawn(BASE_TASK, settings.seed, "base", settings.steps, settings.batch_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, int(WARMUP * settings.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, settings.steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(settings.steps):
        batch = data[step].long()
        logits = answer_logits(model, batch, tokens)
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, -tokens:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % REPORT_EVERY == 0:
            say(f"base {settings.name}: step {step + 1} of {settings.steps}, loss {loss.item():.4f}")
    held_out = problems.held_out(BASE_TASK).to(device).long()
    with torch.no_grad():
        right = answer_logits(model.eval(), held_out, tokens).argmax(-1) == held_out[:, -tokens:]
    say(f"base {settings.name}: {right.all(-1).double().mean():.1%} of the held-out sums are right")
    return model.cpu()


def train_policy(
    base: Qwen2ForCausalLM,
    problems: Problems,
    task: str,
    *,
    target: float,
    lr: float,
    most_steps: int,
    device: torch.device,
    say: Callable[[str], None],
) -> Qwen2ForCausalLM:
    """A base trained on a task until it is right now and then: plain AdamW on all weights, 64 problems a step.

    Args:
        base: stays as it is.
        problems, task: what it learns; looked at every 5 steps on the held-out problems.
        target: mean probability of the right answer at which it stops.
        lr, most_steps: of the training.
        device: where.
        say: told how it went.

    Raises:
        ConfigurationError: ``most_steps`` were not enough.
    """
    model, tokens = copy.deepcopy(base).to(device), problems.layout.answer_tokens
    data = problems.drawn(task, 0, "policy", most_steps, 64).to(device)
    held_out = problems.held_out(task).to(device).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(most_steps + 1):
        if step % 5 == 0:
            with torch.no_grad():
                logits = answer_logits(model, held_out, tokens).log_softmax(-1)
            answers = logits.gather(-1, held_out[:, -tokens:, None]).squeeze(-1)
            reward = answers.sum(-1).exp().mean().item()
            if reward >= target:
                say(f"{task}: mean reward {reward:.3f} after {step} steps")
                return model.cpu().eval()
        if step < most_steps:
            batch = data[step].long()
            loss = functional.cross_entropy(
                answer_logits(model, batch, tokens).flatten(0, 1), batch[:, -tokens:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    raise ConfigurationError(
        f"start_reward: {target:g} was not reached on {task} in {most_steps} steps (it is {reward:.3f}); give more "
        f"start_steps, a lower start_reward, or an easier task"
    )


def save_base(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write a base as a checkpoint that transformers reads too, without its progress bars."""
    model.config.save_pretrained(folder)
    save_model(model, str(folder / _WEIGHTS), metadata={"format": "pt"})


def load_base(settings: BaseSettings, folder: Path) -> Qwen2ForCausalLM:
    """A base that ``save_base`` wrote: float32 on the CPU.

    Raises:
        ConfigurationError: there is none, or it has another shape than the settings say.
    """
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"bases: {settings.name} is not in {folder.parent} yet; let the protocol prepare it")
    wanted, found = base_config(settings), Qwen2Config.from_pretrained(folder)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if getattr(wanted, name) != getattr(found, name):
            raise ConfigurationError(
                f"bases: {name} of {settings.name} is {getattr(found, name)} in {folder} and {getattr(wanted, name)} "
                f"in the settings; remove the folder, or give the settings it was made with"
            )
    model = Qwen2ForCausalLM(wanted).eval()
    load_model(model, folder / _WEIGHTS)
    return model


def digest_of(model: torch.nn.Module) -> str:
    """SHA-256 over names and values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
