"""The probe with objective ``policy``: the same verl command, started once more before the run itself.

The probe is a reinforcement learning run of its own (``policy_engine.py``) in a process of its own. When it has
written the artifact it ends, and with it everything it trained: actor, optimizer and rollout engine of the run that
follows are made from the original checkpoint, as Algorithm 2 asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.allocation.storage import ALLOCATION_FILE
from hybrid_lora_plugin.config import WITHOUT_WARMUP, HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError, ProbeError
from hybrid_lora_plugin.probing.resume import PartialState
from hybrid_lora_plugin.probing.settling import check_auto
from hybrid_lora_plugin.scoring import get_criterion
from hybrid_lora_plugin.verl_backend.probe.policy_schedule import GRADIENT_CRITERIA, PolicySchedule, length_in_words
from hybrid_lora_plugin.verl_backend.probe.policy_seeds import run_seeds
from hybrid_lora_plugin.verl_backend.probe.policy_settings import policy_settings
from hybrid_lora_plugin.verl_backend.probe.resume import command_config

MEASURED = frozenset({"sensitivities", "alpha", "delta_norm"})
#: status of a child that was ended because its work was done
ENDED = -1000
#: why a method, or a criterion, does not fit a step of reinforcement learning
_REASONS = {
    "lookahead": "moves each weight and passes every batch once for each module, and a loss on rollouts of another "
    "policy says little",
    "adalora": "prunes on a schedule of its own",
    "autolora": "learns from two batches in a step",
    "full_delta": "trains full deltas, whose memory is that of full fine-tuning",
    "features": "reads forward passes of the base, which no objective changes",
    "perturbation": "passes every batch once for each module",
    "snip": "reads entries of the whole gradient, of which a sketch is kept",
    "lora_drop": "reads outputs, which no objective changes",
}
_DATASET = "pkg://hybrid_lora_plugin.verl_backend.probe.policy_dataset"


def check_policy_probe(config: DictConfig, hybrid: HybridLoraConfig) -> None:
    """Refuse what a policy probe cannot do, before it starts.

    Raises:
        ConfigurationError: naming the setting and the way out.
    """
    criterion = get_criterion(hybrid.criterion)
    if criterion.method == "trial":
        raise ConfigurationError(
            "hybrid_lora.criterion: 'trial' trains by supervised fine-tuning and not with objective policy; give "
            "hybrid_lora.probe.objective=sft with hybrid_lora.probe.files=[rows.jsonl], or compare allocations by runs "
            "of this command with hybrid-lora-trial, and give hybrid_lora.allocation",
            see="policy-probe-not-possible",
        )
    masked = criterion.method == "svd_lora" and MEASURED.issuperset(criterion.needs)
    if not masked and hybrid.criterion not in GRADIENT_CRITERIA:
        reason = _REASONS.get(criterion.method) or _REASONS.get(hybrid.criterion, "needs passes of its own")
        raise ConfigurationError(
            f"hybrid_lora.criterion: {hybrid.criterion!r} is not measured by objective policy: it {reason}; give "
            f"hybrid_lora.probe.objective=sft, or a criterion of the masked probe or of the weight's gradient, e.g. "
            f"hybrid or gradient_norm",
            see="policy-probe-not-possible",
        )
    try:
        check_auto(command_config(hybrid, "", False))
    except ProbeError as error:
        # The probe's own command has these options without the prefix.
        raise ConfigurationError.relayed(f"hybrid_lora.{error}", otherwise="policy-probe-not-possible") from error
    if hybrid.criterion not in WITHOUT_WARMUP and hybrid.probe.most_warmup_steps < 1:
        raise ConfigurationError(
            f"hybrid_lora.probe.warmup_steps: {hybrid.probe.warmup_steps} steps leave every adapter at 0; give at "
            "least 1",
            see="policy-probe-not-possible",
        )
    for name, usable in (
        ("algorithm.filter_groups.enable", False),
        ("trainer.v1.sampler.sync_refill_failed_groups", False),
        ("trainer.v1.sampler.custom_sampler.path", None),
    ):
        value = OmegaConf.select(config, name, default=usable)
        if value:
            raise ConfigurationError(
                f"{name}: {value!r} draws an unknown number of prompts a step, so none can be held out; give "
                f"{str(usable).lower() if usable is False else 'null'} while probing with objective policy, or "
                f"hybrid_lora.probe.objective=sft",
                see="policy-probe-not-possible",
            )
    if "rollout" in config:
        # Both of verl's experimental trainers have that node.
        raise ConfigurationError(
            "hybrid_lora.probe.objective: 'policy' cannot be probed by a trainer whose steps use the prompts of "
            "earlier ones; give hybrid_lora.probe.objective=sft, or probe with verl.trainer.main_ppo and give "
            "hybrid_lora.allocation",
            see="policy-probe-not-possible",
        )
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode", default="sync")
    if mode != "sync" or not OmegaConf.select(config, "trainer.use_v1", default=True):
        raise ConfigurationError(
            f"trainer.v1.trainer_mode: {mode!r} is not supported by objective policy, whose steps must use the prompts "
            f"of that step; give sync with trainer.use_v1=true, or hybrid_lora.probe.objective=sft",
            see="policy-probe-not-possible",
        )


def probe_overrides(config: DictConfig, hybrid: HybridLoraConfig) -> list[str]:
    """What the probe's command line has behind that of the run; ``hybrid.output_dir`` is absolute."""
    probe, partial = hybrid.probe, f"{hybrid.output_dir}.partial"
    schedule, save_freq = PolicySchedule.of(command_config(hybrid, "", False)), int(config.trainer.save_freq)
    steps = schedule.steps
    overrides: dict[str, str | int | bool | list[str] | None] = {
        "hybrid_lora.phase": "probe",
        # Its adapters are no LoRA that a rollout engine could run.
        "hybrid_lora.sync": "merge",
        # Its engine reads parameters that FSDP1 hides.
        "actor_rollout_ref.actor.strategy": "fsdp2",
        # What it takes to continue; nobody needs its model, and a run may save that alone.
        "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra"],
        "actor_rollout_ref.actor.checkpoint.load_contents": ["model", "optimizer", "extra"],
        "hybrid_lora.output_dir": hybrid.output_dir,
        "trainer.total_training_steps": steps,
        # An epoch of the reordered prompts is the whole probe.
        "trainer.total_epochs": 1,
        "trainer.default_local_dir": f"{partial}/checkpoints",
        # Whatever the run saves: a probe that was killed must not have been for nothing.
        "trainer.save_freq": save_freq if save_freq > 0 else max(1, steps // 10),
        "trainer.max_actor_ckpt_to_keep": 1,
        "trainer.resume_mode": "auto",
        "trainer.resume_from_path": None,
        "trainer.experiment_name": f"{OmegaConf.select(config, 'trainer.experiment_name')}-probe",
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        # The actor has to be updated, or scored, in every step.
        "trainer.critic_warmup": 0,
        # These are the run's own.
        "trainer.rollout_data_dir": None,
        "trainer.validation_data_dir": None,
        "trainer.default_hdfs_dir": None,
        "trainer.checkpoint_callback_class": None,
        "data.shuffle": False,
        "data.val_max_samples": -1,
        "data.custom_cls.path": _DATASET,
        "data.custom_cls.name": "HeldOutPrompts",
        "++data.hybrid_lora.warmup_steps": schedule.warmup,
        "++data.hybrid_lora.check_every": schedule.every,
        "++data.hybrid_lora.check_steps": schedule.check,
        "++data.hybrid_lora.scoring_steps": schedule.scoring,
        "++data.hybrid_lora.folder": partial,
        "++data.hybrid_lora.seed": probe.seed,
        "++data.hybrid_lora.shuffle": bool(config.data.shuffle),
        "++data.hybrid_lora.custom_cls_path": OmegaConf.select(config, "data.custom_cls.path", default=None),
        "++data.hybrid_lora.custom_cls_name": OmegaConf.select(config, "data.custom_cls.name", default=None),
        "hydra.run.dir": f"{partial}/hydra",
    }
    if schedule.every:
        # Prompts that are fetched ahead would be those of a warm-up that is over.
        overrides["data.dataloader_num_workers"] = 0
    return [f"{key}={_quoted(value)}" for key, value in overrides.items()]


def _quoted(value: str | int | bool | list[str] | None) -> str:
    """A value in Hydra's grammar; a text in quotes, since it may hold ``=``, commas or brackets."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return f"[{','.join(map(_quoted, value))}]"
    # A backslash is special only before a quote.
    text = re.sub(r'(\\*)"', r'\1\1\\"', value)
    return '"' + re.sub(r"(\\+)$", r"\1\1", text) + '"'


def run_policy_probe(config: DictConfig, hybrid: HybridLoraConfig) -> None:
    """Run the probe and wait for it; afterwards ``hybrid.output_dir`` holds the artifact.

    Raises:
        ConfigurationError: an unfinished probe has other settings, or the probe failed.
        SystemExit: a signal ended it.
    """
    # Refuses to continue a probe of other settings, and keeps them for the artifact.
    PartialState(Path(hybrid.output_dir), policy_settings(config, hybrid))
    print(
        f"hybrid_lora: no allocation given, probing first with the policy objective: "
        f"{length_in_words(command_config(hybrid, '', False))}; the artifact will be in {hybrid.output_dir}",
        flush=True,
    )
    if hybrid.probe.seeds:
        run_seeds(config, hybrid, _run_one)
    else:
        _run_one(config, hybrid)
    shutil.rmtree(f"{hybrid.output_dir}.partial", ignore_errors=True)


def _run_one(config: DictConfig, hybrid: HybridLoraConfig, *overrides: str) -> None:
    """One probe in a process of its own; ``overrides`` stand behind those of every probe."""
    command = [sys.executable, *sys.orig_argv[1:], *probe_overrides(config, hybrid), *overrides]
    environment = dict(os.environ)
    if metrics := environment.get("VERL_FILE_LOGGER_PATH"):
        # The file logger would mix the probe's steps into those of the run.
        environment["VERL_FILE_LOGGER_PATH"] = str(Path(metrics).with_suffix(f".probe{Path(metrics).suffix}"))
    artifact = Path(hybrid.output_dir) / ALLOCATION_FILE
    # One that knows no end of its own leaves it to this process, once all is written.
    done = artifact.is_file if PolicySchedule.may_end_early(hybrid.probe) else None
    status, signum = run_child(command, environment, done=done)
    if signum:
        print(
            f"hybrid_lora: the policy probe was interrupted; the same command continues from its last checkpoint in "
            f"{hybrid.output_dir}.partial",
            file=sys.stderr,
        )
        raise SystemExit(128 + signum)
    if not artifact.is_file():
        raise ConfigurationError(
            f"hybrid_lora.probe.objective: the policy probe ended with exit status {status} and no allocation; its "
            f"messages are above, and the same command continues from its last checkpoint, if it came to one",
            see="policy-probe-failed",
        )
    if status not in (0, ENDED):
        print(f"hybrid_lora: the policy probe wrote its allocation, then ended with exit status {status}", flush=True)


def run_child(
    command: list[str], environment: dict[str, str], grace: float = 60.0, done: Callable[[], bool] | None = None
) -> tuple[int, int | None]:
    """Run a command and wait for it; SIGINT and SIGTERM are passed on to it, and it does not outlive this process.

    Args:
        command: program and arguments.
        environment: of the child.
        grace: seconds that the child has after a signal to end by itself.
        done: asked every second whether the child has done its work; it is ended then.

    Returns:
        Its exit status, ``ENDED`` where ``done`` ended it, and the signal that this process was sent meanwhile, if any.
    """
    received: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        received.append(signum)
        child.send_signal(signum)

    # A session of its own: a terminal's Ctrl-C would reach it twice otherwise.
    child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    ended = False
    try:
        while True:
            try:
                status = child.wait(timeout=grace if received or ended else 1.0)
                return ENDED if ended and not received else status, received[-1] if received else None
            except subprocess.TimeoutExpired:
                if received or ended:
                    os.killpg(child.pid, signal.SIGKILL)
                elif done is not None and done():
                    ended = True
                    child.send_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """In the child: ask Linux for SIGTERM when the parent is gone, so that no probe keeps the GPUs behind its back."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
