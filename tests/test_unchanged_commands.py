"""A command that trained with verl before, the plugin's arguments added and nothing else changed: three real steps."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from recipes.demo import base_model, task  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.verl_processes import ROOT, run  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ray]

STEPS = 3
#: GRPO with full fine-tuning as a team has it in a file of its own, over verl's; a strategy that is verl's default too
FULL_FINE_TUNING = """
hydra:
  searchpath: [pkg://verl.trainer.config, "file://{recipes}"]
defaults: [ppo_trainer, recipe/machine/cpu, _self_]
algorithm: {{adv_estimator: grpo, use_kl_in_reward: false}}
data: {{train_batch_size: 8, max_prompt_length: 24, max_response_length: 8, dataloader_num_workers: 0}}
actor_rollout_ref:
  model: {{external_lib: json}}
  actor:
    strategy: fsdp
    ppo_mini_batch_size: 8
    ppo_micro_batch_size_per_gpu: 16
    use_kl_loss: true
    kl_loss_coef: 0.001
    optim: {{lr: 3.0e-6, lr_warmup_steps: 2, weight_decay: 0.1}}
  rollout:
    n: 2
    load_format: dummy
    log_prob_micro_batch_size_per_gpu: 16
    max_model_len: 64
    max_num_batched_tokens: 1024
  ref: {{log_prob_micro_batch_size_per_gpu: 16}}
trainer: {{val_before_train: false, test_freq: -1, total_epochs: 5, logger: [console, file]}}
"""
#: GRPO with verl's own LoRA, on the command line
LORA = [
    "+recipe/machine=cpu", "algorithm.adv_estimator=grpo",
    "data.train_batch_size=8", "data.max_prompt_length=24", "data.max_response_length=8",
    "data.dataloader_num_workers=0",
    "actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=32",
    "actor_rollout_ref.model.target_modules=all-linear", "actor_rollout_ref.rollout.load_format=safetensors",
    "actor_rollout_ref.rollout.layered_summon=true", "actor_rollout_ref.actor.strategy=fsdp2",
    # Of rewards alone an untrained model learns nothing: none is right, and every advantage 0.
    "actor_rollout_ref.actor.entropy_coeff=0.01",
    "actor_rollout_ref.actor.optim.lr=3e-5", "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16", "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16", "actor_rollout_ref.rollout.max_model_len=64",
    "actor_rollout_ref.rollout.max_num_batched_tokens=1024", "actor_rollout_ref.rollout.dtype=bfloat16",
    "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.total_epochs=5",
    "trainer.logger=[console,file]",
]  # fmt: skip
#: what is added, the rates that follow, and the loudest rollout difference (fp32, and bf16 beside an fp32 trainer)
COMMANDS = {
    "full fine-tuning by a file": (3e-6, 7.5e-5, 1e-4),
    "verl's LoRA": (1.2e-6, 3e-5, 0.05),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unchanged")
    tokenizer, model = base_model.build_tokenizer(), folder / "model"
    base_model.build_untrained(tokenizer, hidden=64, intermediate=128, layers=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (folder / "team.yaml").write_text(FULL_FINE_TUNING.format(recipes=ROOT / "recipes"))
    return folder, make_allocation(model, folder / "allocation"), task.write_rl_parquet(folder / "data")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_before_trains_at_its_own_rate_with_every_sync_proven(command, setting, tmp_path):
    full, lora, most = COMMANDS[command]
    folder, allocation, files = setting
    if command == "verl's LoRA":
        theirs = ["--config-dir", str(ROOT / "recipes"), *LORA]
    else:
        theirs = ["--config-path", str(folder), "--config-name", "team"]
    done = run(
        [
            "-m", "verl.trainer.main_ppo", *theirs,
            f"actor_rollout_ref.model.path={folder / 'model'}",
            f"data.train_files={files['train']}", f"data.val_files={files['validation']}",
            "reward.custom_reward_function.path=recipes/demo/reward.py",
            f"trainer.total_training_steps={STEPS}", f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
            f"hydra.run.dir={tmp_path / 'hydra'}",
            "+hybrid_lora=enabled", f"hybrid_lora.allocation={allocation}",
        ],
        VERL_FILE_LOGGER_PATH=str(tmp_path / "metrics.jsonl"),
    )  # fmt: skip
    text = done.stdout
    assert f"learning rates: full modules {full:g}" in text and f"LoRA {lora:g}" in text
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    steps = {line["step"]: line["data"] for line in lines if "actor/lr_full" in line["data"]}
    assert list(steps) == list(range(1, STEPS + 1))
    last = steps[STEPS]
    # Behind the warm-up of the file.
    assert (last["actor/lr_full"], last["actor/lr_lora"]) == (pytest.approx(full), pytest.approx(lora))
    for step in steps.values():
        assert step["hybrid_lora/sync_digest_ok"] == 1
        assert step["actor/lr_lora"] == pytest.approx(25 * step["actor/lr_full"])
    assert last["actor/update_norm_full"] > 0 and last["actor/update_norm_lora"] > 0
    if "training/rollout_probs_diff_max" in last:
        assert last["training/rollout_probs_diff_max"] < most
