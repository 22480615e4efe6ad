"""``hybrid-lora-data``: data sets as verl, the probe and SFT read them."""

from __future__ import annotations

import functools
import shlex
import signal
import sys
from collections.abc import Sequence
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
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.config import DataCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError, RewardError, UsageError
from hybrid_lora_plugin.tasks.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from hybrid_lora_plugin.preparation.runner import Prepared

PROGRAM = "hybrid-lora-data"
SUMMARY = (
    "Prepares Mixture-of-Thoughts, GSM8K or an evaluation set, from files or the hub: rows for reinforcement learning "
    "in verl with answers that can be checked, or conversations for the probe and SFT. Rows without such an answer, "
    "repeated ones and those that an evaluation set has too are left out, and a datasheet beside the files says how "
    "many and why. Ctrl-C keeps what is done; the same command continues."
)
EXAMPLE = f"{PROGRAM} set=mixture_of_thoughts 'configs=[math,science]' output_dir=data/mixture"
#: Options that only some sets or formats read, and which.
_MIXTURE_ONLY = ("configs", "code_tests")


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments.

    Returns:
        0, 2 on a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, DataCommandConfig)
    try:
        config = expand_home(parse(argv, DataCommandConfig))
        _check(config, given_options(argv))
        return _prepare(config, shlex.join([PROGRAM, *argv]))
    except (ConfigurationError, RewardError) as error:
        return report_error(PROGRAM, error)


def _prepare(config: DataCommandConfig, same_command: str) -> int:
    # Late, so that --help and a mistyped option answer at once.
    from hybrid_lora_plugin.cli.data_progress import watch_for
    from hybrid_lora_plugin.preparation.runner import partial_folder, prepare
    from hybrid_lora_plugin.rewards.scorer import Scorer

    watch = watch_for()
    try:
        with writing(), Scorer() as scorer:
            # Many questions have the same small number for an answer.
            prepared = prepare(config, functools.lru_cache(1 << 16)(scorer.is_checkable), watch)
    except KeyboardInterrupt as interrupt:
        watch.close()
        kept = partial_folder(config.output_dir)
        said = f"what is done is kept in {kept}" if kept.exists() else "nothing was written"
        print(f"{PROGRAM}: interrupted, {said}; to continue, run: {same_command}", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    finally:
        watch.close()
    _say(config, prepared)
    return 0


def _say(config: DataCommandConfig, prepared: Prepared) -> None:
    total = prepared.sheet["total"]
    print(f"{total['read']:,} rows read{', some of them before an interruption' if prepared.resumed else ''}")
    for reason, count in total["dropped"].items():
        print(f"  {count:,} dropped: {reason}")
    for note in prepared.sheet["notes"]:
        if note.startswith("NOT "):
            print(note)
    for file in prepared.sheet["files"]:
        print(f"{prepared.folder / file['name']}: {file['rows']:,} rows")
    print(f"what was left out and why: {prepared.folder / 'README.md'}")
    train = shlex.quote(str(prepared.folder / "train.parquet"))
    if config.format == "sft" and any(file["name"] == "train.parquet" for file in prepared.sheet["files"]):
        print(f"next: hybrid-lora-probe model.path=MODEL probe.files={train} output_dir=FOLDER")


def _check(config: DataCommandConfig, given: list[str]) -> None:
    """What can be known to fail before anything is opened."""
    require_given(config, {"set": "gsm8k", "output_dir": "FOLDER"})
    validate(config)
    for option in given:
        if option in _MIXTURE_ONLY and config.set != "mixture_of_thoughts":
            raise UsageError(f"{option}: has no effect with set={config.set}; leave it out")
    if config.set in BENCHMARKS and not BENCHMARKS[config.set].train:
        for option in {"decontaminate", "ngram", "validation"}.intersection(given):
            raise UsageError(f"{option}: has no effect with set={config.set}, which is only evaluated; leave it out")
    if "ngram" in given and not config.decontaminate:
        raise UsageError("ngram: has no effect with decontaminate=[]; leave it out")
    if config.format == "sft":
        if "code_tests" in given:
            raise UsageError("code_tests: has no effect with format=sft, which needs no tests; leave it out")
        if config.evaluation:
            raise UsageError("evaluation: is written for reinforcement learning; give format=rl, or leave it out")
        if "prompt" in given and config.set == "mixture_of_thoughts":
            raise UsageError("prompt: has no effect on conversations, which stay as they are; leave it out")


if __name__ == "__main__":
    sys.exit(main())
