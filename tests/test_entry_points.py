"""verl's other trainers from their command lines, two steps each: what the rollout engine held at the end is proven."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from hybrid_lora_plugin.training.export import export_checkpoint  # noqa: E402
from hybrid_lora_plugin.training.model_card import CARD  # noqa: E402
from recipes.demo import base_model, task  # noqa: E402
from tests.support import held_weights  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.folders import assert_same_files  # noqa: E402
from tests.support.verl_processes import ROOT, run  # noqa: E402
from tests.test_sync_run import MICRO_BATCHES, PLUGIN  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ray]

STEPS, PROMPTS, ANSWERS = 2, 4, 2
GLOO = f"[{PLUGIN},tests.support.gloo_checkpoint_engine]"
#: engines apart from the trainer, as both experimental trainers have them
APART = [
    "hydra.searchpath=[pkg://verl.trainer.config]",
    "actor_rollout_ref.hybrid_engine=false",
    "rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
    f"actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module={GLOO}",
    "ray_kwargs.ray_init.num_gpus=2",
    # Slots that verl's own tasks ask for, 10 each.
    "ray_kwargs.ray_init.num_cpus=40",
]
#: module, its arguments, and the step whose weights the engine holds at the end
TRAINERS = {
    "use_v1=false": ("verl.trainer.main_ppo", ["trainer.use_v1=false"], STEPS),
    # It syncs a step's weights before the next step's update.
    "one step off": ("verl.experimental.one_step_off_policy.main_ppo", APART, STEPS - 1),
    "fully async": (
        "verl.experimental.fully_async_policy.fully_async_main",
        [
            *APART,
            "data.train_batch_size=0",
            f"rollout.total_rollout_steps={STEPS * PROMPTS}",
            "async_training.trigger_parameter_sync_step=1",
            "async_training.staleness_threshold=0",
        ],
        STEPS,
    ),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("entry-points")
    tokenizer, model = base_model.build_tokenizer(), folder / "model"
    base_model.build_untrained(tokenizer, hidden=64, intermediate=128, layers=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    make_allocation(model, folder / "allocation")
    return folder, task.write_rl_parquet(folder / "data")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_steps_leave_the_engine_with_the_bits_of_the_checkpoint(trainer, setting, tmp_path):
    module, arguments, held_step = TRAINERS[trainer]
    folder, files = setting
    checkpoints = tmp_path / "checkpoints"
    done = run(
        [
            "-m", module, "--config-dir", str(ROOT / "recipes"), "+hybrid_lora=enabled", "+recipe=demo",
            f"hybrid_lora.allocation={folder / 'allocation'}", "hybrid_lora.sync=sparse_merge",
            "hybrid_lora.lora.rank=4", "actor_rollout_ref.rollout.dtype=bfloat16",
            f"actor_rollout_ref.model.path={folder / 'model'}",
            f"data.train_files={files['train']}", f"data.val_files={files['validation']}",
            f"data.train_batch_size={PROMPTS}", f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
            *(f"actor_rollout_ref.{part}_micro_batch_size_per_gpu={PROMPTS * ANSWERS}" for part in MICRO_BATCHES),
            f"actor_rollout_ref.rollout.n={ANSWERS}", "trainer.val_before_train=false", "trainer.test_freq=-1",
            f"trainer.total_training_steps={STEPS}", "trainer.save_freq=1", "trainer.logger=[console]",
            "hybrid_lora.export_at_save=true",
            f"trainer.default_local_dir={checkpoints}", f"hydra.run.dir={tmp_path / 'hydra'}", *arguments,
        ],
        **{
            held_weights.FOLDER: str(tmp_path),
            "VERL_USE_EXTERNAL_MODULES": held_weights.__name__,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
    )  # fmt: skip
    assert "hybrid_lora: learning rates" in done.stdout
    with safe_open(tmp_path / held_weights.FILE, "pt") as file:
        # One sync before the first step; each after it has built on the one before.
        assert int(file.metadata()["number"]) >= STEPS + 1
        assert int(file.metadata()["builds_on"]) == int(file.metadata()["number"]) - 1
    held = load_file(tmp_path / held_weights.FILE)
    exported = export_checkpoint(checkpoints / f"global_step_{held_step}", tmp_path / "exported")
    at_save = checkpoints / f"global_step_{held_step}" / "actor" / "huggingface"
    (exported.folder / CARD).unlink()
    assert_same_files(at_save, exported.folder)
    exported = load_file(exported.folder / "model.safetensors")
    assert held.keys() == exported.keys() and all(torch.equal(held[name], exported[name]) for name in held)
    base = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(exported[name], base[name].bfloat16()) for name in base)


#: a server of verl's own class for a model under Hybrid-LoRA, as a process without the plugin would start it
PLAIN_SERVER = """
import sys
import ray
from omegaconf import OmegaConf
from verl.workers.config import RolloutConfig
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

model = OmegaConf.create({
    "_target_": "verl.workers.config.HFModelConfig", "path": sys.argv[1], "external_lib": sys.argv[2],
    "lora": {"hybrid": {"sync": "merge"}},
})
ray.init(num_cpus=2, include_dashboard=False)
server = ray.remote(vLLMHttpServer).remote(
    config=RolloutConfig(name="vllm", max_model_len=64), model_config=model, rollout_mode=RolloutMode.STANDALONE,
    workers=[], replica_rank=0, node_rank=0, gpus_per_node=1, nnodes=1, cuda_visible_devices="",
)
try:
    # What verl waits for before it launches an engine.
    print("made", ray.get(server.get_master_address.remote()))
except ray.exceptions.RayActorError as error:
    print("ended", error)
"""


def test_a_server_of_verls_own_ends_while_it_is_made(setting):
    folder, _ = setting
    said = run(["-c", PLAIN_SERVER, str(folder / "model"), PLUGIN]).stdout
    assert "made" not in said.split() and "ended The actor died" in said
    assert "vllm_async_server.vLLMHttpServer, which proves no weights" in said
    assert "docs/troubleshooting.md#server-without-the-plugin" in said
