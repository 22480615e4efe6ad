"""A whole run of verl's ``main_ppo`` under Ray, every process of it killed at random moments and started again.

    python -m tests.support.kill_rl_runs FOLDER [--kills 6] [--seed 0] [--steps 3]

What ``kill_trials`` shows of the engine to the byte, rollouts cannot: vLLM samples on from another state. Here a kill
takes driver, Ray, trainer and rollout engine at once, as a machine that loses power does. After each, the checkpoint
that the tracker names must be whole and no older than one that was named before; the same command must go on from it;
and the run must end at its last step with a checkpoint that exports to what transformers loads.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import torch

from tests.support.allocations import make_allocation
from tests.support.verl_processes import ROOT, environment_of

PROMPTS, ANSWERS = 4, 2
#: in the environment of every process of a run
MARK = "HYBRID_LORA_KILLED_RUN"


def command(folder: Path, steps: int) -> list[str]:
    """The command of a run on a tiny random model, made in ``folder``."""
    from recipes.demo import base_model, task
    from tests.test_sync_run import MICRO_BATCHES

    model = folder / "model"
    tokenizer = base_model.build_tokenizer()
    base_model.build_untrained(tokenizer, hidden=64, intermediate=128, layers=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    make_allocation(model, folder / "allocation")
    files = task.write_rl_parquet(folder / "data")
    return [
        sys.executable, "-u", "-m", "verl.trainer.main_ppo", "--config-dir", str(ROOT / "recipes"),
        "+hybrid_lora=enabled", "+recipe=demo", f"hybrid_lora.allocation={folder / 'allocation'}",
        "hybrid_lora.lora.rank=4", f"actor_rollout_ref.model.path={model}",
        f"data.train_files={files['train']}", f"data.val_files={files['validation']}",
        f"data.train_batch_size={PROMPTS}", f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        *(f"actor_rollout_ref.{part}_micro_batch_size_per_gpu={PROMPTS * ANSWERS}" for part in MICRO_BATCHES),
        f"actor_rollout_ref.rollout.n={ANSWERS}", "trainer.val_before_train=false", "trainer.test_freq=1",
        f"trainer.total_training_steps={steps}", "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=1",
        "trainer.logger=[console]", "trainer.resume_mode=auto",
        f"trainer.default_local_dir={folder / 'checkpoints'}", f"hydra.run.dir={folder / 'hydra'}",
    ]  # fmt: skip


def started(arguments: list[str], log: Path) -> tuple[subprocess.Popen, str]:
    mark = uuid.uuid4().hex
    environment = environment_of(**{MARK: mark, "PYTHONPATH": str(ROOT)})
    with log.open("w") as output:
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    return process, mark


def kill_all(mark: str) -> int:
    """End every process of a run at once; returns how many there were."""
    killed = 0
    while found := [process for process in psutil.process_iter() if _mark_of(process) == mark]:
        for process in found:
            try:
                process.kill()
                killed += 1
            except psutil.NoSuchProcess:
                pass
        time.sleep(0.1)
    return killed


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK)
    except psutil.Error:
        return None


def named_step(checkpoints: Path) -> int:
    """The step that the tracker names, whose checkpoint is whole; 0 where there is none."""
    from hybrid_lora_plugin.training.checkpoint import load_trained

    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    text = tracker.read_text().strip() if tracker.exists() else ""
    if not text:
        return 0
    folder = checkpoints / f"global_step_{text}"
    load_trained(folder)
    shards = list((folder / "actor").glob("*.pt"))
    assert len(shards) >= 3, shards
    for file in [*shards, folder / "data.pt"]:
        torch.load(file, weights_only=False, map_location="cpu")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    folder = given.folder.resolve()
    arguments, checkpoints, draw = command(folder, given.steps), folder / "checkpoints", random.Random(given.seed)
    reached = kills = 0
    while True:
        log = folder / f"start-{kills}.log"
        process, mark = started(arguments, log)
        begun, moment = time.monotonic(), draw.uniform(20, 150) if kills < given.kills else float("inf")
        while process.poll() is None and time.monotonic() - begun < moment:
            time.sleep(0.2)
        ended = process.poll()
        kill_all(mark)
        process.wait()
        text = log.read_text(errors="replace")
        if found := re.search(r"Setting global step to (\d+)", text):
            assert int(found[1]) == reached, f"{log}: went on from step {found[1]}, named was {reached}"
        step = named_step(checkpoints)
        assert step >= reached, f"{log}: step {reached} was named before, now {step}"
        reached = step
        if ended is not None:
            assert ended == 0, f"{log}: exit status {ended}"
            break
        kills += 1
        print(f"killed after {time.monotonic() - begun:.0f} s; the tracker names step {reached}", flush=True)
    assert reached == given.steps, reached
    from transformers import AutoModelForCausalLM

    from hybrid_lora_plugin.training.export import export_checkpoint

    exported = export_checkpoint(checkpoints / f"global_step_{reached}", folder / "exported").folder
    _, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    print(f"{kills} kills of a whole run, {kills} starts that went on; it ended at step {reached} and was exported")


if __name__ == "__main__":
    main()
