"""``hybrid-lora-eval``: a model on the paper's benchmarks, earlier responses judged again, or two runs compared."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_lora_plugin.cli.arguments import (
    expand_home,
    given_options,
    parse,
    print_help,
    report_error,
    require_given,
    wants_help,
)
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.config import EvaluateCommandConfig
from hybrid_lora_plugin.config_evaluation import EVALUATIONS
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError, RewardError, UsageError

PROGRAM = "hybrid-lora-eval"
SUMMARY = (
    "Asks a model the problems of the paper's benchmarks, through vLLM and with the prompts, the extraction of answers "
    "and the rewards of training, and writes its figures with intervals as JSON, as the paper's Table 1 in Markdown "
    "and as a picture. Every response is kept when it comes: after an interruption the same command goes on. "
    "rescore=FOLDER judges kept responses again without a model; compare=[A,B] says whether two runs on the same "
    "problems differ."
)
EXAMPLE = f"{PROGRAM} model=exported output_dir=evaluation 'benchmarks=[math500,aime24]'"
#: options that say something in each of the two modes without a model
_WITH_RESCORE = ("rescore", "label", "scoring.")
_WITH_COMPARE = ("compare", "output_dir")


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments.

    Returns:
        0, 2 on a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, EvaluateCommandConfig)
    try:
        config = expand_home(parse(argv, EvaluateCommandConfig))
        mode = _mode(config, given_options(argv))
        validate(config)
        # Late, so that --help and a mistyped option answer at once.
        from hybrid_lora_plugin.cli import eval_modes

        with writing():
            return getattr(eval_modes, mode)(config)
    except (ConfigurationError, RewardError) as error:
        return report_error(PROGRAM, error)
    except KeyboardInterrupt as interrupt:
        signum = getattr(interrupt, "signum", signal.SIGINT)
        folder = config.output_dir or config.rescore or config.compare
        print(f"{PROGRAM}: interrupted; what is in {folder} is kept, and the same command goes on", file=sys.stderr)
        return 128 + signum


def _mode(config: EvaluateCommandConfig, given: Sequence[str]) -> str:
    """``evaluate``, ``rescore`` or ``compare``.

    Raises:
        UsageError: two of them, an option that the one given does not read, or one that is missing.
    """
    modes = [name for name in ("model", "rescore", "compare") if getattr(config, name)]
    if len(modes) > 1:
        raise UsageError(f"{modes[1]}: given together with {modes[0]}; give one of them")
    if modes in (["rescore"], ["compare"]):
        read = _WITH_RESCORE if modes == ["rescore"] else _WITH_COMPARE
        for name in given:
            if not name.startswith(read):
                raise UsageError(f"{name}: has no effect with {modes[0]}; leave it out")
        if config.compare and len(config.compare) != 2:
            raise UsageError(f"compare: {len(config.compare)} folders; give two, as in compare=[A,B]")
        return modes[0]
    require_given(config, {"model": "FOLDER", "output_dir": "FOLDER"})
    _check_benchmarks(config)
    return "evaluate"


def _check_benchmarks(config: EvaluateCommandConfig) -> None:
    known = ", ".join(EVALUATIONS)
    if not config.benchmarks:
        raise UsageError(f"benchmarks: none; give some of {known}")
    for name in config.benchmarks:
        if name not in EVALUATIONS:
            raise UsageError(f"benchmarks: {name!r} is none; give some of {known}")
    if len(set(config.benchmarks)) < len(config.benchmarks):
        raise UsageError("benchmarks: one is named twice; name each once")
    for name in EVALUATIONS:
        if getattr(config.data, name) and name not in config.benchmarks:
            raise UsageError(f"data.{name}: has no effect, as benchmarks does not name {name}; leave it out")
    if Path(config.output_dir).is_file():
        raise UsageError(f"output_dir: {config.output_dir!r} is a file; give a folder")


if __name__ == "__main__":
    sys.exit(main())
