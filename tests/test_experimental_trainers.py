"""``+hybrid_lora=enabled`` on the configurations of verl's experimental trainers; test_entry_points has their runs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed")

import verl  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402

from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from hybrid_lora_plugin.verl_backend.requirements import ENGINE_MODULE  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402

TRAINERS = {"one_step_off_policy": "one_step_off_ppo_trainer", "fully_async_policy": "fully_async_ppo_trainer"}


@pytest.fixture(scope="module")
def artifact(tiny_qwen2, tmp_path_factory):
    return make_allocation(tiny_qwen2, tmp_path_factory.mktemp("artifact") / "allocation")


def checked(trainer, model, *overrides):
    search = "hydra.searchpath=[pkg://verl.trainer.config]"
    folder = Path(verl.__file__).parent / "experimental" / trainer / "config"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose(
            TRAINERS[trainer],
            overrides=[
                search, "+hybrid_lora=enabled", f"actor_rollout_ref.model.path={model}", *overrides,
            ],
            return_hydra_config=True,
        )  # fmt: skip
    check_configuration(config)
    return config


@pytest.mark.parametrize("trainer", TRAINERS)
def test_settings_of_the_trainer_stay_and_nobody_counts_them_as_given(trainer, tiny_qwen2, artifact):
    config = checked(trainer, tiny_qwen2, f"hybrid_lora.allocation={artifact}")
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.checkpoint_engine.backend, rollout.checkpoint_engine.custom_backend_module) == (
        "nccl",
        ENGINE_MODULE,
    )
    assert (config.hybrid_lora.full_lr, config.hybrid_lora.lora.lr) == (1e-6, 2.5e-5)
    assert config.actor_rollout_ref.actor.strategy == "fsdp2"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_policy_probe_is_refused_where_steps_use_earlier_prompts(trainer, tiny_qwen2, tmp_path):
    with pytest.raises(ConfigurationError, match="'policy' cannot be probed by a trainer.*verl.trainer.main_ppo"):
        place = f"trainer.default_local_dir={tmp_path}"
        checked(trainer, tiny_qwen2, "hybrid_lora.probe.objective=policy", place)


@pytest.mark.parametrize("option", ["use_trainer_do_validate", "use_dynamic_resource_scheduling"])
def test_engines_on_both_sides_of_the_fully_asynchronous_trainer_are_refused(option, tiny_qwen2, artifact):
    with pytest.raises(ConfigurationError, match=f"async_training.{option}: True .*give false"):
        checked(
            "fully_async_policy",
            tiny_qwen2,
            f"hybrid_lora.allocation={artifact}",
            f"async_training.{option}=true",
        )
