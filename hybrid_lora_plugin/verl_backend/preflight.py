"""Check a composed configuration on the driver, before Ray starts and before anything is written.

``+hybrid_lora=enabled`` adds this as a Hydra callback; Hydra calls it with the final configuration of the run.
Hydra only warns when a callback raises, so a refusal leaves as SystemExit: one line, exit status 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError, HybridLoraError, RewardError, explained, with_reference

if TYPE_CHECKING:
    from hybrid_lora_plugin.allocation.schema import Allocation


class RunRefused(SystemExit):
    """A run ends before it begins: exit status 2, and one line on standard error, printed when this is made.

    Attributes:
        line: what was printed.
    """

    def __init__(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        super().__init__(2)
        self.line = line

    def __str__(self) -> str:
        return self.line


def check_configuration(config: DictConfig) -> HybridLoraConfig:
    """Everything that can be known to fail before a worker exists.

    ``config`` is settled first (``run_settings``), and paths in ``hybrid_lora`` are made absolute in it: workers may
    start in another folder.

    Returns:
        The checked ``hybrid_lora`` node; without an ``allocation`` the run has to probe first.

    Raises:
        ConfigurationError: an option, the allocation, or a verl setting cannot be used, or the installed libraries lack
            what the run needs.
        ImportError: the installed verl is untested, and nobody allows it.
    """
    from hybrid_lora_plugin.verl_backend import registration, requirements, run_kinds, run_settings, validation_log
    from hybrid_lora_plugin.verl_backend.doctor import gate
    from hybrid_lora_plugin.verl_backend.earlier_checkpoint import check_earlier_checkpoint, settle_tracker
    from hybrid_lora_plugin.verl_backend.reward_check import check_rewards
    from hybrid_lora_plugin.verl_backend.unused_settings import unused_settings
    from hybrid_lora_plugin.verl_backend.zeroth_order_requirements import said_of_order

    registration.register()
    kind = run_kinds.kind_of_run(config)
    decided = run_settings.settle(config)
    hybrid = requirements.hybrid_config(OmegaConf.to_container(config.hybrid_lora, resolve=True))
    requirements.check_run(config)
    gate.require_features(config, hybrid)
    check_rewards(config)
    said = [*unused_settings(config), *validation_log.said_of_best(config, hybrid), *said_of_order(config, hybrid)]
    for line in [*decided, *said]:
        run_kinds.tell(line)
    if validation_log.saves(config, kind):
        folder = str(OmegaConf.select(config, "trainer.default_local_dir"))
        OmegaConf.update(config, "hybrid_lora.checkpoint_dir", folder)
    if line := settle_tracker(config, probing=hybrid.phase == "probe"):
        run_kinds.tell(line)
    if hybrid.allocation:
        from hybrid_lora_plugin.allocation.storage import load_allocation

        with explained(otherwise="allocation-cannot-be-read"):
            allocation = load_allocation(hybrid.allocation)
        OmegaConf.update(config, "hybrid_lora.allocation", os.path.abspath(hybrid.allocation))
        model = _local_model(config)
        if model is not None:
            allocation.check_model(*model)
            if line := _probed_on_other_weights(config, allocation):
                run_kinds.tell(line)
    else:
        _check_probe(config, hybrid)
    if hybrid.phase == "train":
        check_earlier_checkpoint(config, hybrid)
    return hybrid


def _probed_on_other_weights(config: DictConfig, allocation: Allocation) -> str | None:
    """A warning where an allocation was probed on other weights of the same shape, e.g. on the base of an instruct one.

    What it says of each module may still hold, so it is no reason to refuse.
    """
    from hybrid_lora_plugin.base_identity import weights_identity
    from hybrid_lora_plugin.verl_backend.run_kinds import MODEL, kind_of_run

    probed = None if allocation.probe is None else allocation.probe.data.get("weights")
    path = os.path.expanduser(str(kind_of_run(config).select(config, MODEL + "path")))
    found = weights_identity(path) if probed and os.path.isdir(path) else None
    if found in (None, probed):
        return None
    warning = (
        f"WARNING: hybrid_lora.allocation: probed on other weights than those of {path!r}, of "
        f"{allocation.model.name_or_path!r}; which modules are sensitive may differ, probe again on the model you train"
    )
    return with_reference(warning, "allocation-of-another-model")


def _local_model(config: DictConfig) -> tuple[Any, list] | None:
    """Config and candidates of the model, which is refused here where it can be; None where only the workers see it."""
    from hybrid_lora_plugin.verl_backend.model_check import checked_model

    return checked_model(config)


def _check_probe(config: DictConfig, hybrid: HybridLoraConfig) -> None:
    """A run that probes first: where the artifact goes, what it needs, and that no older one is ignored."""
    from hybrid_lora_plugin.allocation.storage import refuse_existing
    from hybrid_lora_plugin.probing.checks import check_budget, check_shapes
    from hybrid_lora_plugin.probing.data.files import absolute
    from hybrid_lora_plugin.probing.resume import remove_finished
    from hybrid_lora_plugin.scoring import get_criterion
    from hybrid_lora_plugin.verl_backend.probe.resume import (
        allocation_of_checkpoint,
        data_of_run,
        has_earlier_allocation,
    )
    from hybrid_lora_plugin.verl_backend.run_kinds import kind_of_run, tell

    if hybrid.probe.objective == "policy" and not kind_of_run(config).samples:
        raise ConfigurationError(
            "hybrid_lora.probe.objective: 'policy' needs rollouts, and this run has none; give sft with "
            "hybrid_lora.probe.files=[rows.jsonl], or hybrid_lora.allocation=FOLDER",
            see="policy-probe-not-possible",
        )
    checkpoints = os.path.abspath(str(OmegaConf.select(config, "trainer.default_local_dir")))
    hybrid.output_dir = os.path.abspath(hybrid.output_dir or os.path.join(checkpoints, "allocation"))
    OmegaConf.update(config, "hybrid_lora.output_dir", hybrid.output_dir)
    hybrid.probe.files = [absolute(file) for file in hybrid.probe.files]
    OmegaConf.update(config, "hybrid_lora.probe.files", hybrid.probe.files)
    if hybrid.phase == "train":
        if has_earlier_allocation(Path(hybrid.output_dir), hybrid, lambda: data_of_run(config, hybrid)):
            remove_finished(hybrid.output_dir)
            return
        resumed = allocation_of_checkpoint(config)
        if resumed is not None:
            tell(f"resuming under the allocation of the checkpoint, {resumed}")
            hybrid.allocation = str(resumed)
            OmegaConf.update(config, "hybrid_lora.allocation", hybrid.allocation)
            return
    # Before hours of probing, whose result would have no place.
    with explained(otherwise="output-folder-in-use"):
        refuse_existing(hybrid.output_dir)
    if get_criterion(hybrid.criterion).method is not None:
        _check_probe_data(config, hybrid)
    model = _local_model(config)
    if model is not None:
        try:
            check_shapes(model[1], hybrid.lora.rank)
            check_budget(model[1], hybrid)
        except ConfigurationError as error:
            # The probe's own command has these options without the prefix.
            raise ConfigurationError.relayed(
                f"hybrid_lora.{error}", otherwise="rank-or-budget-does-not-fit-the-model"
            ) from error


def _check_probe_data(config: DictConfig, hybrid: HybridLoraConfig) -> None:
    from hybrid_lora_plugin.probing.data.files import is_there
    from hybrid_lora_plugin.verl_backend.probe.policy import check_policy_probe

    if hybrid.probe.objective == "policy":
        check_policy_probe(config, hybrid)
        return
    if hybrid.criterion == "trial":
        from hybrid_lora_plugin.probing.trial.options import check_trial
        from hybrid_lora_plugin.verl_backend.probe.resume import command_config

        try:
            check_trial(command_config(hybrid, "", False))
        except ConfigurationError as error:
            # The probe's own command has these options without the prefix.
            raise ConfigurationError.relayed(f"hybrid_lora.{error}", otherwise="option-not-usable") from error
    if not hybrid.probe.files:
        raise ConfigurationError(
            "hybrid_lora.allocation: None, and hybrid_lora.probe.files names no rows to probe with; give "
            "hybrid_lora.allocation=FOLDER written by hybrid-lora-probe, hybrid_lora.probe.files=[rows.jsonl], or "
            "hybrid_lora.probe.objective=policy",
            see="nothing-to-probe-with",
        )
    if hybrid.probe.dry_run:
        raise ConfigurationError(
            "hybrid_lora.probe.dry_run: True shows rows and trains nothing, so it is no run; give it to "
            "hybrid-lora-probe as probe.dry_run=true, or leave it out",
            see="nothing-to-probe-with",
        )
    for file in hybrid.probe.files:
        if not is_there(file):
            raise ConfigurationError(
                f"hybrid_lora.probe.files: {file!r} does not exist; give existing files", see="nothing-to-probe-with"
            )


def _check_or_exit(config: DictConfig, may_probe: bool) -> None:
    try:
        hybrid = check_configuration(config)
        if _policy_probe_is_due(hybrid):
            if not may_probe:
                raise ConfigurationError(
                    "hybrid_lora.probe.objective: 'policy' cannot be probed inside a sweep; probe once in a single run "
                    "and give hybrid_lora.allocation",
                    see="policy-probe-not-possible",
                )
            from hybrid_lora_plugin.verl_backend.probe.policy import run_policy_probe

            run_policy_probe(config, hybrid)
    except (ConfigurationError, RewardError, ImportError) as error:
        raise RunRefused(_line_of(str(error).removeprefix("hybrid_lora: "))) from error
    except Exception as error:  # Hydra would turn it into a warning and start the run unchecked
        raise RunRefused(_line_of(f"the configuration could not be checked: {error!r}")) from error


def _line_of(text: str) -> str:
    """The line that ends the run, with a reference at its end also where the error has none."""
    return str(HybridLoraError.relayed(f"hybrid_lora: {text}", otherwise="configuration-not-checked"))


def _policy_probe_is_due(hybrid: HybridLoraConfig) -> bool:
    if hybrid.allocation or hybrid.phase == "probe" or hybrid.probe.objective != "policy":
        return False
    from hybrid_lora_plugin.allocation.storage import ALLOCATION_FILE
    from hybrid_lora_plugin.scoring import get_criterion

    # One that is there was compared above.
    return (
        get_criterion(hybrid.criterion).method is not None and not (Path(hybrid.output_dir) / ALLOCATION_FILE).exists()
    )


class Preflight(Callback):
    """Hydra callback that stops a run which cannot work, and probes first where the objective is ``policy``."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Before Hydra makes the run's output folder.
        _check_or_exit(config, may_probe=True)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Each job of a sweep has a configuration of its own; a single run was checked above.
        if config.hydra.mode == RunMode.MULTIRUN:
            _check_or_exit(config, may_probe=False)
