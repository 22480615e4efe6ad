"""Checkpoints appear whole and give way in order, whenever a process is killed and whatever its disk does."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal

import pytest
import torch

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.files import bring_back, complete_folder, remove_folder
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.training.best_checkpoint import BestCheckpoint
from hybrid_lora_plugin.training.checkpoint import CheckpointDescription, load_trained, save_trained
from tests.support.kills import killed_at

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin.verl_backend.checkpoint_retention import TRACKER, Retention  # noqa: E402
from hybrid_lora_plugin.verl_backend.checkpoint_writing import tidy, unwritable_explained, written_whole  # noqa: E402

pytestmark = pytest.mark.verl

ALONE = Ranks(torch.device("cpu"))


def write(folder, value):
    """What a rank writes of a checkpoint, each part holding ``value``."""
    with written_whole(folder, ALONE) as unfinished:
        torch.save(torch.full((1000,), value), unfinished / "model_world_size_1_rank_0.pt")
        with unwritable_explained(folder):
            description = CheckpointDescription("base", 4, 8, value)
            save_trained(unfinished, {"w": torch.full((9000,), float(value))}, description, "{}")


def value_of(folder):
    """The one value that all parts hold."""
    tensors, description, _ = load_trained(folder)
    shard = torch.load(folder / "model_world_size_1_rank_0.pt")
    values = {int(shard.unique()), description.global_step, int(tensors["w"].unique())}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize("before", [False, True], ids=["new", "over an older one"])
def test_killed_at_any_call_of_the_file_system_it_is_the_older_or_the_new_one(tmp_path, before):
    for event in itertools.count():
        folder = tmp_path / str(event) / "global_step_1" / "actor"
        if before:
            write(folder, 1)
        killed = killed_at(event, lambda folder=folder: write(folder, 2))
        bring_back(folder)
        assert value_of(folder) in {1, 2} if before or folder.exists() else killed
        write(folder, 3)
        assert value_of(folder) == 3 and [path.name for path in folder.parent.iterdir()] == ["actor"]
        if not killed:
            break
    assert event >= 8


def test_a_folder_that_replaces_another_is_killed_at_any_call(tmp_path):
    def replace(folder, text):
        with complete_folder(folder, replace=True) as unfinished:
            (unfinished / "a").write_text(text)
            (unfinished / "b").write_text(text)

    for event in itertools.count():
        folder = tmp_path / str(event)
        replace(folder, "older")
        killed = killed_at(event, lambda folder=folder: replace(folder, "newer"))
        bring_back(folder)
        assert len({file.read_text() for file in folder.iterdir()}) == 1 and len(list(folder.iterdir())) == 2
        if not killed:
            break
    assert event >= 6


@pytest.mark.parametrize("actor", ["", "actor"], ids=["sft", "reinforcement learning"])
def test_a_removal_that_was_killed_is_ended_when_a_run_goes_on_and_nothing_of_another_run_is(tmp_path, actor):
    for event in itertools.count():
        place = tmp_path / str(event)
        older, newer = (place / f"global_step_{step}" / actor for step in (1, 2))
        write(older, 1), write(newer, 2)
        # Another run that resumes from here looks at the folder while this one writes.
        alive = newer.parent / f".{newer.name}.0123.writing"
        alive.mkdir()
        killed = killed_at(event, lambda older=older: remove_folder(older))
        tidy(newer)
        assert [path.name for path in place.rglob(".*")] == [alive.name]
        assert value_of(older) == 1 if older.exists() else event > 0
        assert value_of(newer) == 2
        if not killed:
            break
    assert event >= 5


# -- which give way -----------------------------------------------------------------------------------------------


def save(retention, checkpoints, step, limit, values=None, actor="actor"):
    """A save as verl's trainers make it, and the validation of the step behind it."""
    folder = checkpoints / f"global_step_{step}" / actor
    retention.make_room(limit)
    write(folder, step)
    retention.add(folder)
    (checkpoints / TRACKER).write_text(str(step))
    retention.settle()
    if values:
        best = BestCheckpoint(checkpoints, None, None, step)
        best.record(step, {"val-core/a/acc/mean@1": values[step]})
        best.choose()


def steps(checkpoints):
    return sorted(int(path.parent.name.split("_")[-1]) for path in checkpoints.glob("global_step_*/actor"))


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_newest_stay_and_the_best(tmp_path, limit):
    values = {5: 0.1, 10: 0.9, 15: 0.2, 20: 0.8, 25: 0.3, 30: 0.4}
    retention, kept = Retention(ALONE, True), []
    for step in values:
        save(retention, tmp_path, step, limit, values)
        kept.append(steps(tmp_path))
        assert value_of(tmp_path / f"global_step_{step}" / "actor") == step
    assert kept[-1] == [10, 20, 25, 30][-limit:] if limit == 4 else [10, *[20, 25, 30][3 - limit :]]
    assert kept[0] == [5]


def test_without_a_best_the_newest_stay(tmp_path):
    retention = Retention(ALONE, False)
    for step in (5, 10, 15, 20):
        save(retention, tmp_path, step, 1, {5: 9.0, 10: 1.0, 15: 1.0, 20: 1.0})
    assert steps(tmp_path) == [20]


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_without_a_limit_all_stay(tmp_path, limit):
    retention = Retention(ALONE, True)
    for step in (5, 10, 15):
        save(retention, tmp_path, step, limit)
    assert steps(tmp_path) == [5, 10, 15]


def test_killed_at_any_call_while_it_saves_with_a_limit_of_one_the_tracker_names_a_whole_checkpoint(tmp_path):
    for event in itertools.count():
        folder = tmp_path / str(event)
        retention = Retention(ALONE, True)
        save(retention, folder, 5, 1)
        killed = killed_at(event, lambda folder=folder, retention=retention: save(retention, folder, 10, 1))
        named = (folder / TRACKER).read_text()
        # verl opens its tracker before it writes: left empty, what is whole is found by the next start.
        assert named in ("5", "10", "")
        for step in {"5", "10"} & {named or str(max(steps(folder)))}:
            assert value_of(folder / f"global_step_{step}" / "actor") == int(step)
        if not killed:
            break
    assert event >= 12 and steps(folder) == [10]


# -- disks --------------------------------------------------------------------------------------------------------


def in_a_fork(work):
    """What ``work`` returns as text, from a fork whose limits end with it."""
    read, written = os.pipe()
    if os.fork() == 0:
        try:
            os.write(written, str(work()).encode())
        finally:
            os._exit(0)
    os.close(written)
    with os.fdopen(read) as answer:
        said = answer.read()
    os.wait()
    return said


@pytest.mark.parametrize("bytes_left", [0, 1000, 8000, 20_000])
def test_a_disk_without_room_ends_in_one_line_and_leaves_the_earlier_one(tmp_path, bytes_left):
    """A limit on the size of files does what a full disk does: part of a file is written, then no more."""
    folder = tmp_path / "global_step_1" / "actor"
    write(folder, 1)

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))
        try:
            write(folder, 2)
        except ConfigurationError as error:
            return error
        return "written"

    said = in_a_fork(full)
    words = ["checkpoint: ", "/global_step_1/actor' cannot be written on", "GB free", "trainer.default_local_dir"]
    assert "\n" not in said and all(word in said for word in [*words, "#checkpoint-cannot-be-written"]), said
    assert value_of(folder) == 1 and [path.name for path in folder.parent.iterdir()] == ["actor"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_takes_nothing_is_said_in_one_line(tmp_path, number, monkeypatch):
    folder = tmp_path / "global_step_1" / "actor"
    write(folder, 1)

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ConfigurationError, match=f"cannot be written on .*{os.strerror(number)}"):
        write(folder, 2)
    monkeypatch.undo()
    assert value_of(folder) == 1


def test_an_error_of_another_kind_keeps_its_name():
    with pytest.raises(RuntimeError, match="^shapes"), unwritable_explained("folder"):
        raise RuntimeError("shapes differ")
