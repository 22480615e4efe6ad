"""Ranks without a shared disk: what they need they find on their own, and what one lacks ends all of them at once.

What they saved is also what a run finds that would resume, before Ray starts.
"""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin import load_allocation  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.training.checkpoint import CheckpointDescription, save_trained  # noqa: E402
from hybrid_lora_plugin.verl_backend.checkpoint_files import require_shards, require_writable  # noqa: E402
from hybrid_lora_plugin.verl_backend.earlier_checkpoint import TRACKER, require_whole, settle_tracker  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402
from tests.test_verl_configuration import composed  # noqa: E402

pytestmark = pytest.mark.verl


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disks")
    model = make_tiny_qwen2(folder / "model")
    return folder, model, make_allocation(model, folder / "allocation")


@pytest.fixture(scope="module")
def results(setting):
    """All cases on two ranks, by one start of them."""
    folder, model, allocation = setting
    worker = "tests/support/own_disks_worker.py"
    return run_engine(folder / "run", 2, worker=worker, model=model, allocation=allocation)


def test_an_allocation_that_rank_0_alone_can_read_is_every_ranks(results, setting):
    assert results["allocations"] == 2 * [list(load_allocation(setting[2]).full_names)]


def test_a_checkpoint_on_disks_of_their_own_resumes_bit_for_bit(results):
    first, second = results["files"]
    assert "hybrid_lora" in first and "hybrid_lora" not in second
    assert results["resumed"] is True
    assert results["left of it"] == 2 * [[True, []]], "the earlier checkpoint, and nothing unfinished"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("allocation of rank 1", ["AllocationError", "on_rank_1", "#allocation-cannot-be-read"]),
        ("blocked on rank 1", ["trainer.default_local_dir: 'blocked'", "#checkpoint-place-not-usable"]),
        ("model missing on rank 1", ["model_world_size_2_rank_1.pt", "rank 1 of 2", "#checkpoint-place-not-usable"]),
        ("optim missing on rank 1", ["optim_world_size_2_rank_1.pt", "rank 1 of 2", "#checkpoint-place-not-usable"]),
        ("another alpha", ["hybrid_lora.lora.alpha=8", "#checkpoint-of-another-setting"]),
        ("damaged on rank 0", ["hybrid_lora' cannot be read", "#checkpoint-cannot-be-read"]),
        ("without weights", ["load_contents: ['optimizer', 'extra'] leaves out", "#resume-without-weights"]),
        ("without our folder", ["holds no hybrid_lora", "#checkpoint-of-a-run-without-hybrid-lora"]),
        ("full fine-tuning", ["a run without +hybrid_lora", "#checkpoint-of-a-run-without-hybrid-lora"]),
        ("lora fine-tuning", ["a run of plain LoRA", "trainer.default_local_dir=NEW", "trainer.resume_mode=disable"]),
        ("another base on rank 1", ["model.layers.1.", "#checkpoint-of-another-base-model"]),
        ("rank 0 cannot save", ["'taken/actor' cannot be written on", "#checkpoint-cannot-be-written"]),
        ("rank 0 cannot save a plain model", ["on rank 0: OSError: no space left"]),
    ],
)
def test_what_fails_on_one_rank_ends_all_with_the_same_line(results, case, words):
    first, second = results[case]
    assert first == second and "\n" not in first and all(word in first for word in words), first


def test_a_folder_for_checkpoints_is_made_and_left_empty(tmp_path):
    require_writable(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="trainer.default_local_dir: '.*file' cannot be written on"):
        require_writable(str(tmp_path / "file"))


# -- before Ray ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resuming(results, setting):
    """Overrides of a run that finds what verl's own engines and ours saved on two ranks, as rank 0's node sees it."""
    disk = results["folder"] / "disk0"
    for kind, step in (("checkpoints", 1), ("full", 7), ("lora", 7)):
        (disk / kind / TRACKER).write_text(str(step))

    def overrides(folder, *more: str) -> list[str]:
        return [
            "+hybrid_lora=enabled",
            f"actor_rollout_ref.model.path={setting[1]}",
            "actor_rollout_ref.rollout.name=vllm",
            "hybrid_lora.lora.rank=4",
            "hybrid_lora.lora.alpha=8",
            "trainer.n_gpus_per_node=2",
            f"trainer.default_local_dir={folder}",
            *more,
        ]

    return disk, overrides


def test_a_checkpoint_of_the_same_setting_is_accepted_before_ray(resuming, setting):
    disk, overrides = resuming
    check_configuration(composed(*overrides(disk / "checkpoints", f"hybrid_lora.allocation={setting[2]}")))
    resumed = check_configuration(composed(*overrides(disk / "checkpoints")))
    assert resumed.allocation == str(disk / "checkpoints/global_step_1/actor/hybrid_lora/allocation.json")


def test_a_machine_with_another_ranks_disk_leaves_it_to_the_workers(results, resuming, setting):
    """It holds a shard and cannot know what kind of run saved it."""
    _, overrides = resuming
    other = results["folder"] / "disk1" / "full"
    (other / TRACKER).write_text("7")
    check_configuration(composed(*overrides(other, f"hybrid_lora.allocation={setting[2]}")))


FOREIGN = "#checkpoint-of-a-run-without-hybrid-lora"


@pytest.mark.parametrize("given", [True, False], ids=["allocation given", "no allocation"])
@pytest.mark.parametrize("how", ["auto", "resume_path"])
@pytest.mark.parametrize(("kind", "words"), [("full", "without +hybrid_lora=enabled"), ("lora", "of plain LoRA")])
def test_a_checkpoint_of_a_run_without_hybrid_lora_is_refused_before_ray(kind, words, how, given, resuming, setting):
    disk, overrides = resuming
    more = [f"hybrid_lora.allocation={setting[2]}"] if given else []
    folder = disk / kind
    if how == "resume_path":
        more += ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder / 'global_step_7'}"]
        folder = disk / "new"
    with pytest.raises(ConfigurationError) as caught:
        check_configuration(composed(*overrides(folder, *more)))
    message = str(caught.value)
    ways_out = ["trainer.default_local_dir=NEW", "trainer.resume_mode=disable"]
    wanted = [str(disk / kind / "global_step_7" / "actor"), f"a run {words} saved it", *ways_out, FOREIGN]
    assert "\n" not in message and all(word in message for word in wanted), message


REFUSED = {
    "alpha": (["hybrid_lora.lora.alpha=16"], ["alpha 16", "lora.alpha=8", "#checkpoint-of-another-setting"]),
    "rank": (["hybrid_lora.lora.rank=8"], ["rank 8", "lora.rank=4", "#checkpoint-of-another-setting"]),
    "ranks": (
        ["trainer.n_gpus_per_node=4", "trainer.nnodes=2"],
        ["makes 8 ranks", "the shards of 2", "#checkpoint-of-another-number-of-ranks"],
    ),
    "hf_model alone": (
        ["actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]"],
        ["load_contents: ['hf_model']", "add model", "#resume-without-weights"],
    ),
    "no mode": (["trainer.resume_mode=Auto"], ["trainer.resume_mode: 'Auto'", "disable", "#resume-setting-not-usable"]),
    "no path": (
        ["trainer.resume_mode=resume_path"],
        ["trainer.resume_from_path: None", "global_step_N", "#resume-setting-not-usable"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_workers_would_refuse_to_resume_is_refused_before_ray(case, resuming, setting):
    disk, overrides = resuming
    mistake, words = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        check_configuration(
            composed(*overrides(disk / "checkpoints", f"hybrid_lora.allocation={setting[2]}", *mistake))
        )
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_checkpoint_of_another_allocation_is_refused_before_ray(resuming, setting, tmp_path):
    disk, overrides = resuming
    other = make_allocation(setting[1], tmp_path / "other", seed=5)
    with pytest.raises(ConfigurationError, match="assigns modules differently.*#checkpoint-of-another-setting"):
        check_configuration(composed(*overrides(disk / "checkpoints", f"hybrid_lora.allocation={other}")))


def test_a_tracker_that_names_no_step_is_refused_and_one_of_a_removed_step_starts_afresh(resuming, setting, tmp_path):
    _, overrides = resuming
    (tmp_path / TRACKER).write_text("soon")
    config = composed(*overrides(tmp_path, f"hybrid_lora.allocation={setting[2]}"))
    with pytest.raises(ConfigurationError, match="latest_checkpointed_iteration.txt' says 'soon'"):
        check_configuration(config)
    (tmp_path / TRACKER).write_text("12")
    check_configuration(composed(*overrides(tmp_path, f"hybrid_lora.allocation={setting[2]}")))


def test_starting_afresh_among_older_checkpoints_is_said(resuming, setting, capsys):
    disk, overrides = resuming
    afresh = [f"hybrid_lora.allocation={setting[2]}", "trainer.resume_mode=disable"]
    for more in ([], ["trainer.save_freq=5"]):
        check_configuration(composed(*overrides(disk / "full", *afresh, *more)))
        lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
        assert len(lines) == bool(more), "a run that saves nothing mixes nothing"
    words = ["global_step_7 is the last", TRACKER, "trainer.default_local_dir=NEW", "#checkpoints-of-two-runs"]
    assert all(word in lines[0] for word in words), lines


def test_main_ppo_ends_with_the_refusal_and_starts_nothing(resuming, setting, main_ppo, tmp_path):
    disk, overrides = resuming
    more = [f"hybrid_lora.allocation={setting[2]}", f"hydra.run.dir={tmp_path / 'run'}"]
    done = main_ppo(*overrides(disk / "full", *more))
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("hybrid_lora: checkpoint: ") and FOREIGN in last
    assert "Traceback" not in done.stdout and not (tmp_path / "run").exists()


# -- verl's tracker -------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path):
    """Checkpoints of steps 5 and 10 that are whole, 15 that its trainer did not end, 20 with an actor half put away."""

    def save(step):
        folder = tmp_path / f"global_step_{step}"
        save_trained(folder / "actor", {"w": torch.ones(3)}, CheckpointDescription("base", 4, 8, step), "{}")
        torch.save({"step": step}, folder / "data.pt")
        return folder

    save(5), save(10)
    cut = save(15) / "data.pt"
    cut.write_bytes(cut.read_bytes()[:-30])
    (save(20) / "actor").rename(tmp_path / "global_step_20" / ".actor.older")
    (tmp_path / "global_step_25").mkdir()
    return tmp_path


def settled(folder, tracker, *more):
    (folder / TRACKER).write_text(tracker)
    config = OmegaConf.create({"trainer": {"default_local_dir": str(folder), "resume_mode": "auto"}})
    config.merge_with_dotlist(list(more))
    return settle_tracker(config), (folder / TRACKER).read_text() if (folder / TRACKER).exists() else None


@pytest.mark.parametrize(
    ("tracker", "then", "words"),
    [
        ("10", "10", ""),
        ("5", "5", ""),
        ("", "10", "was left empty; going on from global_step_10"),
        ("15", "10", "named step 15, which is not whole there; going on from global_step_10"),
        ("25", "10", "named step 25"),
        ("30", "10", "named step 30"),
        ("20", "20", ""),
        ("soon", "soon", ""),
    ],
)
def test_verl_finds_the_last_whole_checkpoint_whatever_its_tracker_says(interrupted, tracker, then, words):
    line, now = settled(interrupted, tracker)
    assert now == then and (words in line if words else line is None)
    assert (interrupted / "global_step_20" / "actor").is_dir() == (tracker == "20"), "what stood aside is back"


def test_an_empty_tracker_without_checkpoints_starts_afresh_and_says_so(tmp_path):
    line, now = settled(tmp_path, "")
    assert "starts afresh" in line and now is None
    assert settled(tmp_path, "", "trainer.resume_mode=disable") == (None, "")


def test_a_step_whose_save_did_not_end_is_refused_by_path(interrupted):
    with pytest.raises(ConfigurationError, match=r"global_step_15/data.pt' cannot be read \(it is cut\)"):
        require_whole(interrupted / "global_step_15")


def test_a_shard_that_is_cut_is_refused_by_name(tmp_path):
    file = tmp_path / "model_world_size_1_rank_0.pt"
    torch.save(torch.ones(1000), file)
    require_shards(str(tmp_path), ["model"], 0, 1)
    for size in (file.stat().st_size - 1, 100, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ConfigurationError, match="model_world_size_1_rank_0.pt' cannot be read .*it is cut"):
            require_shards(str(tmp_path), ["model"], 0, 1)
