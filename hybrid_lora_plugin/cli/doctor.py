"""``hybrid-lora-doctor``: which features of the plugin work with the libraries that are installed here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from hybrid_lora_plugin.cli.arguments import expand_home, parse, print_help, report_error, wants_help
from hybrid_lora_plugin.cli.command import command
from hybrid_lora_plugin.config import DoctorCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError

PROGRAM = "hybrid-lora-doctor"
SUMMARY = (
    "Says which features work with the verl, vLLM, PEFT, torch and transformers that are installed, beside their "
    "versions, the devices and the attention kernels. Looks every symbol up that the plugin relies on, first in the "
    "text of the libraries, then by importing them, and on request tries a training step and a weight sync in every "
    "mode. Exit status 1 where a feature does not work, 2 on a mistake in the arguments. --json prints JSON in "
    "place of the tables."
)
EXAMPLE = f"{PROGRAM} check=run json=doctor.json"


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments; returns 0, 1 where a feature is broken, 2 on a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # The one option that is no value: what a pipe is given in place of the tables.
    printed = "--json" in argv
    argv = [argument for argument in argv if argument != "--json"]
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, DoctorCommandConfig)
    try:
        config = expand_home(parse(argv, DoctorCommandConfig))
        validate(config)
        _check_sources(config)
        _check_place(config.json)
        # Late, so that --help and a mistyped option answer at once.
        from hybrid_lora_plugin.verl_backend.doctor.examination import examine

        report = examine(
            config.check, config.sources, lambda text: print(f"{PROGRAM}: {text} …", file=sys.stderr, flush=True)
        )
        content = json.dumps(report.as_json(), indent=2)
        print(content if printed else report.as_text())
        if config.json:
            _write(config.json, content)
    except ConfigurationError as error:
        return report_error(PROGRAM, error)
    return int(bool(report.broken))


def _check_sources(config: DoctorCommandConfig) -> None:
    if not config.sources:
        return
    if config.check != "source":
        raise ConfigurationError(
            f"check: {config.check!r} imports what is installed, and sources names other folders; give check=source"
        )
    for folder in config.sources:
        if not os.path.isdir(folder):
            raise ConfigurationError(f"sources: {folder!r} is no folder; give folders that hold a library, e.g. verl/")


def _check_place(file: str | None) -> None:
    """Before a minute of looking: whether there is a folder to write into."""
    folder = os.path.dirname(file or "") or "."
    if not os.path.isdir(folder):
        raise ConfigurationError(f"json: {file} cannot be written (there is no folder {folder}); give another file")


def _write(file: str, content: str) -> None:
    try:
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(content + "\n")
    except OSError as error:
        raise ConfigurationError(f"json: {file} cannot be written ({error}); give another file") from error


if __name__ == "__main__":
    sys.exit(main())
