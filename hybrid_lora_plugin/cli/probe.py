"""``hybrid-lora-probe``: score every candidate module of a model and write an allocation."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_lora_plugin.cli.arguments import (
    expand_home,
    given_options,
    parse,
    print_help,
    report_error,
    require_given,
    wants_help,
)
from hybrid_lora_plugin.cli.command import command
from hybrid_lora_plugin.cli.result import print_result
from hybrid_lora_plugin.config import WITHOUT_PROBE, ProbeCommandConfig
from hybrid_lora_plugin.config_effect import COMMAND, PROBE, SELECTION, refuse_without_effect
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError

if TYPE_CHECKING:
    from hybrid_lora_plugin.probing.distributed import Ranks
    from hybrid_lora_plugin.probing.progress import Progress

PROGRAM = "hybrid-lora-probe"
SUMMARY = (
    "Attaches SVD-style LoRA to every q, k, v, o, gate, up and down projection (also packed ones), warms it up, scores "
    "each module and writes an allocation: the modules to fine-tune fully within the budget, and those that get LoRA. "
    "Ctrl-C keeps the state; the same command continues. Several GPUs: torchrun --nproc-per-node=8 -m "
    "hybrid_lora_plugin.cli.probe key=value ..., with the base model sharded over them."
)
EXAMPLE = f"{PROGRAM} model.path=Qwen/Qwen2.5-1.5B-Instruct 'probe.files=[train.jsonl]' output_dir=outputs/probe"


ALIASES = {"data.files": "probe.files"}


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: ``key=value`` arguments; those of the process by default.

    Returns:
        0 on success, 2 on a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, ProbeCommandConfig)
    try:
        config = expand_home(parse(argv, ProbeCommandConfig, ALIASES))
        _check(config, given_options(argv, ALIASES))
    except ConfigurationError as error:
        # Under torchrun one process speaks for all.
        return report_error(PROGRAM, error) if os.environ.get("RANK", "0") == "0" else 2
    return probe(config, resume_command=shlex.join([PROGRAM, *argv]), program=PROGRAM)


def _check(config: ProbeCommandConfig, given: list[str]) -> None:
    """What can be known to fail before torch is there."""
    examples = {"model.path": "Qwen/Qwen2.5-1.5B-Instruct"}
    if not config.probe.dry_run:
        examples["output_dir"] = "outputs/probe"
    if config.criterion not in WITHOUT_PROBE and config.probe.objective == "sft":
        examples["probe.files"] = "[train.jsonl]"
    require_given(config, examples)
    validate(config)
    refuse_without_effect(config, given, (*COMMAND, *PROBE, *SELECTION))


def probe(config: ProbeCommandConfig, *, resume_command: str, program: str) -> int:
    """Run the probe with progress on standard error and the result on standard output.

    Args:
        config: what to probe.
        resume_command: what continues an interrupted run, for the message.
        program: name before an error.

    Returns:
        The exit status, as ``main``.
    """
    # Late, so that --help and a mistyped option answer at once.
    from hybrid_lora_plugin.probing import distributed as processes
    from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted
    from hybrid_lora_plugin.probing.progress import Progress, for_terminal
    from hybrid_lora_plugin.probing.runner import probe_model

    try:
        ranks = processes.start()
    except ConfigurationError as error:
        return report_error(program, error)
    progress = for_terminal() if ranks.first else Progress()
    try:
        if config.probe.dry_run:
            return _show_rows(config, progress, ranks)
        allocation = probe_model(config, progress, ranks, _memory_teller(config, progress, ranks))
    except ConfigurationError as error:
        progress.close()
        return 2 if getattr(error, "reported_by_first_rank", False) else report_error(program, error)
    except KeyboardInterrupt as interrupt:
        progress.close()
        kept = f"state kept in {interrupt.folder}" if isinstance(interrupt, ProbeInterrupted) else "nothing new saved"
        if ranks.first:
            again = resume_command if ranks.size == 1 else "the same torchrun command"
            print(f"{program}: interrupted, {kept}; to continue, run: {again}", file=sys.stderr)
        return 128 + (interrupt.signum if isinstance(interrupt, ProbeInterrupted) else signal.SIGINT)
    progress.close()
    if ranks.first:
        print_result(Path(config.output_dir), allocation)
    processes.finish(ranks)
    return 0


def _memory_teller(config: ProbeCommandConfig, progress: Progress, ranks: Ranks) -> Callable[[int], None]:
    """Says what the probe will need; it ends nothing, since every token of a row is taken to be trained."""

    def tell(longest: int) -> None:
        from hybrid_lora_plugin.plan.probe_memory import GIB, known_beforehand, probe_memory, what_fits
        from hybrid_lora_plugin.probing.distributed import device_bytes
        from hybrid_lora_plugin.probing.loading import load_model_config, probed_dtype

        model_config, there = load_model_config(config.model), device_bytes(ranks.device)
        if not known_beforehand(model_config):
            progress.note("what this probe needs of memory is not known beforehand: the model has recurrent layers")
            return
        rows = replace(config, probe=replace(config.probe, max_length=longest))
        given = model_config, rows, probed_dtype(config.model, ranks.device), ranks.size
        memory = probe_memory(*given)
        progress.note(memory.line(there, ranks.device.type))
        if memory.needed > there:
            fits = what_fits(*given, there)
            way_out = f"it fits with {fits}" if fits else "use more GPUs, or a shorter probe.max_length"
            progress.note(
                f"{(memory.needed - there) / GIB:.2f} GiB too many, if every token of a row of {longest:,} is trained; "
                f"{way_out}"
            )

    return tell


def _show_rows(config: ProbeCommandConfig, progress: Progress, ranks: Ranks) -> int:
    from hybrid_lora_plugin.probing import distributed as processes
    from hybrid_lora_plugin.probing.prepare import dry_run

    text = ranks.from_first(lambda: dry_run(config, progress))
    progress.close()
    if ranks.first:
        print(text)
    processes.finish(ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
