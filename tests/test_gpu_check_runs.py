"""Every command line of the GPU check is one that verl and the plugin accept, for a GPU that none of us has."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from functools import cache

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from omegaconf import OmegaConf, open_dict  # noqa: E402

from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.sync.modes import SYNC_MODES, sync_mode  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from recipes.gpu_check.model import Shape, build  # noqa: E402
from recipes.gpu_check.runs import RUNS, Files, overrides_of  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.rollout_harness import compose  # noqa: E402

MACHINES = {"cuda": ("cuda", True), "cuda without flash-attn": ("cuda", False), "cpu": ("cpu", False)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The real shape, 0.5 billion parameters, without its weights: nothing here reads them."""
    folder = tmp_path_factory.mktemp("check")
    files = Files(folder, folder / "weights")
    # With weights: the preflight refuses a folder without.
    build(files.model, Shape(layers=2, hidden=64, vocabulary=512))
    make_allocation(files.model, files.allocation, ratio=0.1)
    return files


@cache
def composed_once(*overrides):
    return compose(list(overrides))


def composed(name, machine, files, *more):
    device, flash_attention = MACHINES[machine]
    # A second of computing each; the preflight changes what it is given.
    return deepcopy(composed_once(*overrides_of(RUNS[name], files, 4, device, flash_attention), *more))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", RUNS)
def test_command_line_passes_the_preflight_and_verls_own_validation(name, machine, files):
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = composed(name, machine, files)
    if RUNS[name].sync:
        hybrid = check_configuration(config)
        assert hybrid.sync == RUNS[name].sync and config.actor_rollout_ref.model.lora.hybrid.sync == hybrid.sync
        assert (hybrid.lora.lr, hybrid.full_lr) == (2.5e-5, 1e-6), "the paper's"
        assert hybrid.sync_check == "digest" and hybrid.sync_rounding == "stochastic"
    else:
        assert "hybrid_lora" not in config and config.actor_rollout_ref.actor.optim.lr == 2.5e-5
        assert config.actor_rollout_ref.model.lora_rank == 16 and config.actor_rollout_ref.model.lora.merge
    with open_dict(config):
        OmegaConf.resolve(config)
    validate_config(config=config, use_reference_policy=True, use_critic=False)
    for node in (config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.algorithm):
        assert dataclasses.is_dataclass(omega_conf_to_dataclass(node))
    actor = config.actor_rollout_ref.actor
    assert actor.use_kl_loss and actor.policy_loss.loss_mode == "hybrid_gspo"
    assert config.data.train_batch_size // actor.ppo_mini_batch_size > 1


@pytest.mark.parametrize("name", RUNS)
def test_a_gpu_runs_what_users_run(name, files):
    """bf16, sleep mode, CUDA graphs and the executor that verl gives vLLM, with flash attention."""
    config = composed(name, "cuda", files).actor_rollout_ref
    rollout = config.rollout
    assert rollout.dtype == "bfloat16" and config.actor.fsdp_config.mixed_precision.param_dtype == "bf16"
    assert rollout.enable_sleep_mode and rollout.free_cache_engine and not rollout.enforce_eager
    assert not rollout.engine_kwargs.vllm, "no executor but verl's"
    assert config.model.use_remove_padding and "attn_implementation" not in config.model.override_config
    # Each bucket holds the largest tensor, the embedding, and the model does not fit into one.
    bucket, shape = rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20, Shape()
    assert 2 * shape.vocabulary * shape.hidden < bucket < 2 * 494e6
    assert rollout.max_model_len == rollout.prompt_length + rollout.response_length


def test_without_flash_attention_the_trainer_uses_sdpa(files):
    model = composed("merge", "cuda without flash-attn", files).actor_rollout_ref.model
    assert model.override_config.attn_implementation == "sdpa" and not model.use_remove_padding


def test_every_sync_mode_has_a_run_and_the_first_is_saved_and_validated(files):
    assert {run.sync for run in RUNS.values()} - {None} == set(SYNC_MODES)
    assert [run.name for run in RUNS.values() if run.saves] == ["merge"]
    trainer = composed("merge", "cuda", files).trainer
    assert (trainer.total_training_steps, trainer.save_freq, trainer.test_freq) == (4, 4, 4)
    assert composed("adapter", "cuda", files).trainer.save_freq == -1


def test_sleep_levels_are_those_of_the_modes(files):
    """One that keeps its weights asleep in three of the modes, as docs/weight-sync.md says."""
    kept = {name for name, run in RUNS.items() if run.sync and sync_mode(run.sync).engine_keeps_weights}
    assert kept == {"sparse_merge", "adapter", "receiver_merge"}


def test_the_reference_pass_comes_first_where_the_old_log_probabilities_are_the_rollouts(files):
    assert composed("bypass", "cuda", files).algorithm.rollout_correction.bypass_mode
    assert not composed("merge", "cuda", files).algorithm.rollout_correction.bypass_mode


def test_a_mistake_on_top_would_be_refused(files):
    config = composed("sparse_merge", "cuda", files, "actor_rollout_ref.rollout.dtype=float32")
    with pytest.raises(ConfigurationError, match="hybrid_lora.sync=sparse_merge"):
        check_configuration(config)


@pytest.mark.parametrize(("name", "steps"), [("merge", 6), ("adapter", 4), ("verl_lora", 4), ("bypass", 2)])
def test_steps_of_a_run(name, steps):
    assert RUNS[name].steps_of(6) == steps and RUNS[name].steps_of(2) == 2
