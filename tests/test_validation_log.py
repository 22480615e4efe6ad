"""verl's own ``Tracking`` of a hybrid run keeps the record of the best checkpoint, whichever trainer has it."""

from __future__ import annotations

import inspect
import json

import pytest
from omegaconf import OmegaConf

pytest.importorskip("verl", reason="verl is not installed")

from verl.utils import tracking  # noqa: E402
from verl.utils.checkpoint import checkpoint_handler  # noqa: E402

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.training.best_checkpoint import FILE  # noqa: E402
from hybrid_lora_plugin.verl_backend.patches import record_validations  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from tests.test_best_checkpoint import pointer, save  # noqa: E402
from tests.test_probing_runs import probing  # noqa: E402, F401
from tests.test_verl_configuration import composed  # noqa: E402

pytestmark = pytest.mark.verl


@pytest.fixture
def tracking_of(tmp_path, monkeypatch):
    """verl's ``Tracking`` as a trainer of rollouts makes it, from the parts of its configuration that are read."""
    monkeypatch.setattr(tracking.Tracking, "__init__", inspect.unwrap(tracking.Tracking.__init__))
    record_validations()
    (tmp_path / "checkpoints").mkdir()

    def make(*more):
        config = OmegaConf.create(
            {
                "hybrid_lora": OmegaConf.structured(HybridLoraConfig),
                "trainer": {"default_local_dir": str(tmp_path / "checkpoints"), "save_freq": 5},
                "algorithm": {},
                "actor_rollout_ref": {"rollout": {}},
            }
        )
        config.merge_with_dotlist(list(more))
        return tracking.Tracking("p", "e", [], OmegaConf.to_container(config))

    return make


def test_a_tracking_of_verls_keeps_the_best_checkpoint(tracking_of, tmp_path, capsys):
    run, folder = tracking_of(), tmp_path / "checkpoints"
    for step, reward in ((0, 0.9), (5, 0.5), (10, 0.7), (15, 0.6)):
        if step:
            save(folder, step)
        run.log(data={"actor/lr": 1.0, "val-core/sums/acc/mean@1": reward}, step=step)
        run.log(data={"actor/lr": 1.0}, step=step + 1)
    assert pointer(folder)["checkpoint"] == "global_step_10"
    said = [line for line in capsys.readouterr().out.splitlines() if "best checkpoint" in line]
    assert said == [
        "hybrid_lora: best checkpoint: global_step_5, val-core/sums/acc/mean@1 0.5",
        "hybrid_lora: best checkpoint: global_step_10, val-core/sums/acc/mean@1 0.7",
    ]


@pytest.mark.parametrize(
    "more", [["hybrid_lora.best.keep=false"], ["trainer.save_freq=-1"], ["hybrid_lora.phase=probe"]]
)
def test_a_run_that_keeps_none_has_no_logger_more(tracking_of, tmp_path, more):
    run = tracking_of(*more)
    run.log(data={"val-core/sums/acc/mean@1": 1.0}, step=5)
    assert run.logger == {} and not (tmp_path / "checkpoints" / FILE).exists()


def test_a_plain_run_of_verls_is_left_alone(tracking_of):
    assert tracking.Tracking("p", "e", [], {"trainer": {}}).logger == tracking.Tracking("p", "e", []).logger == {}


def test_a_resumed_run_goes_by_the_step_that_verl_resumes(tracking_of, tmp_path):
    folder = tmp_path / "checkpoints"
    run = tracking_of("trainer.resume_mode=disable")
    for step in (5, 10):
        save(folder, step)
        run.log(data={"val-core/sums/acc/mean@1": step / 10}, step=step)
    # Killed before the step was validated; verl validates it when it starts again.
    save(folder, 15)
    (folder / "latest_checkpointed_iteration.txt").write_text("15")
    again = tracking_of()
    again.log(data={"val-core/sums/acc/mean@1": 2.0}, step=15)
    assert json.loads((folder / FILE).read_text())["validations"] == [[5, 0.5], [10, 1.0], [15, 2.0]]
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    tracking_of()
    assert pointer(folder)["step"] == 5


@pytest.mark.parametrize(
    ("frequencies", "words"),
    [
        (("5", "10"), ""),
        (("10", "5"), "only every 10th is both"),
        (("6", "4"), "only every 12th is both"),
        (("5", "-1"), ""),
        (("5", "-1", "hybrid_lora.best.metric=mine"), "trainer.test_freq=-1 validates no step"),
    ],
)
def test_which_steps_can_be_the_best_is_said_before_the_run(frequencies, words, probing, capsys):  # noqa: F811
    saved, tested, *more = frequencies
    check_configuration(composed(*probing, f"trainer.save_freq={saved}", f"trainer.test_freq={tested}", *more))
    said = [line for line in capsys.readouterr().out.splitlines() if "best checkpoint" in line]
    assert len(said) == bool(words) and all(words in line for line in said)


def test_verl_still_writes_its_tracker_last():
    from verl.trainer.ppo import ray_trainer
    from verl.trainer.ppo.v1 import trainer_base
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

    for save_checkpoint in (
        trainer_base.PPOTrainer._save_checkpoint,
        ray_trainer.RayPPOTrainer._save_checkpoint,
        checkpoint_handler.CheckpointHandler.save_checkpoint,
    ):
        source = inspect.getsource(save_checkpoint)
        assert source.index(".save_checkpoint(") < source.index("torch.save(") < source.index("racker_file" if
            "tracker_file" in source else "local_latest_checkpointed_iteration, ")  # fmt: skip
    for method in (BaseCheckpointManager.register_checkpoint, BaseCheckpointManager.ensure_checkpoint_capacity):
        assert "if not (max_ckpt_to_keep and isinstance(max_ckpt_to_keep, int)" in inspect.getsource(method)
