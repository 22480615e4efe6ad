"""The probe from command to artifact (paper Algorithm 1, then the selection of Algorithm 2), deterministic by seed.

What is refused, what needs no probe, one probe or one for each seed; ``stages.py`` is one probe.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from hybrid_lora_plugin.allocation.consensus import named_by_seed
from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.allocation.storage import refuse_existing
from hybrid_lora_plugin.candidates import find_candidates, meta_model
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.linear_account import account_text
from hybrid_lora_plugin.probing.checks import check_shapes
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.loading import check_model_files, load_model_config, parameter_count
from hybrid_lora_plugin.probing.method import ProbeMethod
from hybrid_lora_plugin.probing.methods.adalora import AdaLoraMethod
from hybrid_lora_plugin.probing.methods.autolora import AutoLoraMethod
from hybrid_lora_plugin.probing.methods.features import FeatureMethod
from hybrid_lora_plugin.probing.methods.full_delta import FullDeltaMethod
from hybrid_lora_plugin.probing.methods.lookahead import LookaheadMethod
from hybrid_lora_plugin.probing.methods.svd_lora import SvdLoraMethod
from hybrid_lora_plugin.probing.methods.weight_gradient import WeightGradientMethod
from hybrid_lora_plugin.probing.prepare import seeds_settings
from hybrid_lora_plugin.probing.progress import Progress
from hybrid_lora_plugin.probing.provenance import environment, model_identity, record_of_seeds
from hybrid_lora_plugin.probing.resume import PartialState, remove_finished
from hybrid_lora_plugin.probing.settling import check_auto
from hybrid_lora_plugin.probing.stages import Probe
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.scoring import get_criterion

METHODS: dict[str, type[ProbeMethod]] = {
    "svd_lora": SvdLoraMethod,
    "adalora": AdaLoraMethod,
    "autolora": AutoLoraMethod,
    "full_delta": FullDeltaMethod,
    "lookahead": LookaheadMethod,
    "weight_gradient": WeightGradientMethod,
    "features": FeatureMethod,
}


def _trial() -> ModuleType:
    """The trial, which trains with PEFT: imported where there is one."""
    from hybrid_lora_plugin.probing.trial import runner

    return runner


def run_probe(config: ProbeCommandConfig, progress: Progress | None = None, ranks: Ranks | None = None) -> Path:
    """As ``probe_model``; returns the artifact's folder, ``config.output_dir``."""
    probe_model(config, progress, ranks)
    return Path(config.output_dir)


def probe_model(
    config: ProbeCommandConfig,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    before_loading: Callable[[int], None] | None = None,
) -> Allocation:
    """Probe a model and write its allocation.

    Args:
        config: what ``hybrid-lora-probe`` takes.
        progress: where to report; silent by default.
        ranks: the processes that share the work, each making this same call; by default this one alone.
        before_loading: called on the first rank with the tokens of the longest row, once all is checked and before
            weights are read.

    Returns:
        What was written to ``config.output_dir``.

    Raises:
        ConfigurationError: a setting, the data or the model cannot be used.
        ProbeInterrupted: SIGINT or SIGTERM came; the same call continues where it stopped.
    """
    ranks = ranks or Ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    progress = (progress if ranks.first else None) or Progress()
    output_dir = Path(config.output_dir or "")
    ranks.from_first(lambda: _check(config, output_dir, ranks.size))
    method = get_criterion(config.criterion).method
    if method is None:
        return ranks.from_first(lambda: _choose_without_probe(config, output_dir, progress))
    if method == "trial":
        return _trial().run_trial(config, output_dir, progress, ranks, METHODS)
    if config.probe.seeds:
        return _probe_seeds(config, method, output_dir, progress, ranks, before_loading)
    probe = Probe(config, method, METHODS[method], output_dir, progress, ranks, before_loading=before_loading)
    measurements = probe.measure()
    return ranks.from_first(lambda: probe.save(probe.record(), measurements))


def _probe_seeds(
    config: ProbeCommandConfig,
    method: str,
    output_dir: Path,
    progress: Progress,
    ranks: Ranks,
    before_loading: Callable[[int], None] | None,
) -> Allocation:
    """A probe for each seed, one after the other, each with the state and the measurements of a probe of that seed."""
    ranks.from_first(lambda: PartialState(output_dir, seeds_settings(config)))
    records, measured, seeds = [], [], config.probe.seeds
    for number, seed in enumerate(seeds):
        progress.note(f"seed {seed}, {number + 1} of {len(seeds)}")
        one = dataclasses.replace(config, probe=dataclasses.replace(config.probe, seed=seed, seeds=[]))
        part = f"seed_{number}"
        probe = Probe(one, method, METHODS[method], output_dir, progress, ranks, part, before_loading=before_loading)
        before_loading = None
        measured.append(probe.measure())
        records.append(ranks.from_first(probe.record))
        if number + 1 < len(seeds):
            # The model of one seed must not sit beside that of the next.
            probe.method = probe.model = None
            gc.collect()
            if ranks.device.type != "cpu":
                torch.get_device_module(ranks.device).empty_cache()
    return ranks.from_first(lambda: probe.save(record_of_seeds(records), named_by_seed(measured)))


def _check(config: ProbeCommandConfig, output_dir: Path, processes: int) -> None:
    validate(config)
    for field, value, example in (
        ("model.path", config.model.path, "model.path=Qwen/Qwen2.5-1.5B-Instruct"),
        ("output_dir", config.output_dir, "output_dir=outputs/probe"),
    ):
        if not value:
            raise ProbeError(f"{field}: nothing given; give it, e.g. {example}")
    method = get_criterion(config.criterion).method
    if method is not None:
        if config.probe.objective != "sft":
            raise ProbeError(
                f"probe.objective: {config.probe.objective!r} needs rollouts, which only a verl run makes; give "
                f"hybrid_lora.probe.objective={config.probe.objective} there, or probe.objective=sft here"
            )
        if method == "trial":
            _trial().check(config, METHODS, processes)
        else:
            METHODS[method].check_ranks(processes)
            check_auto(config)
    remove_finished(output_dir)
    refuse_existing(output_dir)
    check_model_files(config.model, loads=method is not None)
    # Whatever reads the folder reads this first, and would tell of it in words of its own.
    load_model_config(config.model)


def _choose_without_probe(config: ProbeCommandConfig, output_dir: Path, progress: Progress) -> Allocation:
    """An allocation that needs neither data nor weights."""
    model_config = load_model_config(config.model)
    model = meta_model(model_config, config.model.trust_remote_code)
    candidates = find_candidates(model)
    check_shapes(candidates, config.lora.rank)
    identity = model_identity(config.model.path, model, candidates, parameter_count(model))
    progress.note(f"criterion {config.criterion} needs no probe: nothing is loaded or trained")
    for line in account_text(candidates, identity.frozen_linear, identity.parameters):
        progress.note(line)
    allocation = select_modules(
        config,
        identity,
        candidates,
        {},
        lora_rank=config.lora.rank,
        environment=environment(),
    )
    save_allocation(output_dir, allocation, {})
    return allocation
