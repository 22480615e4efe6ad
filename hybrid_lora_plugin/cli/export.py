"""``hybrid-lora-export``: a model that others load, from a checkpoint of a hybrid run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hybrid_lora_plugin.cli.arguments import expand_home, parse, print_help, report_error, require_given, wants_help
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.config import ExportCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError, UsageError

PROGRAM = "hybrid-lora-export"
SUMMARY = (
    "Merges what a hybrid run trained (full weights and LoRA factors, kept in fp32 beside the checkpoint) into the "
    "base model and writes a folder that AutoModelForCausalLM and vLLM load. Merged in fp32 and rounded once, by "
    "default to the weights that the run's rollout engine got at that step. Also writes a PEFT adapter with the full "
    "weights beside it (format=adapter), or the difference to the base model (format=delta), and makes a model of such "
    "a difference again (delta=FOLDER). One weight after the other is read and written, whatever the model's size."
)
EXAMPLE = f"{PROGRAM} checkpoint=checkpoints/hybrid_lora/run/global_step_500 output_dir=exported"


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments.

    Returns:
        0, 2 on a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, ExportCommandConfig)
    try:
        config = expand_home(parse(argv, ExportCommandConfig))
        _check(config)
        return _export(config)
    except ConfigurationError as error:
        return report_error(PROGRAM, error)


def _export(config: ExportCommandConfig) -> int:
    # Late, so that --help and a mistyped option answer at once.
    from transformers.utils import logging

    from hybrid_lora_plugin.cli.export_progress import progress_for
    from hybrid_lora_plugin.training.export import apply_delta, export_checkpoint
    from hybrid_lora_plugin.training.freed_memory import give_back_freed_memory
    from hybrid_lora_plugin.training.model_folder import LARGEST_FILE

    give_back_freed_memory()
    # Its bars are of what takes no time here.
    logging.disable_progress_bar()
    write, source = (apply_delta, config.delta) if config.delta else (export_checkpoint, config.checkpoint)
    progress = progress_for("exporting")
    try:
        with writing():
            exported = write(
                source,
                config.output_dir,
                config.base,
                config.trust_remote_code,
                config.dtype,
                format=config.format,
                largest_file=config.max_shard_size or LARGEST_FILE,
                progress=progress,
            )
    finally:
        progress.close()
    for line in (*exported.notes, exported.kept):
        print(line)
    folder = str(exported.folder)
    print(
        {
            "merged": f"model written to {folder}; load it with AutoModelForCausalLM.from_pretrained({folder!r})",
            "adapter": f"adapter and full weights written to {folder}; load both with the lines in {folder}/README.md",
            "delta": f"difference written to {folder}; {PROGRAM} delta={folder} output_dir=FOLDER makes a model of it",
        }[config.format]
    )
    return 0


def _check(config: ExportCommandConfig) -> None:
    if config.checkpoint and config.delta:
        raise UsageError("checkpoint: given together with delta; give one of them")
    source = {} if config.delta else {"checkpoint": "FOLDER"}
    require_given(config, source | {"output_dir": "FOLDER"})
    validate(config)
    if config.delta and config.format == "delta":
        raise UsageError("format: a delta is exported from a checkpoint, not from a delta; give format=merged")
    if config.max_shard_size and config.format != "merged":
        raise UsageError(
            f"max_shard_size: has no effect with format={config.format}, whose files are few; leave it out"
        )


if __name__ == "__main__":
    sys.exit(main())
