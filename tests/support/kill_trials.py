"""A probe, an export, and a run's start, steps, saves and syncs, killed at random moments and started again.

    python -m tests.support.kill_trials FOLDER [--what probe halving export run] [--count 40] [--seed 0]

Each trial starts the work in a fork and kills it, by SIGKILL, at a random moment or just before a random call that
changes a disk, up to three times; then the same start ends by itself, and what it leaves must be what an uninterrupted
one leaves, byte for byte. Prints a line for each kind with the kills and resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.allocations import make_allocation
from tests.support.kills import events_of, killed_after, killed_at
from tests.support.processes import free_port
from tests.support.tiny_models import make_tiny_qwen2

Contents = dict[str, bytes]


def trials(
    work: Callable[[Path], None], result: Callable[[Path], Contents], check, folder: Path, count: int, seed: int
):
    """Kill and start again ``count`` times.

    Args:
        work: does it all in a folder; a second call in the same folder goes on.
        result: what it leaves there that has to be equal.
        check: asserts of a folder whose work was killed that nothing in it is half there.
        folder: for the trials, one folder each.
        count, seed: of the trials.

    Returns:
        Kills and starts that went on from one.
    """
    folder.mkdir(parents=True)
    straight = folder / "straight"
    straight.mkdir()
    begun = time.monotonic()
    events = events_of(lambda: work(straight))
    seconds, wanted = time.monotonic() - begun, result(straight)
    assert wanted and events
    draw, kills, resumes = random.Random(seed), 0, 0
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        for _ in range(draw.choice([1, 1, 2, 3])):
            if draw.random() < 0.5:
                killed = killed_at(draw.randrange(events), lambda place=place: work(place))
            else:
                killed = killed_after(draw.uniform(0, seconds), lambda place=place: work(place))
            kills += killed
            check(place, wanted)
        assert not killed_after(600, lambda place=place: work(place)), "it did not end"
        resumes += 1
        left = result(place)
        assert left.keys() == wanted.keys(), sorted(left.keys() ^ wanted.keys())
        different = [name for name in wanted if left[name] != wanted[name]]
        assert different == [], f"trial {number} of seed {seed}: {different}"
        shutil.rmtree(place)
        if number % 10 == 9:
            print(f"kill_trials: {folder.parent.name}: {kills} kills, {resumes} resumes so far", flush=True)
    return kills, resumes


def files(folder: Path) -> Contents:
    """All files below a folder, by relative path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# -- the probe ----------------------------------------------------------------------------------------------------


def probe_trials(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Of ``run_probe``, which saves its state after every step here."""
    from tests.test_probe_run import probe_config

    return _probe_trials(folder, count, seed, probe_config)


def halving_trials(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Of ``run_probe`` with criterion ``trial``: a probe, rounds of candidates, their states."""
    from tests.test_trial import trial_config

    return _probe_trials(folder, count, seed, trial_config)


def _probe_trials(folder: Path, count: int, seed: int, configured: Callable) -> tuple[int, int]:
    from hybrid_lora_plugin.allocation import AllocationError, load_allocation
    from hybrid_lora_plugin.probing import runner, stages
    from hybrid_lora_plugin.probing.trial import runner as trial_runner

    model = make_tiny_qwen2(folder / "model")
    rows = folder / "rows"
    rows.mkdir(parents=True)
    configured(model, rows)

    def work(place: Path) -> None:
        stages.SAVE_EVERY_SECONDS = trial_runner.SAVE_EVERY_SECONDS = 0.0
        config = configured(model, rows)
        config.output_dir = str(place / "out")
        try:
            runner.run_probe(config)
        except AllocationError as error:
            # The same command refuses to write over the result of one that was killed when all was done.
            if "holds an allocation already" not in str(error):
                raise

    def check(place: Path, wanted: Contents) -> None:
        if (place / "out").exists():
            load_allocation(place / "out")
            assert files(place / "out") == {name.removeprefix("out/"): wanted[name] for name in wanted}

    return trials(work, files, check, folder / "trials", count, seed)


# -- the export ---------------------------------------------------------------------------------------------------


def export_trials(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Of ``export_checkpoint``."""
    from hybrid_lora_plugin.training.export import export_checkpoint

    model = make_tiny_qwen2(folder / "model")
    checkpoint = make_checkpoint(model, folder)

    def work(place: Path) -> None:
        if not (place / "out").exists():
            export_checkpoint(checkpoint, place / "out")

    def check(place: Path, wanted: Contents) -> None:
        if (place / "out").exists():
            assert files(place / "out") == {name.removeprefix("out/"): wanted[name] for name in wanted}

    return trials(work, files, check, folder / "trials", count, seed)


def make_checkpoint(model: Path, folder: Path) -> Path:
    """What a run would have saved of a tiny model, with random factors."""
    from transformers import AutoModelForCausalLM

    from hybrid_lora_plugin import load_allocation
    from hybrid_lora_plugin.training.checkpoint import CheckpointDescription, save_trained

    allocation = load_allocation(make_allocation(model, folder / "allocation"))
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in weights.items():
        module = name.rpartition(".")[0]
        if module in allocation.full_names:
            tensors[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        elif module in allocation.lora_names and name.endswith(".weight"):
            rows, columns = tensor.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    description = CheckpointDescription(base_model=str(model), rank=4, alpha=8, global_step=1, rollout_dtype="bfloat16")
    text = (folder / "allocation" / "allocation.json").read_text()
    save_trained(folder / "global_step_1" / "actor", tensors, description, text)
    return folder / "global_step_1"


# -- a run --------------------------------------------------------------------------------------------------------


def run_trials(folder: Path, count: int, seed: int, save: str = "full", steps: int = 3) -> tuple[int, int]:
    """Of the engine under verl's own ``CheckpointHandler``: start, resume, steps, a sync and a save after each."""
    import verl  # noqa: F401  loads the plugin as in any verl process
    from verl.trainer import sft_trainer
    from verl.utils.checkpoint import checkpoint_handler
    from verl.utils.distributed import initialize_global_process_group

    from hybrid_lora_plugin.training.checkpoint import load_trained
    from tests.support.engine_worker import build_engine, make_batch, policy_loss, synced, train

    model = make_tiny_qwen2(folder / "model", tie_word_embeddings=False)
    allocation = make_allocation(model, folder / "allocation")
    rows = list(range(100))

    def work(place: Path) -> None:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
        initialize_global_process_group()
        hybrid = {"allocation": str(allocation), "full_lr": 1e-3, "save": save}
        engine = build_engine({"model": str(model), "hybrid": hybrid, "save_contents": ["model", "optimizer", "extra"]})
        loader = sft_trainer.StatefulDataLoader(rows, batch_size=2, num_workers=0)
        handler = checkpoint_handler.CheckpointHandler(
            engine, loader, default_local_dir=str(place / "checkpoints"), max_ckpt_to_keep=1
        )
        step, drawn = handler.load_checkpoint(), iter(loader)
        loss, batch = policy_loss("hybrid_gspo"), make_batch(2)
        while step < steps:
            step += 1
            seen = next(drawn).tolist()
            (measured,) = train(engine, batch, loss, 1, 1)
            (place / f"step_{step}.json").write_text(json.dumps({"rows": seen} | measured))
            handler.save_checkpoint(step)
            synced(engine)

    def trained(place: Path) -> Contents:
        checkpoints = place / "checkpoints"
        names = {path.name for path in checkpoints.iterdir() if not path.name.startswith("global_step_")}
        assert names == {"latest_checkpointed_iteration.txt"}, names
        # Optimizer, schedule and random states of verl's files have shown in the steps that follow.
        last = f"checkpoints/global_step_{steps}/hybrid_lora/"
        kept = ("step_", "checkpoints/latest", last)
        return {name: content for name, content in files(place).items() if name.startswith(kept)}

    def check(place: Path, wanted: Contents) -> None:
        tracker = place / "checkpoints" / "latest_checkpointed_iteration.txt"
        if not tracker.exists():
            return
        named = place / "checkpoints" / f"global_step_{tracker.read_text()}"
        load_trained(named)
        for file in named.glob("*.pt"):
            torch.load(file, weights_only=False)

    return trials(work, trained, check, folder / "trials", count, seed)


KINDS = {"probe": probe_trials, "halving": halving_trials, "export": export_trials, "run": run_trials}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--what", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for kind in given.what:
        kills, resumes = KINDS[kind](given.folder / kind, given.count, given.seed)
        print(f"kill_trials: {kind}: {kills} kills, {resumes} resumes, each equal to the uninterrupted one", flush=True)


if __name__ == "__main__":
    from recipes.demo.environment import CPU_ENVIRONMENT

    os.environ.update(CPU_ENVIRONMENT)
    main()
