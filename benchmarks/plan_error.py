"""How far ``hybrid-lora-plan`` is from what verl's own engines hold: state, and the peak of an update and of a forward.

    python -m benchmarks.plan_error [--ranks 1,2] [--layers 4] [--hidden 192] [--vocabulary 2048] [--tokens 128,256]
                                    [--write docs/plan.md]

The engines are verl's, with FSDP2, its packed rows and its loss, on the CPU. Bytes are those of tensors that are alive,
seen at every operation, forward and backward, of FSDP's buffers too. Two things are not those of a GPU: attention is
the plan's stand-in, which holds what a fused kernel holds, and cross entropy is torch's, row by row, which verl takes
without flash-attn and the plan knows. Not seen on a CPU: workspaces of kernels, gaps of the allocator, contexts, NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import save_figures, write_page
from benchmarks.sync_cost import make_model
from hybrid_lora_plugin.plan.live_bytes import LiveBytes

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured by benchmarks/plan_error.py -->", "<!-- end of the measured part -->"
LABELS = {"hybrid": "Hybrid-LoRA", "lora": "verl, LoRA", "full": "verl, full fine-tuning"}


# -- on one rank ------------------------------------------------------------------------------------------------------


def measure(shape: argparse.Namespace) -> None:
    """Measure every variant beside its plan, and leave the rows in ``rows-RANKS.json`` (rank 0)."""
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.utils.distributed import initialize_global_process_group

    from benchmarks.training import engines
    from hybrid_lora_plugin.plan.activations import register_attention

    _, rank, ranks = initialize_global_process_group()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    folder = shape.output / "plan-error"
    attention, rows = register_attention(), []
    for checkpointing in (True, False):
        for variant in LABELS:
            engine = packed_engine(variant, folder, attention, checkpointing)
            loss = engines.policy_loss()
            for tokens in shape.tokens:
                batch = packed(engines.make_batch(1, 2, tokens, shape.vocabulary, rank, ranks))
                engines.update(engine, batch, loss)  # lazy parts, and the optimizer's state
                held = engines.held_bytes(engine, batch, loss)
                peaks = {
                    "update": peak(engine, partial(engines.update, engine, batch, loss)),
                    "log-probabilities": peak(engine, partial(engines.log_probs, engine, batch, False)),
                }
                planned = plan_of(variant, folder, ranks, tokens, checkpointing)
                case = {"variant": variant, "ranks": ranks, "tokens": tokens, "checkpointing": checkpointing}
                rows.append(case | {"held": held, "peaks": peaks, "planned": planned})
                if rank == 0:
                    # Of a run that is cut short there are those that were measured.
                    save_figures(folder, f"rows-{ranks}", rows)
            del engine
    torch.distributed.destroy_process_group()


def packed_engine(variant: str, folder: Path, attention: str, checkpointing: bool) -> Any:
    """verl's engine of a variant, with packed rows and attention that holds what a fused kernel does."""
    from unittest import mock

    from verl.workers.config import HFModelConfig

    from benchmarks.training import engines

    def config(**options: Any) -> HFModelConfig:
        options |= {"use_remove_padding": True, "override_config": {"attn_implementation": attention}}
        return HFModelConfig(**options)

    with mock.patch("verl.workers.config.HFModelConfig", config):
        return engines.build_engine(
            variant, str(folder / "model"), str(folder / "allocation"), precision="bf16", checkpointing=checkpointing
        )


def packed(batch: Any) -> Any:
    """The batch with its rows packed into one, as on a GPU."""
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor(batch, use_remove_padding=True)
    return batch


def peak(engine: Any, action) -> int:
    """Most bytes alive in ``action`` over what the engine holds between steps."""
    states = [value for state in engine.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    snapshot = getattr(engine, "_base_snapshot", None)
    held = [*engine.module.parameters(), *engine.module.buffers(), *states]
    held += [] if snapshot is None else snapshot.values.values()
    live = LiveBytes([getattr(tensor, "_local_tensor", tensor) for tensor in held])
    with live:
        action()
    return live.peak


def plan_of(variant: str, folder: Path, ranks: int, tokens: int, checkpointing: bool) -> dict[str, Any]:
    """The plan of the same run, in the parts that were measured."""
    from transformers import AutoConfig

    from benchmarks.training.engines import ALPHA, RANK
    from hybrid_lora_plugin.config import HybridLoraConfig
    from hybrid_lora_plugin.plan.model import planned_model
    from hybrid_lora_plugin.plan.planner import Machine, make_plan
    from hybrid_lora_plugin.plan.run import Pass, Run

    run = Run(
        training=variant,
        nodes=1,
        gpus_per_node=ranks,
        shard_ranks=ranks,
        strategy="fsdp2",
        stored_dtype="bfloat16",
        held_dtype="bfloat16" if variant == "hybrid" else "float32",
        compute_dtype="bfloat16",
        reduce_dtype="float32",
        update=Pass(tokens),
        log_probs=Pass(tokens),
        sequences=2 * ranks,
        mini_batches=1,
        prompt_tokens=tokens // 2,
        response_tokens=tokens // 2,
        checkpointing=checkpointing,
        fused_cross_entropy=False,
        lora_rank=0 if variant == "full" else RANK,
        lora_alpha=ALPHA,
        hybrid=HybridLoraConfig(allocation=str(folder / "allocation")) if variant == "hybrid" else None,
    )
    model = planned_model(AutoConfig.from_pretrained(folder / "model"), run, variant)
    plan = make_plan(model, run, Machine(80e9, 0, None, 312, 0.4), variant)
    lasting = {"frozen", "trained", "moments", "reference"}
    state = plan.state
    return {
        "held": {
            "parameters": state.frozen + state.trained,
            "gradients": state.gradients,
            "optimizer": state.moments,
            "reference": state.reference,
        },
        "peaks": {
            phase.name: sum(size for name, size in phase.parts.items() if name not in lasting) for phase in plan.phases
        },
        "moments": {phase.name: phase.moment for phase in plan.phases},
    }


# -- report -----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    shape, rows = result["shape"], result["rows"]
    held = [
        (measured, row["planned"]["held"][name])
        for row in rows
        for name, measured in row["held"].items()
        if measured or row["planned"]["held"][name]
    ]
    worst = max(abs(planned / measured - 1) for measured, planned in held)
    errors = [row["planned"]["peaks"][name] / size - 1 for row in rows for name, size in row["peaks"].items()]
    lines = [
        f"verl's engines on {result['machine']}: a Qwen2 of {shape['layers']} layers of width {shape['hidden']} and "
        f"{shape['vocabulary']:,} tokens, bf16, FSDP2, micro-batches of one packed row. What a rank holds of weights, "
        f"gradients, optimizer and reference was planned within {worst:.2%} in all {len(held)} figures. Beside it, the "
        f"peak over what is held between steps, in MB; errors from {min(errors):+.1%} to {max(errors):+.1%}.",
        "",
        "| ranks | variant | tokens | recomputed | update, measured | planned | error | forward, measured | planned | "
        "error |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = []
        for name in ("update", "log-probabilities"):
            measured, planned = row["peaks"][name], row["planned"]["peaks"][name]
            cells += [f"{measured / 1e6:.1f}", f"{planned / 1e6:.1f}", f"{planned / measured - 1:+.1%}"]
        lines.append(
            f"| {row['ranks']} | {LABELS[row['variant']]} | {row['tokens']:,} | "
            f"{'yes' if row['checkpointing'] else 'no'} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns 0, or the status of a failed run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_error", description=__doc__.splitlines()[0])
    for name, default, text in (
        ("layers", 4, "of the model"),
        ("hidden", 192, "width, a multiple of 192"),
        ("vocabulary", 2048, "rows of the embedding"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--tokens", default="128,256", help="of a micro-batch, one case each (default: 128,256)")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, one run each (default: 1,2)")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder (default: outputs/bench)")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this page")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    shape.output, shape.tokens = shape.output.resolve(), [int(tokens) for tokens in shape.tokens.split(",")]
    if shape.inside:
        measure(shape)
        return 0
    from benchmarks.training.on_ranks import machine
    from recipes.demo.environment import cpu_environment

    folder = shape.output / "plan-error"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_model(folder, shape)
    rows = []
    for ranks in shape.ranks.split(","):
        print(f"{ranks} ranks: {2 * len(LABELS)} engines", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        command += ["benchmarks.plan_error", *(sys.argv[1:] if arguments is None else arguments), "--inside"]
        with (folder / f"{ranks}.log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, env=cpu_environment(), stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            print(f"plan_error: {ranks} ranks: exit status {done.returncode}; see {log.name}", file=sys.stderr)
            return done.returncode
        rows += json.loads((folder / f"rows-{ranks}.json").read_text(encoding="utf-8"))
    figures = {name: value for name, value in vars(shape).items() if isinstance(value, int)}
    result = {"machine": machine(), "shape": figures, "rows": rows}
    text = report(result)
    save_figures(shape.output, "plan_error", result)
    if shape.write:
        write_page(shape.write, text, BEGIN, END)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
