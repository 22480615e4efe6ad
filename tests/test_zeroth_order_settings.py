"""Zeroth order in a composed verl run: what is accepted, and what is refused in one line before Ray starts."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from hybrid_lora_plugin.config import HybridLoraConfig  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.verl_backend import requirements  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from hybrid_lora_plugin.verl_backend.run_kinds import ACTOR, SFT  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402

OPTION = "hybrid_lora.zeroth_order."
PRECISION = "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:%s,reduce_dtype:fp32,buffer_dtype:fp32}"


@pytest.fixture(scope="module")
def check(tiny_qwen2, tmp_path_factory):
    """The preflight of a run that moves frozen weights in float32, with more arguments."""
    allocation = make_allocation(tiny_qwen2, tmp_path_factory.mktemp("settings") / "allocation")

    def checked(*more, model=tiny_qwen2):
        overrides = [
            "+hybrid_lora=enabled",
            f"hybrid_lora.allocation={allocation}",
            f"actor_rollout_ref.model.path={model}",
            "actor_rollout_ref.rollout.dtype=float32",
            f"{OPTION}enabled=true",
            f"{OPTION}lr=1e-8",
        ]
        # One that is given again takes the place of the first.
        given = {override.partition("=")[0]: override for override in [*overrides, *more]}
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=list(given.values()), return_hydra_config=True)
        return config, check_configuration(config)

    return checked


def test_a_run_that_moves_frozen_weights_is_accepted_and_its_workers_are_told(check, capsys):
    config, hybrid = check(PRECISION % "fp32", f"{OPTION}epsilon=1e-4", f"{OPTION}modules=[up_proj,model.embed_tokens]")
    node = OmegaConf.to_container(config.actor_rollout_ref.model.lora.hybrid.zeroth_order, resolve=True)
    assert node == {
        "enabled": True,
        "lr": 1e-8,
        "epsilon": 1e-4,
        "directions": 1,
        "modules": ["up_proj", "model.embed_tokens"],
        "seed": 0,
    }
    assert hybrid.zeroth_order.enabled and "data.shuffle" not in capsys.readouterr().out
    check("data.shuffle=false")
    assert "WARNING: data.shuffle: False takes the rows in the same order" in capsys.readouterr().out


def test_it_is_off_by_default():
    assert HybridLoraConfig().zeroth_order.enabled is False


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([f"{OPTION}lr=null"], f"{OPTION}lr: None is not usable; give a learning rate"),
        ([f"{OPTION}lr=0"], f"{OPTION}lr: 0.0 is not usable"),
        ([f"{OPTION}lr=-1e-6"], f"{OPTION}lr: -1e-06 is not usable"),
        ([f"{OPTION}epsilon=0"], f"{OPTION}epsilon: 0.0 is not usable; give a distance above 0"),
        ([f"{OPTION}epsilon=-1"], f"{OPTION}epsilon: -1.0 is not usable"),
        ([f"{OPTION}directions=0"], f"{OPTION}directions: 0 is not usable; give 1 direction or more"),
        ([f"{OPTION}seed=-1"], f"{OPTION}seed: -1 is not usable"),
        ([f"{OPTION}modules=[up_proj,up_proj]"], f"{OPTION}modules: .* is not usable; give each name once"),
        ([f"{OPTION}modules=[upproj]"], f"{OPTION}modules: 'upproj' matches no module of this model"),
        ([f"{OPTION}modules=[lm_head]"], f"{OPTION}modules: 'lm_head' matches no module"),
        ([f"{OPTION}enabled=false"], f"{OPTION}lr: 1e-08 has no effect here; .*zeroth_order.enabled=true"),
        (
            [f"{OPTION}epsilon=2e-4"],
            f"{OPTION}epsilon: 0.0002 is lost in the rounding of .*param_dtype=bf16; give 0.0003",
        ),
        ([PRECISION % "bf16", f"{OPTION}epsilon=1e-5"], f"{OPTION}epsilon: 1e-05 is lost in the rounding"),
        (["hybrid_lora.sync=adapter"], "hybrid_lora.sync: 'adapter' does not work with .*enabled=true; give merge"),
        (["hybrid_lora.sync=receiver_merge"], "hybrid_lora.sync: 'receiver_merge' does not work"),
        (
            ["hybrid_lora.sync=sparse_merge", "actor_rollout_ref.rollout.dtype=bfloat16"],
            "hybrid_lora.sync: 'sparse_merge' does not work",
        ),
        ([f"{ACTOR}strategy=fsdp"], "actor_rollout_ref.actor.strategy: 'fsdp' does not work .* give fsdp2"),
        (["hybrid_lora.lora.dropout=0.1"], "hybrid_lora.lora.dropout: 0.1 does not work .* give 0.0"),
        (
            [f"{ACTOR}policy_loss.loss_mode=gpg"],
            "loss_mode: 'gpg' does not work .* give one of vanilla, gspo, hybrid_gspo",
        ),
        (
            ["actor_rollout_ref.rollout.dtype=bfloat16"],
            "actor_rollout_ref.rollout.dtype: bfloat16 rounds frozen weights that the trainer holds in float32",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(check, more, said):
    with pytest.raises(ConfigurationError, match=said) as refused:
        check(*more)
    assert "\n" not in str(refused.value)


def test_a_model_with_dropout_of_its_own_is_refused(check, tiny_qwen2, tmp_path):
    model = shutil.copytree(tiny_qwen2, tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"attention_dropout": 0.1}))
    with pytest.raises(
        ConfigurationError, match="override_config.attention_dropout: 0.1 of the model's config does not"
    ):
        check(model=model)


def test_a_run_without_rollouts_is_refused():
    hybrid = HybridLoraConfig()
    requirements.check_zeroth_order({}, hybrid, SFT)
    hybrid.zeroth_order.enabled = True
    with pytest.raises(ConfigurationError, match="zeroth_order.enabled: True needs the rollouts"):
        requirements.check_zeroth_order({}, hybrid, SFT)
