"""``hybrid-lora-export``: a plain Hugging Face folder from a checkpoint of a hybrid run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hybrid_lora_plugin.cli.arguments import expand_home, parse, print_help, report_error, require_given, wants_help
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.config import ExportCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError

PROGRAM = "hybrid-lora-export"
SUMMARY = (
    "Merges what a hybrid run trained (full weights and LoRA factors, kept in fp32 beside the checkpoint) into the "
    "base model and writes a folder that AutoModelForCausalLM and vLLM load. Merged in fp32 and rounded once, by "
    "default to the weights that the run's rollout engine got at that step."
)
EXAMPLE = f"{PROGRAM} checkpoint=checkpoints/hybrid_lora/run/global_step_500 output_dir=exported"


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments; returns 0, or 2 on a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, ExportCommandConfig)
    try:
        config = expand_home(parse(argv, ExportCommandConfig))
        require_given(config, {"checkpoint": "FOLDER", "output_dir": "FOLDER"})
        validate(config)
        # Late, so that --help and a mistyped option answer at once.
        from hybrid_lora_plugin.training.export import export_checkpoint

        with writing():
            exported = export_checkpoint(
                config.checkpoint, config.output_dir, config.base, config.trust_remote_code, config.dtype
            )
    except ConfigurationError as error:
        return report_error(PROGRAM, error)
    folder = str(exported.folder)
    print(exported.kept)
    print(f"model written to {folder}; load it with AutoModelForCausalLM.from_pretrained({folder!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
