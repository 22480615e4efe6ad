"""``hybrid-lora-allocate``: another criterion or budget from the measurements of an artifact, without the model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
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
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.cli.result import print_result
from hybrid_lora_plugin.config import AllocateCommandConfig
from hybrid_lora_plugin.config_effect import SELECTION, refuse_without_effect
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError

if TYPE_CHECKING:
    from hybrid_lora_plugin.allocation import Allocation
    from hybrid_lora_plugin.allocation.schema import TrialRecord

PROGRAM = "hybrid-lora-allocate"
SUMMARY = (
    "Decides anew from what a probe measured: another criterion, direction, normalisation or budget, in seconds and "
    "without the model. Writes a new artifact with the same measurements; the one it reads stays as it is."
)
EXAMPLE = f"{PROGRAM} artifact=outputs/probe output_dir=outputs/random criterion=random control.seed=1"


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments; returns 0, or 2 on a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants_help(argv):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, AllocateCommandConfig)
    try:
        config = expand_home(parse(argv, AllocateCommandConfig))
        require_given(config, {"artifact": "FOLDER", "output_dir": "FOLDER"})
        validate(config)
        refuse_without_effect(config, given_options(argv), SELECTION)
        before, after = reallocate(config)
    except ConfigurationError as error:
        return report_error(PROGRAM, error)
    print_result(Path(config.output_dir), after)
    changed = len(set(before.full_names) ^ set(after.full_names))
    print(f"against {config.artifact}: {changed} of {len(after.modules)} modules changed their assignment")
    return 0


def reallocate(config: AllocateCommandConfig) -> tuple[Allocation, Allocation]:
    """Read the artifact, select anew and write the new one.

    Returns:
        The allocation that was read and the one that was written.

    Raises:
        ConfigurationError: the artifact, a setting or the output folder cannot be used.
    """
    # Late, so that --help and a mistyped option answer at once.
    from hybrid_lora_plugin.allocation.measurement_file import load_measurements
    from hybrid_lora_plugin.allocation.select import select_modules
    from hybrid_lora_plugin.allocation.storage import load_allocation, refuse_existing
    from hybrid_lora_plugin.report.artifact import save_allocation

    refuse_existing(config.output_dir)
    path = Path(config.artifact)
    source = load_allocation(path, "artifact")
    measurements = load_measurements(path if path.is_dir() else path.parent, source)
    allocation = select_modules(
        config,
        source.model,
        source.modules,
        measurements,
        lora_rank=source.budget.lora_rank,
        probe=source.probe,
        environment=source.environment,
    )
    if config.criterion == "trial":
        allocation = dataclasses.replace(allocation, trial=_same_trial(source, allocation))
    with writing():
        save_allocation(config.output_dir, allocation, measurements)
    return source, allocation


def _same_trial(source: Allocation, allocation: Allocation) -> TrialRecord | None:
    """The trial of the artifact that was read, if what it chose is what was selected."""
    from hybrid_lora_plugin.errors import AllocationError

    if source.trial is not None:
        chosen = next(one.modules for one in source.trial.candidates if one.name == source.trial.chosen)
        if chosen != allocation.full_names:
            raise AllocationError(
                f"budget.mode: the trial compared allocations of {len(chosen)} modules, and this budget "
                f"admits {len(allocation.full_names)} of them, which nobody trained; give the budget of the artifact, "
                "or another criterion"
            )
    return source.trial


if __name__ == "__main__":
    sys.exit(main())
