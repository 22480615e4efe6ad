"""Models to train and the gradients to train them with: supervised ones, and those of reinforcement learning."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_lora_plugin.verl_backend.losses import gspo_sequence_losses
from recipes import probe_smollm2
from recipes.demo import base_model, task
from recipes.demo.reward import compute_score

#: rows of one step; sampled responses to one prompt
ROWS, GROUP = 2, 8


@dataclass(frozen=True)
class Rows:
    """Token rows padded on the right, where a causal model never sees it from a scored position."""

    #: [N, S]
    tokens: torch.Tensor
    #: [N, S], -100 where nothing is scored
    labels: torch.Tensor

    def __getitem__(self, picked) -> Rows:
        return Rows(self.tokens[picked], self.labels[picked])

    def losses(self, model) -> torch.Tensor:
        """[N] mean negative log-likelihood of each row's scored tokens."""
        logits = model(input_ids=self.tokens, use_cache=False).logits[:, :-1].float()
        wanted = self.labels[:, 1:]
        losses = cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        return losses.sum(1) / (wanted != -100).sum(1).clamp(min=1)


@dataclass(frozen=True)
class Setting:
    """A model on the bfloat16 grid, what it is trained on and at which rates."""

    name: str
    folder: Path
    #: of LoRA and of full modules
    rates: tuple[float, float]
    train: Rows
    held_out: Rows

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder)


def _on_the_grid(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint in bfloat16, once."""
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def smollm2(cache: Path, seed: int) -> Setting:
    """SmolLM2-135M-Instruct on word problems with worked answers, at the paper's rates."""
    plain = probe_smollm2.convert(probe_smollm2.find_gguf(), cache / "smollm2-135m")
    folder = _on_the_grid(plain, cache / "smollm2-135m-bf16")
    file = probe_smollm2.write_rows(cache / "fidelity-rows.jsonl", seed)
    chats = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        rows.append((len(tokenizer(prompt)["input_ids"]), tokenizer(whole)["input_ids"]))
    width = max(len(ids) for _, ids in rows)
    tokens, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, ids) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
    whole = Rows(tokens, labels)
    return Setting("SmolLM2-135M", folder, (2.5e-5, 1e-6), whole[8:], whole[:8])


def demo(cache: Path, seed: int) -> Setting:
    """The demo's model on its additions, at the demo's rates."""
    plain = cache / "fidelity-demo-model"
    base_model.build(plain)
    folder = _on_the_grid(plain, cache / "fidelity-demo-bf16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = {}
    for split in task.SPLITS:
        problems = task.pool(split)
        rows[split] = Rows(*base_model.encode_rows(tokenizer, problems, [problem.answer for problem in problems]))
    return Setting("demo", folder, (6e-4, 1e-4), rows["train"], rows["validation"][:64])


SETTINGS = {"smollm2": smollm2, "demo": demo}


def supervised(setting: Setting, model, seed: int) -> Iterator[torch.Tensor]:
    """One loss after the other: the likelihood of worked answers."""
    order = random.Random(seed)
    while True:
        yield setting.train[order.sample(range(len(setting.train.tokens)), ROWS)].losses(model).mean()


def signed(setting: Setting, model, seed: int) -> Iterator[torch.Tensor]:
    """The same with each row's sign drawn, as advantages of ±1 are: updates hardly add up."""
    order = random.Random(seed)
    while True:
        losses = setting.train[order.sample(range(len(setting.train.tokens)), ROWS)].losses(model)
        yield (losses * torch.tensor([order.choice((-1.0, 1.0)) for _ in range(ROWS)])).mean()


def gspo(setting: Setting, model, seed: int) -> Iterator[torch.Tensor]:
    """Real ones on the demo's task: sampled responses, their rewards, advantages within groups, the plugin's GSPO."""
    tokenizer, order, problems = setting.tokenizer(), random.Random(seed), task.pool("train")
    sampling = torch.Generator().manual_seed(seed)
    while True:
        asked = [problem for problem in order.sample(problems, 32) for _ in range(GROUP)]
        answers = base_model.respond(model, tokenizer, asked, 1.0, sampling)
        rewards = [
            compute_score(task.DATA_SOURCE, answer, problem.answer)["score"]
            for problem, answer in zip(asked, answers, strict=True)
        ]
        groups = torch.tensor(rewards).view(-1, GROUP)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()
        rows = Rows(*base_model.encode_rows(tokenizer, asked, answers))
        logits = model(input_ids=rows.tokens, use_cache=False).logits[:, :-1]
        mask = (rows.labels[:, 1:] != -100).float()
        log_probs = logits.log_softmax(-1).gather(2, rows.tokens[:, 1:, None])[..., 0] * mask
        spread = advantages[:, None].expand_as(mask)
        yield gspo_sequence_losses(log_probs, log_probs.detach(), spread, mask, 3e-4, 4e-4)[0].mean()


GRADIENTS = {"sft": supervised, "sign": signed, "gspo": gspo}
