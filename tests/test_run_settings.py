"""What a user gave wins, wherever it stands: on the command line, in a file of a team, before or behind the plugin."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from hydra import compose, initialize_config_dir, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.training.learning_rates import Rate, learning_rates  # noqa: E402
from hybrid_lora_plugin.verl_backend.given_settings import given_settings  # noqa: E402
from hybrid_lora_plugin.verl_backend.optimizer_settings import OPTIMIZERS, check_optimizer  # noqa: E402
from hybrid_lora_plugin.verl_backend.requirements import ENGINE_MODULE  # noqa: E402
from hybrid_lora_plugin.verl_backend.run_settings import settle  # noqa: E402

ON = "+hybrid_lora=enabled"
MODEL, ACTOR, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "rollout"))


def composed(*overrides, hydra=True):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides), return_hydra_config=hydra)


def from_team(folder, text, *overrides, name="team"):
    """A run of a team's own YAML over verl's, as ``--config-path`` and ``--config-name`` give it."""
    head = "hydra:\n  searchpath: [pkg://verl.trainer.config]\ndefaults: [ppo_trainer, _self_]\n"
    (folder / f"{name}.yaml").write_text(head + text)
    with initialize_config_dir(str(folder), version_base=None):
        return compose(name, overrides=list(overrides), return_hydra_config=True)


def value(config, name):
    found = OmegaConf.select(config, name)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


# -- learning rates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "lora", "own", "trained", "wanted"),
    [
        (None, None, None, "full", (1e-6, 2.5e-5)),
        (None, None, None, "lora", (1e-6, 2.5e-5)),
        (None, None, 1e-6, "full", (1e-6, 2.5e-5)),
        (None, None, 5e-8, "full", (5e-8, 1.25e-6)),
        (None, None, 2e-5, "lora", (8e-7, 2e-5)),
        (3e-6, None, None, "full", (3e-6, 7.5e-5)),
        (None, 5e-5, None, "full", (2e-6, 5e-5)),
        (None, 5e-5, 1e-6, "full", (1e-6, 5e-5)),
        (2e-6, None, 3e-5, "lora", (2e-6, 3e-5)),
        (2e-6, 3e-5, 1e-4, "full", (2e-6, 3e-5)),
    ],
)
def test_each_rate_is_the_one_given_for_its_kind_and_else_follows(full, lora, own, trained, wanted):
    def rate(number, source):
        return None if number is None else Rate(number, source)

    rates = learning_rates(rate(full, "its option"), rate(lora, "its option"), rate(own, "verl's"), trained)
    assert (rates.full.value, rates.lora.value) == wanted, "to the last digit: it is printed"
    unused = own is not None and own not in wanted
    assert bool(rates.unused) == unused and (not unused or "neither" in str(rates))
    for kind, given in (("full", full), ("lora", lora)):
        assert (getattr(rates, kind).source == "its option") == (given is not None)


DENSE, LORA_RANK = f"{ACTOR}.optim.lr=5e-8", f"{MODEL}.lora_rank=32"


@pytest.mark.parametrize("hydra", [True, False], ids=["by main_ppo", "by compose"])
def test_the_rate_of_a_dense_command_stays_that_of_full_modules(hydra):
    config = composed(DENSE, ON, hydra=hydra)
    (line,) = settle(config)
    assert (config.hybrid_lora.full_lr, config.hybrid_lora.lora.lr) == (5e-8, 1.25e-6)
    assert f"{ACTOR}.optim.lr" in line and "5e-08" in line and "25 : 1" in line
    hybrid = config.actor_rollout_ref.model.lora.hybrid
    assert (hybrid.full_lr, hybrid.lora.lr) == (5e-8, 1.25e-6), "what workers get"


def test_what_acts_on_full_modules_alone_is_said_with_the_rates():
    given = ("hybrid_lora.full_lr_factors=[q_proj:0.1,k_proj:0.5]", "hybrid_lora.full_warmup_steps=20")
    (line,) = settle(config := composed(DENSE, ON, *given))
    assert line.endswith("; of full modules q_proj:0.1, k_proj:0.5; full modules warmed up over 20 steps")
    hybrid = config.actor_rollout_ref.model.lora.hybrid
    assert list(hybrid.full_lr_factors) == ["q_proj:0.1", "k_proj:0.5"] and hybrid.full_warmup_steps == 20


@pytest.mark.parametrize("hydra", [True, False], ids=["by main_ppo", "by compose"])
def test_the_rate_of_a_lora_command_stays_that_of_lora_and_so_do_rank_and_alpha(hydra):
    config = composed(LORA_RANK, f"{ACTOR}.optim.lr=2e-5", ON, hydra=hydra)
    lines = settle(config)
    assert (config.hybrid_lora.full_lr, config.hybrid_lora.lora.lr) == (8e-7, 2e-5)
    model = config.actor_rollout_ref.model
    assert (model.lora_rank, config.hybrid_lora.lora.rank) == (32, 32)
    # verl's own default, which the command trained with: not the plugin's 32.
    assert (model.lora_alpha, config.hybrid_lora.lora.alpha) == (16, 16)
    assert any("lora.alpha=16" in line and "verl's default" in line for line in lines)


def test_verls_default_rate_is_told_from_the_same_rate_that_was_given():
    lora = composed(LORA_RANK, ON)
    settle(lora)
    given = composed(LORA_RANK, f"{ACTOR}.optim.lr=1e-6", ON)
    settle(given)
    assert (lora.hybrid_lora.lora.lr, given.hybrid_lora.lora.lr) == (2.5e-5, 1e-6)


@pytest.mark.parametrize("rate", ["fast", "[1e-6]", "true", "0", "-1e-6"])
def test_a_rate_that_is_no_number_is_refused_by_name(rate):
    with pytest.raises(ConfigurationError, match="optim.lr"):
        settle(composed(ON, f"{ACTOR}.optim.lr={rate}"))


def test_a_command_that_says_it_trains_no_lora_is_a_dense_one():
    config = composed(f"{MODEL}.lora_rank=0", DENSE, ON)
    settle(config)
    assert config.hybrid_lora.full_lr == 5e-8 and config.actor_rollout_ref.model.lora_rank == 16


@pytest.mark.parametrize(("verls", "ours"), [("lora_rank", "rank"), ("lora_alpha", "alpha")])
def test_rank_and_alpha_by_both_names_agree_or_are_refused(verls, ours):
    settle(composed(ON, f"{MODEL}.{verls}=8", f"hybrid_lora.lora.{ours}=8"))
    with pytest.raises(ConfigurationError, match=rf"hybrid_lora.lora.{ours}: 4 .*{verls}=8"):
        settle(composed(ON, f"{MODEL}.{verls}=8", f"hybrid_lora.lora.{ours}=4"))


# -- a team's own files ---------------------------------------------------------------------------------------

TEAM = """
hybrid_lora:
  full_lr: 4.0e-6
  sync_check: logprobs
actor_rollout_ref:
  model: {external_lib: team.models, lora_alpha: 64}
  actor:
    strategy: fsdp
    optim: {lr: 3.0e-6}
  rollout:
    load_format: dummy
    checkpoint_engine: {custom_backend_module: [team.transport]}
"""


@pytest.mark.parametrize("order", list(itertools.permutations([ON, "hybrid_lora.sync_seed=7"])))
def test_values_of_a_teams_file_win_over_the_plugins_defaults(tmp_path, order):
    config = from_team(tmp_path, TEAM, *order)
    lines = settle(config)
    assert value(config, f"{MODEL}.external_lib") == ["team.models", ENGINE_MODULE]
    assert value(config, f"{ROLLOUT}.checkpoint_engine.custom_backend_module") == ["team.transport", ENGINE_MODULE]
    assert value(config, f"{ACTOR}.strategy") == "fsdp", "said, although it is verl's default too"
    assert value(config, f"{ROLLOUT}.load_format") == "dummy"
    assert (config.hybrid_lora.lora.alpha, config.actor_rollout_ref.model.lora_alpha) == (64, 64)
    assert (config.hybrid_lora.sync_check, config.hybrid_lora.sync_seed) == ("logprobs", 7)
    assert (config.hybrid_lora.full_lr, config.hybrid_lora.lora.lr) == (4e-6, 1e-4)
    assert config.actor_rollout_ref.actor.optim.lr == 3e-6
    assert "3e-06" in lines[-1] and "neither" in lines[-1] and "team.yaml" in lines[-1]


def test_the_command_line_wins_over_a_teams_file(tmp_path):
    config = from_team(
        tmp_path,
        TEAM,
        ON,
        "hybrid_lora.full_lr=1e-6",
        f"{ACTOR}.strategy=fsdp2",
        f"{ROLLOUT}.load_format=safetensors",
        f"{MODEL}.external_lib=[other]",
        f"{MODEL}.lora_alpha=8",
    )
    settle(config)
    assert config.hybrid_lora.full_lr == 1e-6 and value(config, f"{ACTOR}.strategy") == "fsdp2"
    assert value(config, f"{ROLLOUT}.load_format") == "safetensors" and config.hybrid_lora.lora.alpha == 8
    assert value(config, f"{MODEL}.external_lib") == ["other", ENGINE_MODULE]


def test_a_value_that_refers_to_another_counts_as_what_it_comes_out_as(tmp_path, monkeypatch):
    monkeypatch.setenv("RATE", "3e-7")
    text = """
base: {rate: 3.0e-6, rank: 8}
actor_rollout_ref:
  model: {lora_rank: "${base.rank}"}
  actor: {optim: {lr: "${base.rate}"}}
"""
    config = from_team(tmp_path, text, ON, "hybrid_lora.full_lr=${oc.env:RATE}")
    settle(config)
    assert (config.hybrid_lora.lora.rank, config.hybrid_lora.full_lr, config.hybrid_lora.lora.lr) == (8, 3e-7, 3e-6)


def test_what_nobody_gave_is_the_plugins_default():
    config = composed(ON)
    assert settle(config) == ["learning rates: full modules 1e-06 (the paper's), LoRA 2.5e-05 (the paper's)"]
    assert value(config, f"{ACTOR}.strategy") == "fsdp2" and value(config, f"{ROLLOUT}.load_format") == "safetensors"
    assert value(config, f"{MODEL}.external_lib") == ENGINE_MODULE
    assert (config.actor_rollout_ref.model.lora_rank, config.actor_rollout_ref.model.lora_alpha) == (16, 32)


def test_a_file_beside_verls_own_is_a_teams(tmp_path, monkeypatch):
    # A team that works in verl's tree puts its YAML into verl/trainer/config.
    import hybrid_lora_plugin.verl_backend.given_settings as module

    monkeypatch.setattr(module.verl, "__file__", str(tmp_path / "__init__.py"))
    config = from_team(tmp_path, "actor_rollout_ref: {actor: {strategy: fsdp}}\n", ON)
    given = given_settings(config, [f"{ACTOR}.strategy", f"{ACTOR}.optim.lr"], lambda name: None)
    assert {name: found.where for name, found in given.items()} == {f"{ACTOR}.strategy": "team.yaml"}


def test_verls_value_behind_a_teams_is_the_one_that_counts(tmp_path):
    (tmp_path / "team.yaml").write_text("actor_rollout_ref: {actor: {optim: {lr: 5.0e-6}}}\n")
    (tmp_path / "run.yaml").write_text(
        "hydra:\n  searchpath: [pkg://verl.trainer.config]\ndefaults: [team, ppo_trainer, _self_]\n"
    )
    with initialize_config_dir(str(tmp_path), version_base=None):
        config = compose("run", overrides=[ON], return_hydra_config=True)
    settle(config)
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6 and config.hybrid_lora.full_lr == 1e-6


# -- optimizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_allowed_optimizer_trains_both_groups_at_their_own_rates(name):
    import torch
    from verl.utils.torch_functional import get_cosine_schedule_with_warmup
    from verl.workers.config import FSDPOptimizerConfig
    from verl.workers.config.optimizer import build_optimizer

    full, lora = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    settings = FSDPOptimizerConfig(lr=1.0, optimizer=name, weight_decay=0.25)
    optimizer = build_optimizer([{"params": [lora], "lr": 2.5e-2}, {"params": [full], "lr": 1e-3}], settings)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25]
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=8)
    for _ in range(6):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[0] == pytest.approx(25 * rates[1])
        before = [weight.detach().clone() for weight in (lora, full)]
        (full.square().sum() + lora.square().sum()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        moved = [(old - new.detach()).abs().max() for old, new in zip(before, (lora, full), strict=True)]
    # The last step, with all warm-up behind it.
    assert 0 < moved[1] < moved[0] / 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("torch.optim", "LBFGS", None), "optim.optimizer: 'LBFGS'"),
        (("torch.optim", "Muon", None), "optim.optimizer: 'Muon'"),
        (("bitsandbytes.optim", "AdamW8bit", None), "optim.optimizer_impl: 'bitsandbytes.optim'"),
        (("torch.optim", "AdamW", {"lr": 1e-3}), "override_optimizer_config.lr"),
        (("torch.optim", "AdamW", {"epsilon": 1e-3}), "override_optimizer_config.epsilon.*eps"),
    ],
)
def test_other_optimizers_and_settings_are_refused_by_name(arguments, named):
    with pytest.raises(ConfigurationError, match=named):
        check_optimizer(f"{ACTOR}.optim.", *arguments)


def test_settings_of_an_optimizer_pass():
    check_optimizer("optim.", "torch.optim", "AdamW", {"eps": 1e-6, "betas": [0.9, 0.95], "foreach": False})


# -- looking ahead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "wanted", "said"),
    [
        (["trainer.total_training_steps=301"], (150, 3e-6), "steps=150 (half of trainer.total_training_steps)"),
        ([], (100, 3e-6), "steps=100 (no trainer.total_training_steps to halve)"),
        (["hybrid_lora.probe.lookahead.steps=7", "hybrid_lora.probe.lookahead.lr=2e-5"], (7, 2e-5), None),
    ],
)
def test_lookahead_goes_to_the_middle_of_the_run_at_its_rate(overrides, wanted, said):
    config = composed(ON, "hybrid_lora.criterion=lookahead", "hybrid_lora.full_lr=3e-6", *overrides)
    lines = settle(config)
    settled = config.hybrid_lora.probe.lookahead
    assert (settled.steps, settled.lr) == wanted
    assert [line for line in lines if "probe.lookahead" in line] == (
        [f"hybrid_lora.probe.lookahead.{said}"] if said else []
    )


def test_what_another_criterion_does_not_read_stays_null():
    config = composed(ON, "trainer.total_training_steps=301")
    settle(config)
    assert (config.hybrid_lora.probe.lookahead.steps, config.hybrid_lora.probe.lookahead.lr) == (None, None)


def test_a_trial_trains_at_the_rates_and_with_the_optimizer_of_the_run_and_says_what_it_leaves_out():
    optim = "actor_rollout_ref.actor.optim."
    config = composed(
        ON, "hybrid_lora.criterion=trial", "hybrid_lora.full_lr=3e-6", "hybrid_lora.trial.clip_grad=0.5",
        "hybrid_lora.full_lr_factors=[q_proj:0.1]", "hybrid_lora.full_warmup_steps=9", f"{optim}weight_decay=0.2",
        f"{optim}betas=[0.8,0.95]", f"{optim}lr_scheduler_type=cosine", "trainer.total_training_steps=301",
    )  # fmt: skip
    (line,) = [line for line in settle(config) if "hybrid_lora.trial" in line]
    trial = config.hybrid_lora.trial
    assert (trial.full_lr, trial.lora_lr, trial.run_steps, trial.batch_size) == (3e-6, 7.5e-5, 301, None)
    assert (trial.weight_decay, list(trial.betas), trial.clip_grad) == (0.2, [0.8, 0.95], 0.5)
    assert list(trial.full_lr_factors) == ["q_proj:0.1"] and config.hybrid_lora.probe.lookahead.steps == 150
    assert f"weight_decay=0.2 ({optim}weight_decay)" in line and "clip_grad" not in line
    left = line.partition("left out of the trial: ")[2]
    assert left == f"hybrid_lora.full_warmup_steps=9, {optim}lr_scheduler_type=cosine"
    config = composed(ON, "trainer.total_training_steps=301")
    settle(config)
    assert (config.hybrid_lora.trial.full_lr, config.hybrid_lora.trial.run_steps) == (None, None)


def test_the_trial_of_a_run_without_rollouts_has_its_batch_too(tiny_qwen2):
    with initialize_config_module("verl.trainer.config", version_base=None, job_name="sft_trainer"):
        overrides = [ON, "hybrid_lora.criterion=trial", f"model.path={tiny_qwen2}", "data.train_batch_size=24"]
        config = compose("sft_trainer_engine", overrides=overrides, return_hydra_config=True)
    lines = settle(config)
    assert config.hybrid_lora.trial.batch_size == 24 and config.hybrid_lora.trial.full_lr == 1e-6
    assert any("batch_size=24 (data.train_batch_size)" in line for line in lines)
