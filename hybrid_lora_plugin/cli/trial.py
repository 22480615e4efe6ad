"""``hybrid-lora-trial``: allocations compared by short runs of a team's own verl command, and the best one kept."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_lora_plugin.cli.arguments import expand_home, parse, print_help, report_error, require_given, wants_help
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.cli.plan import split
from hybrid_lora_plugin.config_trial import TrialRunsCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError, UsageError

PROGRAM = "hybrid-lora-trial"
SUMMARY = (
    "Trains each of a few allocations for some steps by your own verl command, behind --, compares them by the scores "
    "of its validation, drops the worse half, resumes the others for more steps, and copies the allocation that did "
    "best to output_dir, for hybrid_lora.allocation. Its cost is said before it starts. Ctrl-C keeps the rounds that "
    "are done; the same command continues."
)
EXAMPLE = (
    f"{PROGRAM} 'allocations=[outputs/lookahead,outputs/random]' output_dir=outputs/trial steps=20 -- "
    "python -m verl.trainer.main_ppo YOUR_ARGUMENTS"
)


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments and verl's command behind ``--``.

    Returns:
        0, 2 on a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    own, behind = split(argv)
    if wants_help(own):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, TrialRunsCommandConfig)
    try:
        config = expand_home(parse(own, TrialRunsCommandConfig))
        require_given(config, {"allocations": "[FOLDER,FOLDER]", "output_dir": "FOLDER"})
        validate(config)
        if not behind:
            raise UsageError(f"no command behind --; write it there, e.g. {EXAMPLE}")
        return _run(config, behind, shlex.join([PROGRAM, *argv]))
    except ConfigurationError as error:
        return report_error(PROGRAM, error)


def _run(config: TrialRunsCommandConfig, behind: Sequence[str], same_command: str) -> int:
    # Late, so that --help and a mistyped option answer at once.
    from hybrid_lora_plugin.evidence.trial_runs import TrialRuns
    from hybrid_lora_plugin.probing.resume import partial_folder

    try:
        with writing():
            folder = TrialRuns(config, behind, lambda line: print(line, flush=True)).run()
    except KeyboardInterrupt as interrupt:
        kept = partial_folder(config.output_dir)
        said = f"rounds that are done are kept in {kept}" if Path(kept).exists() else "nothing was written"
        print(f"{PROGRAM}: interrupted, {said}; to continue, run: {same_command}", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    print(
        f"allocation written to {folder} (trial.md, trial.json): give hybrid_lora.allocation={shlex.quote(str(folder))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
