"""Which features a run needs, and whether the installed libraries have what those rely on; asked before Ray starts.

The number of verl's version is a hint: what is missing decides. Within the tested range a symbol that is gone refuses
the runs that need it and no others. Outside it the same holds, and a run without a miss goes on only where its user
allows it, with a warning.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.verl_backend import registration
from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS, EVERY_RUN, FEATURES, Contract
from hybrid_lora_plugin.verl_backend.contracts.by_source import Sources, check_sources
from hybrid_lora_plugin.verl_backend.run_kinds import tell

Missing = tuple[tuple[Contract, str], ...]


class Need(NamedTuple):
    """A feature that a run uses because of a setting."""

    feature: str
    #: the setting and its value, as in a refusal
    asked: str
    #: what to give instead
    way_out: str


@functools.cache
def missing_here() -> Missing:
    """What the installed libraries lack, from their text; seconds, once in a process.

    Of a library that is not on the driver nothing is known: workers may have it.
    """
    sources = Sources.installed()
    there = [contract for contract in CONTRACTS if sources.has(contract.library)]
    return tuple(check_sources(there, sources))


def needs_of(config: DictConfig, hybrid: HybridLoraConfig) -> list[Need]:
    """The features of a run that its settings ask for, beside those that every run needs."""

    def setting(name: str):
        return OmegaConf.select(config, name, default=None)

    samples = setting("actor_rollout_ref.rollout") is not None
    needs = [
        Need("cpu", "VERL_PLATFORM: 'cpu'", "run on an accelerator")
        if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
        else None
    ]
    if samples:
        others = [mode for mode in ("merge", "sparse_merge", "receiver_merge", "adapter") if mode != hybrid.sync]
        needs.append(
            Need(hybrid.sync, f"hybrid_lora.sync: {hybrid.sync!r}", f"give hybrid_lora.sync={' or '.join(others)}")
        )
        if hybrid.sync_check == "logprobs":
            needs.append(Need("logprobs", "hybrid_lora.sync_check: 'logprobs'", "give hybrid_lora.sync_check=digest"))
    loss = setting("actor_rollout_ref.actor.policy_loss.loss_mode")
    if loss == "hybrid_gspo":
        needs.append(Need("loss", f"actor_rollout_ref.actor.policy_loss.loss_mode: {loss!r}", "give gspo"))
    if setting("algorithm.adv_estimator") == "hybrid_group":
        needs.append(Need("loss", "algorithm.adv_estimator: 'hybrid_group'", "give grpo"))
    if not hybrid.allocation:
        policy = hybrid.probe.objective == "policy"
        needs.append(
            Need(
                "policy_probe" if policy else "probe",
                "hybrid_lora.allocation: None",
                "give hybrid_lora.allocation=FOLDER, probed where this works",
            )
        )
    # SFT's trainer saves its last step whatever the frequency, which may be a word.
    if not samples or (setting("trainer.save_freq") or -1) > 0 or _may_resume(setting):
        needs.append(
            Need(
                "checkpoint",
                f"trainer.save_freq: {setting('trainer.save_freq')}, trainer.resume_mode: "
                f"{setting('trainer.resume_mode')}",
                "give trainer.save_freq=-1 trainer.resume_mode=disable",
            )
        )
    return [need for need in needs if need is not None]


def _may_resume(setting) -> bool:
    mode = setting("trainer.resume_mode")
    if mode == "auto":
        return os.path.isdir(str(setting("trainer.default_local_dir")))
    return mode not in (None, "disable")


def require_features(config: DictConfig, hybrid: HybridLoraConfig, missing: Missing | None = None) -> None:
    """Refuse a run that the installed libraries cannot carry.

    Args:
        config: the composed configuration.
        hybrid: its ``hybrid_lora`` node.
        missing: what the libraries lack; by default ``missing_here``.

    Raises:
        ConfigurationError: a feature of this run does not work here, or verl is untested and nobody allows it.
    """
    missing = missing_here() if missing is None else missing
    lost = {feature: [text for c, text in missing if feature in c.features] for feature in FEATURES}
    version = registration.installed_verl()
    samples = OmegaConf.select(config, "actor_rollout_ref.rollout", default=None) is not None
    for feature in EVERY_RUN if samples else [name for name in EVERY_RUN if name != "server"]:
        if lost[feature]:
            raise ConfigurationError(
                f"hybrid_lora: no run works with the verl {version} and the libraries that are installed "
                f"({FEATURES[feature]}): {_first(lost[feature])}; install verl==0.9.1 and what it goes with, or leave "
                f"out +hybrid_lora=enabled; hybrid-lora-doctor lists everything",
                see="installed-libraries-lack-what-a-feature-needs",
            )
    for feature, asked, way_out in needs_of(config, hybrid):
        if lost[feature]:
            raise ConfigurationError(
                f"{asked} does not work with the libraries that are installed: {_first(lost[feature])}; {way_out}, or "
                f"install what the plugin is tested with; hybrid-lora-doctor lists everything",
                see="installed-libraries-lack-what-a-feature-needs",
            )
    registration.require_supported_verl(version, hybrid.allow_untested)
    if not registration.is_supported(version):
        tell(_warning(version, lost))


def _first(lines: list[str]) -> str:
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _warning(version: str, lost: Mapping[str, list[str]]) -> str:
    without = [feature for feature, lines in lost.items() if lines]
    intact = f"all but {', '.join(without)}" if without else "every one of them"
    return (
        f"warning: verl {version} is untested (tested: {registration.SUPPORTED_VERL}); of the features "
        f"{intact} has the symbols that it needs, and what those do has not been looked at"
    )
