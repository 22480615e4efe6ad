"""Whole verl runs: rollout engines apart from the trainer, and what a failed sync does to a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from recipes.demo import base_model, task  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.verl_processes import ROOT, run  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ray]

PLUGIN = "hybrid_lora_plugin.verl_backend.engine_registration"
#: what ``faulty_stream`` damages in the run's workers
FAULTY_SYNC, VICTIM = 3, "model.layers.1.mlp.down_proj"
#: verl 0.9.1: without colocated replicas its trainer logs with an argument that its logger does not take
MICRO_BATCHES = ("actor.ppo", "rollout.log_prob", "ref.log_prob")
ENVIRONMENT = {"VERL_LOGGING_LEVEL": "WARN"}
APART = [
    "trainer.v1.trainer_mode=separate_async",
    "trainer.v1.separate_async.parameter_sync_step=1",
    "actor_rollout_ref.hybrid_engine=false",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
    f"actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=[{PLUGIN},tests.support.gloo_checkpoint_engine]",
    "ray_kwargs.ray_init.num_gpus=2",
]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_run_with_engines_apart_proves_its_syncs_and_ends_at_the_first_that_fails(tmp_path):
    """``separate_async`` over gloo in mode adapter: sync 1 at start, sync 2 after step 1, and the third is damaged."""
    # The demo's tokenizer: verl's turn builder wants a newline to be a token.
    tokenizer, model = base_model.build_tokenizer(), tmp_path / "model"
    base_model.build_untrained(tokenizer, hidden=64, intermediate=128, layers=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    allocation = make_allocation(model, tmp_path / "allocation")
    files = task.write_rl_parquet(tmp_path / "data")
    before = digests(model) | digests(allocation)
    metrics = tmp_path / "metrics.jsonl"
    done = run(
        [
            "-m", "verl.trainer.main_ppo", "--config-dir", str(ROOT / "recipes"),
            "+hybrid_lora=enabled", "+recipe=demo",
            f"hybrid_lora.allocation={allocation}", "hybrid_lora.sync=adapter", "hybrid_lora.lora.rank=4",
            f"actor_rollout_ref.model.path={model}",
            f"actor_rollout_ref.model.external_lib=[tests.support.faulty_stream,{PLUGIN}]",
            f"data.train_files={files['train']}", f"data.val_files={files['validation']}",
            "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8", "actor_rollout_ref.rollout.n=2",
            *(f"actor_rollout_ref.{part}_micro_batch_size_per_gpu=16" for part in MICRO_BATCHES),
            "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.total_training_steps=4",
            "trainer.save_freq=1",
            f"trainer.default_local_dir={tmp_path / 'checkpoints'}", f"hydra.run.dir={tmp_path / 'hydra'}", *APART,
        ],
        check=False,
        VERL_FILE_LOGGER_PATH=str(metrics),
        FAULTY_SYNC=str(FAULTY_SYNC),
        FAULTY_TENSOR=VICTIM,
        **ENVIRONMENT,
    )  # fmt: skip
    text = done.stdout
    assert done.returncode != 0 and f"weight sync {FAULTY_SYNC} of step 2 failed" in text, text[-5000:]
    assert f"{VICTIM}.lora_A.weight: sent with digest" in text and "continue from the last checkpoint" in text
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["step"] for step in steps] == [1], "step 1 was logged with its sync, step 2 never was"
    logged = steps[0]["data"]
    assert logged["hybrid_lora/sync_digest_ok"] == 1 and logged["training/rollout_probs_diff_max"] < 1e-4
    assert 0 < logged["hybrid_lora/sync_tensors_changed"] <= logged["hybrid_lora/sync_tensors"]
    # What was saved before the sync is whole, and a sync writes nothing.
    for step in (1, 2):
        assert (tmp_path / f"checkpoints/global_step_{step}/actor/hybrid_lora/trainables.safetensors").is_file()
    assert digests(model) | digests(allocation) == before
