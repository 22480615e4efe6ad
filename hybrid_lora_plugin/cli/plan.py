"""``hybrid-lora-plan``: what a run will need of memory, bytes and operations, before it is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_lora_plugin.cli.arguments import expand_home, parse, print_help, report_error, wants_help
from hybrid_lora_plugin.cli.command import command, writing
from hybrid_lora_plugin.config_plan import PlanCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from hybrid_lora_plugin.plan.changes import Change
    from hybrid_lora_plugin.plan.planner import Plan

PROGRAM = "hybrid-lora-plan"
SUMMARY = (
    "Says what a verl run will need before it is started: memory of a GPU by part in each phase of a step, memory of "
    "the host, bytes of a weight sync in each mode, operations of a step and of the probe, and what to change where it "
    "does not fit. The run is a recipe (recipe=NAME, with more overrides behind --) or any command of verl's pasted "
    "behind --, with +hybrid_lora=enabled or without. Nothing is started, no GPU is needed and no weights are read: "
    "only the model's config.json. Exit status 1 where the run does not fit, 2 on a mistake."
)
EXAMPLE = f"{PROGRAM} recipe=qwen2_5_1_5b_gspo_8xa800 output_dir=plan -- data.max_response_length=2048"


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``key=value`` arguments and a command behind ``--``.

    Returns:
        0, 1 where the run does not fit, 2 on a user's mistake.
    """
    own, behind = split(list(sys.argv[1:] if argv is None else argv))
    if wants_help(own):
        return print_help(PROGRAM, SUMMARY, EXAMPLE, PlanCommandConfig)
    try:
        config = expand_home(parse(own, PlanCommandConfig))
        _check(config, behind)
        plan, changes, after = _plan(config, behind)
        # Late, so that --help and a mistyped option answer at once.
        from hybrid_lora_plugin.plan.table import plan_text

        text = plan_text(plan, changes, after)
        print(text)
        if config.output_dir:
            with writing():
                _write(Path(config.output_dir), plan, changes, after, text)
    except ConfigurationError as error:
        return report_error(PROGRAM, error)
    return int(not plan.fits)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Own options, and the words behind ``--``."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _check(config: PlanCommandConfig, behind: Sequence[str]) -> None:
    validate(config)
    if config.recipe is None and not behind:
        raise UsageError(
            "recipe: not given; write recipe=NAME, or a command of verl's behind --, e.g. "
            f"{PROGRAM} -- python -m verl.trainer.main_ppo …"
        )
    if config.recipe is not None and "-m" in behind:
        raise UsageError("recipe: given together with a command behind --; give one of them")
    if config.reserve >= config.gpu_memory:
        raise UsageError(f"reserve: {config.reserve} leaves nothing of gpu_memory={config.gpu_memory}; give less")
    if config.output_dir and Path(config.output_dir).exists():
        raise UsageError(f"output_dir: {config.output_dir!r} is there already; give a new folder")


def _plan(config: PlanCommandConfig, behind: Sequence[str]) -> tuple[Plan, list[Change], Plan]:
    from hybrid_lora_plugin.plan.changes import suggest
    from hybrid_lora_plugin.verl_backend.planned_command import parse_command, recipe_command

    given = recipe_command(config.recipe, config.recipes, behind) if config.recipe else parse_command(behind)
    again = _planner(config, given)
    plan = again([])
    return (plan, *suggest(plan, again))


def _planner(config: PlanCommandConfig, given: Any) -> Callable[[Sequence[str]], Plan]:
    """Overrides -> plan. A model is built once for all plans that train it alike."""
    from transformers.utils import logging

    from hybrid_lora_plugin.plan.model import planned_model
    from hybrid_lora_plugin.plan.planner import GIB, Machine, make_plan
    from hybrid_lora_plugin.verl_backend.planned_command import plan_inputs

    # What it says of a config is for those who load weights.
    logging.set_verbosity_error()
    machine = Machine(
        gpu_bytes=config.gpu_memory * GIB,
        reserve_bytes=config.reserve * GIB,
        host_bytes=None if config.host_memory is None else config.host_memory * GIB,
        teraflops=config.teraflops,
        share=config.utilisation,
    )
    models: dict[str, Any] = {}

    def plan(overrides: Sequence[str]) -> Plan:
        run, model_config, name = plan_inputs(given.with_overrides(overrides), config.model)
        key = repr((name, run.training, run.lora_rank, run.lora_alpha, run.lora_targets, run.hybrid))
        if key not in models:
            models[key] = planned_model(model_config, run, name)
        return make_plan(models[key], run, machine, name)

    return plan


def _write(folder: Path, plan: Plan, changes: list[Change], after: Plan, text: str) -> None:
    from dataclasses import asdict

    from hybrid_lora_plugin.files import complete_folder
    from hybrid_lora_plugin.plan.picture import draw_plan

    content = plan.as_json() | {"changes": [asdict(change) for change in changes], "fits_with_changes": after.fits}
    with complete_folder(folder) as unfinished:
        (unfinished / "plan.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        (unfinished / "plan.txt").write_text(text + "\n", encoding="utf-8")
        draw_plan(plan, unfinished / "plan.png")
    print(f"\nwritten to {folder}: plan.txt, plan.json, plan.png")


if __name__ == "__main__":
    sys.exit(main())
