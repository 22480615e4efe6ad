"""``hybrid-lora-evidence``: which selection of modules to trust, by a comparison that is fixed before it is run."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_lora_plugin.cli.arguments import expand_home, parse, print_help, report_error, require_given, wants_help
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.config_evidence import EvidenceCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError

PROGRAM = "hybrid-lora-evidence"
SUMMARY = (
    "Compares ways to choose the fully tuned modules on equal terms: the plan is fixed under a digest before the first "
    "compared run, every arm has learning rates of its own from other seeds, and all share base, data, order and "
    "init. First it asks whether full fine-tuning is better than LoRA at all. One report then says, with intervals, "
    "what is supported, contradicted or not distinguished. Ctrl-C keeps what is done; the same command continues."
)
EXAMPLE = f"{PROGRAM} plan=recipes/evidence/quick.yaml output_dir=outputs/evidence"


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments.

    Returns:
        0, 2 on a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, EvidenceCommandConfig)
    try:
        config = expand_home(parse(argv, EvidenceCommandConfig))
        require_given(config, {"output_dir": "FOLDER"})
        validate(config)
        return _run(config, shlex.join([PROGRAM, *argv]))
    except ConfigurationError as error:
        return report_error(PROGRAM, error)


def _run(config: EvidenceCommandConfig, same_command: str) -> int:
    # Late, so that --help and a mistyped option answer at once.
    from hybrid_lora_plugin.cli.evidence_progress import watch_for
    from hybrid_lora_plugin.evidence.stages import run_stages

    watch = watch_for()
    try:
        with writing():
            run_stages(config, watch)
    except KeyboardInterrupt as interrupt:
        watch.close()
        folder = Path(config.output_dir)
        said = f"what is done is kept in {folder}" if folder.exists() else "nothing was written"
        print(f"{PROGRAM}: interrupted, {said}; to continue, run: {same_command}", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    finally:
        watch.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
