"""Models with recurrent layers under verl from its command line: rollouts are the trainer's, in each mode of a sync."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from recipes.demo import base_model, task  # noqa: E402
from tests.support import names_of_torchvision, sync_modes_in_turns  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.tiny_families import make_family  # noqa: E402
from tests.support.verl_processes import ROOT, run  # noqa: E402
from tests.test_sync_run import MICRO_BATCHES, PLUGIN  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ray]

STEPS = 5
IN_TURNS = ("merge", "receiver_merge")
#: of the first sync and that after each step; ``sparse_merge`` sends what changed since its own last one
ONE_AFTER_THE_OTHER = ("sparse_merge", "sparse_merge", "sparse_merge", "merge", "receiver_merge", "merge")


def setting_of(family, folder, **fields):
    """A folder with a model and an allocation for it, and the files of a run."""
    model = make_family(family, folder / "model", base_model.build_tokenizer(), **fields)
    make_allocation(model, folder / "allocation")
    return folder, task.write_rl_parquet(folder / "data")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    # As the smaller ones of its checkpoints have it; ``tests/test_model_families.py`` has the norm, in two groups.
    fields = {"mamba_rms_norm": False, "mamba_n_groups": 1}
    # Predictions that are far from uniform: others would hide a wrong weight.
    fields |= {"lm_head_multiplier": 4.0}
    return setting_of("falcon_h1", tmp_path_factory.mktemp("falcon"), **fields)


def trained(setting, out, *overrides, check=True, **environment):
    """A run of verl: what it printed, and the metrics of its steps."""
    (folder, files), metrics = setting, out / "metrics.jsonl"
    done = run(
        [
            "-m", "verl.trainer.main_ppo", "--config-dir", str(ROOT / "recipes"), "+hybrid_lora=enabled",
            "+recipe=demo", f"hybrid_lora.allocation={folder / 'allocation'}", "hybrid_lora.lora.rank=4",
            "hybrid_lora.full_lr=1e-3", "hybrid_lora.lora.lr=1e-2",
            f"actor_rollout_ref.model.path={folder / 'model'}",
            f"data.train_files={files['train']}", f"data.val_files={files['validation']}",
            "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8", "actor_rollout_ref.rollout.n=4",
            *(f"actor_rollout_ref.{part}_micro_batch_size_per_gpu=32" for part in MICRO_BATCHES),
            f"reward.custom_reward_function.path={ROOT / 'tests/support/uneven_reward.py'}",
            "trainer.val_before_train=false", "trainer.test_freq=-1", f"trainer.total_training_steps={STEPS}",
            f"trainer.default_local_dir={out / 'checkpoints'}", f"hydra.run.dir={out / 'hydra'}", *overrides,
        ],
        check=check,
        VERL_FILE_LOGGER_PATH=str(metrics),
        **environment,
    )  # fmt: skip
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return done.stdout, [json.loads(line)["data"] for line in lines]


def assert_one_policy(steps):
    """At every step, with weights that move far more in the policy than the two ends may differ by."""
    assert_proven(steps)
    assert max(step["training/rollout_probs_diff_max"] for step in steps) < 1e-4


def assert_proven(steps):
    assert len(steps) == STEPS
    assert all(step["hybrid_lora/sync_digest_ok"] == 1 for step in steps)
    assert min(step["actor/update_norm_full"] for step in steps) > 1e-2
    assert min(step["actor/update_norm_lora"] for step in steps) > 1e-2
    # From the base model to the policy that the last rollouts came from, in nats at a token.
    assert steps[-1]["actor/kl_loss"] > 0.01


def test_rollouts_are_the_trainers_with_weights_that_either_end_merges(setting, tmp_path):
    """One run, whose syncs have both modes in turns; ``sparse_merge`` is for 16 bits."""
    _, steps = trained(
        setting,
        tmp_path,
        "hybrid_lora.sync=receiver_merge",
        f"actor_rollout_ref.model.external_lib=[tests.support.sync_modes_in_turns,{PLUGIN}]",
        **{sync_modes_in_turns.MODES: ",".join(IN_TURNS)},
    )
    assert_one_policy(steps)
    merged, factors = (set(step["hybrid_lora/sync_bytes"] for step in steps[start::2]) for start in (1, 0))
    assert len(merged) == len(factors) == 1 and merged.pop() > 2 * factors.pop()


def test_rollouts_are_the_trainers_with_adapters_that_the_engine_runs(setting, tmp_path):
    _, steps = trained(setting, tmp_path, "hybrid_lora.sync=adapter")
    assert_one_policy(steps)


def test_a_run_that_packs_rows_is_refused_before_the_engine_starts(setting, tmp_path):
    said, steps = trained(
        setting,
        tmp_path,
        "actor_rollout_ref.model.use_remove_padding=true",
        "actor_rollout_ref.model.override_config.attn_implementation=eager",
        check=False,
    )
    assert not steps, said[-5000:]
    assert "packed rows leak into each other in this model (falcon_h1" in said


def test_rollouts_of_qwen3_5_in_bfloat16_are_the_trainers_in_three_modes(tmp_path):
    # Its weights larger than by default, for predictions that are not uniform.
    setting = setting_of("qwen3_5_text", tmp_path, initializer_range=0.2)
    _, steps = trained(
        setting,
        tmp_path,
        "hybrid_lora.sync=receiver_merge",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        f"actor_rollout_ref.model.external_lib=[tests.support.sync_modes_in_turns,{PLUGIN}]",
        **{sync_modes_in_turns.MODES: ",".join(ONE_AFTER_THE_OTHER)},
        **names_of_torchvision.everywhere(tmp_path),
    )
    assert_proven(steps)
    apart = [step["training/rollout_probs_diff_mean"] for step in steps]
    # With the base model's weights on both sides bfloat16 alone makes the first step's.
    assert max(apart) < 2 * apart[0] < 0.01
    for step in steps:
        assert abs(step["hybrid_lora/update_arrived_lora"] - 1) < 0.01
        assert abs(step["hybrid_lora/update_arrived_full"] - 1) < 0.01
    *_, whole, factors, again = (step["hybrid_lora/sync_bytes"] for step in steps)
    assert min(whole, again) > 2 * factors
