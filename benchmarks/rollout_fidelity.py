"""What a rollout engine in 16 bits computes of the policy that trains, by sync mode, rounding and type.

    python -m benchmarks.rollout_fidelity [--setting smollm2] [--gradient sft] [--steps 1 5 12 24] [--seed 0]
    python -m benchmarks.rollout_fidelity --write docs/sync-fidelity.md

A hybrid model trains in float32 on the CPU: LoRA and full modules at their own rates, AdamW, a random allocation of
10 %. At the steps asked for, its weights are turned into those of a rollout engine by the plugin's own sync modes and
put into a plain model that computes in float32 too, so that nothing but the rounding of weights differs. On held-out
rows three policies are compared: the base, the trainer's and the rollout's. Each run adds to
``outputs/benchmarks/rollout_fidelity``; ``--write`` makes the page's tables of all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.fidelity.gradients import GRADIENTS, SETTINGS, Rows, Setting
from benchmarks.pages import save_figures, write_page
from benchmarks.sync_sizes import draw_allocation
from hybrid_lora_plugin.names import split_factor
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.training.apply import apply_allocation, parts_of, trainable_groups
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding

RANK, ALPHA, RATIO = 16, 32, 0.1
STEPS = (1, 5, 12, 24)
OUT = Path("outputs/benchmarks/rollout_fidelity")
BEGIN, END = "<!-- measured by benchmarks/rollout_fidelity.py -->", "<!-- end of the measured part -->"


@dataclass(frozen=True)
class Variant:
    """One way to fill a rollout engine. ``receiver_merge`` and ``sparse_merge`` hold the bits of ``merge``."""

    mode: str
    dtype: torch.dtype
    rounding: str

    @property
    def label(self) -> str:
        return f"{self.mode}, {str(self.dtype).removeprefix('torch.')}, {self.rounding}"


#: ``merge`` to nearest is also what verl's own merge does, ``adapter`` to nearest what verl's own adapter gets
VARIANTS = [
    Variant(mode, dtype, rounding)
    for mode in ("merge", "adapter")
    for dtype in (torch.bfloat16, torch.float16)
    for rounding in ("nearest", "stochastic")
]


class Study:
    """A model in training beside a base and a rollout model."""

    def __init__(self, setting: Setting, gradient: str, rates: tuple[float, float], seed: int):
        torch.manual_seed(seed)
        self.setting, self.seed = setting, seed
        config = AutoConfig.from_pretrained(setting.folder)
        allocation = draw_allocation(config, setting.name, rank=RANK, ratio=RATIO, seed=seed)
        plain = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32)
        self.rollout = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32).eval()
        self.base = {name: tensor.clone() for name, tensor in self.rollout.state_dict().items()}
        self.model = apply_allocation(plain, allocation, rank=RANK, alpha=ALPHA).eval()
        groups = trainable_groups(self.model)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in groups[kind]], "lr": lr}
                for kind, lr in zip(("lora", "full"), rates, strict=True)
            ],
            weight_decay=0.01,
        )
        self.losses = GRADIENTS[gradient](setting, self.model, seed)
        self.of_base = self.policy(self.rollout)
        self.step = 0
        #: merged weights of earlier steps, by type
        self.earlier: dict[int, dict[torch.dtype, dict[str, torch.Tensor]]] = {}

    def train_one(self) -> None:
        loss = next(self.losses)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def policy(self, model) -> torch.Tensor:
        """[T, V] log-probabilities at every scored position of the held-out rows."""
        rows: Rows = self.setting.held_out
        logits = model(input_ids=rows.tokens, use_cache=False).logits[:, :-1]
        return log_softmax(logits[rows.labels[:, 1:] != -100].double(), -1)

    def sent(self, variant: Variant) -> dict[str, torch.Tensor]:
        rounding = Rounding("stochastic", self.seed) if variant.rounding == "stochastic" else NEAREST
        stream = sync_mode(variant.mode).outgoing(self.model, SyncPlan(ALPHA / RANK, variant.dtype, "cpu", rounding))
        return {name: tensor.clone() for name, tensor in stream}

    @torch.no_grad()
    def as_held(self, sent: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Trained weights as the engine computes with them, float32: a LoRA kernel's sum, or the merged weight."""
        held, factors = {}, {}
        for name, tensor in sent.items():
            factor = split_factor(name)
            if factor is None:
                held[name] = tensor.float()
            else:
                factors.setdefault(factor[0], {})[factor[1]] = tensor.float()
        for module, pair in factors.items():
            name = f"{module}.weight"
            held[name] = self.base[name] + ALPHA / RANK * (pair["B"] @ pair["A"])
        return held

    def measure(self) -> Iterator[dict]:
        """What each variant holds now."""
        of_trainer = self.policy(self.model)
        lora = {f"{module}.weight" for module in parts_of(self.model).lora_modules}
        exact = self.as_held(self.sent(Variant("merge", torch.float32, "nearest")))
        moved_kl = _kl(of_trainer, self.of_base)
        labels = self.setting.held_out.labels[:, 1:]
        picked = labels[labels != -100][:, None]
        trained = (of_trainer - self.of_base).gather(1, picked)
        for variant in VARIANTS:
            held = self.as_held(self.sent(variant))
            with torch.no_grad():
                for name, parameter in self.rollout.named_parameters():
                    parameter.copy_(held.get(name, self.base[name]))
            of_rollout = self.policy(self.rollout)
            sampled = (of_rollout - self.of_base).gather(1, picked)
            row = {
                "step": self.step, "mode": variant.mode, "rounding": variant.rounding,
                "dtype": str(variant.dtype).removeprefix("torch."),
                "kl_ratio": _kl(of_trainer, of_rollout) / moved_kl, "moved_kl": moved_kl,
                "slope": ((sampled * trained).sum() / trained.square().sum()).item(),
            }  # fmt: skip
            row |= self._arrived(held, exact, lora)
            yield row

    def _arrived(self, held, exact, lora) -> dict[str, float]:
        sums = {"lora": [0.0, 0.0], "full": [0.0, 0.0]}
        differ = total = 0
        for name, weight in held.items():
            update = exact[name] - self.base[name]
            moved = weight - self.base[name]
            kind = "lora" if name in lora else "full"
            sums[kind][0] += moved.flatten().dot(update.flatten()).item()
            sums[kind][1] += update.flatten().dot(update.flatten()).item()
            differ, total = differ + moved.count_nonzero().item(), total + moved.numel()
        arrived = {f"arrived_{kind}": product / square if square else 0.0 for kind, (product, square) in sums.items()}
        return arrived | {"differ": differ / total}

    def keep(self, step: int) -> None:
        self.earlier[step] = {
            dtype: self.sent(Variant("merge", dtype, "stochastic")) for dtype in (torch.bfloat16, torch.float16)
        }

    def changed(self, since: int) -> dict[str, float]:
        """Share of all of the model's elements that differ between two merges with fixed thresholds."""
        now, shares = {}, {}
        for dtype, before in self.earlier[since].items():
            now = self.sent(Variant("merge", dtype, "stochastic"))
            differ = sum((tensor != before[name]).sum().item() for name, tensor in now.items())
            shares[str(dtype).removeprefix("torch.")] = differ / sum(tensor.numel() for tensor in now.values())
        return shares


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean over positions of KL(p ‖ q), nats; [T, V] log-probabilities."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def run(arguments) -> Iterator[dict]:
    """All that is known after each of the wanted steps, so that what a long run has measured is never lost."""
    setting = SETTINGS[arguments.setting](arguments.cache, arguments.seed)
    rates = tuple(arguments.rates or setting.rates)
    study, started = Study(setting, arguments.gradient, rates, arguments.seed), time.monotonic()
    wanted, rows, changes = set(arguments.steps), [], []
    result = {
        "setting": setting.name, "gradient": arguments.gradient, "seed": arguments.seed, "torch": torch.__version__,
        "rates": rates, "rank": RANK, "alpha": ALPHA, "ratio": RATIO, "rows": rows, "changes": changes,
    }  # fmt: skip
    for step in range(1, max(wanted) + 1):
        for apart in (1, 4):
            if step - 1 + apart in wanted and step > 1:
                study.keep(step - 1)
        study.train_one()
        if step in wanted:
            rows += study.measure()
            for apart in (1, 4):
                if step - apart in study.earlier:
                    changes.append({"step": step, "apart": apart} | study.changed(step - apart))
            study.earlier.clear()
            yield result
        if step in wanted or step % 10 == 0:
            print(f"step {step} of {max(wanted)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


NAMES = {
    "sft": "supervised gradients",
    "sign": "supervised gradients with a random sign for each row",
    "gspo": "GSPO on sampled responses and their rewards",
}


def page(results: list[dict]) -> str:
    """Markdown of everything measured, one table for a setting, gradient and seed."""
    parts = []
    for result in results:
        lora, full = result["rates"]
        parts.append(
            f"**{result['setting']}, {NAMES[result['gradient']]}**, seed {result['seed']}; AdamW at {lora:g} (LoRA) "
            f"and {full:g} (full), LoRA rank {result['rank']}, alpha {result['alpha']}, a random {result['ratio']:.0%} "
            f"fully tuned; torch {result['torch']} on two CPU cores."
        )
        lines = [
            "| step | rollout weights | differ from W0 | arrived, LoRA | arrived, full | slope | KL ratio |",
            "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in result["rows"]:
            lines.append(
                f"| {row['step']} | {row['mode']}, {row['dtype']}, {row['rounding']} | {row['differ']:.1%} | "
                f"{row['arrived_lora']:.3f} | {row['arrived_full']:.3f} | {row['slope']:.3f} | {row['kl_ratio']:.4f} |"
            )
        parts.append("\n".join(lines))
        if result["changes"]:
            lines = ["| step | steps since the last sync | changed in bfloat16 | changed in float16 |"]
            lines.append("| ---: | ---: | ---: | ---: |")
            for row in result["changes"]:
                lines.append(f"| {row['step']} | {row['apart']} | {row['bfloat16']:.2%} | {row['float16']:.2%} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", choices=SETTINGS, default="smollm2")
    parser.add_argument("--gradient", choices=GRADIENTS, default="sft", help="gspo: with the demo's model only")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="optimizer steps to look after")
    parser.add_argument("--rates", type=float, nargs=2, metavar=("LORA", "FULL"), help="other learning rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", type=Path, help="page to put the tables of all runs in --out into; runs nothing")
    arguments = parser.parse_args(argv)
    if arguments.gradient == "gspo" and arguments.setting != "demo":
        parser.error("--gradient: 'gspo' samples from the demo's model; give --setting demo")
    if arguments.write:
        files = sorted(arguments.out.glob("*.json"))
        if not files:
            parser.error(f"--out: {str(arguments.out)!r} holds no results; run the benchmark first")
        write_page(arguments.write, page([json.loads(file.read_text()) for file in files]), BEGIN, END)
        return 0
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for result in run(arguments):
        lora, full = result["rates"]
        name = f"{arguments.setting}-{arguments.gradient}-{lora:g}-{full:g}-{arguments.seed}"
        save_figures(arguments.out, name, result)
    print(page([result]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
