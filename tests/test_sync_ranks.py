"""Several trainer ranks in one sync: whatever fails on one, all end, soon, and say why."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from tests.support.processes import free_port  # noqa: E402
from tests.support.sync_ranks_worker import LIMIT, LIMITS  # noqa: E402
from tests.support.verl_processes import ranks  # noqa: E402

pytestmark = pytest.mark.verl


SCENARIOS = (
    "healthy",
    "first proof is slow",
    "receiver fails early",
    "engine dies at once",
    "trainer fails on one rank",
)


@pytest.fixture(scope="module")
def outcomes():
    """What each of two ranks raised, and when, by scenario; all of them by one pair of processes."""
    # Short: a socket's path has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="hl-"))
    try:
        arguments = {}
        for number, scenario in enumerate(SCENARIOS):
            (folder / str(number)).mkdir()
            arguments[scenario] = [str(folder / str(number)), f"tcp://127.0.0.1:{free_port()}"]
        (folder / "arguments.json").write_text(json.dumps(arguments))
        ranks(2, ["tests/support/sync_ranks_worker.py", str(folder / "arguments.json")])
        return {
            scenario: [json.loads((Path(out) / f"rank{rank}.json").read_text()) for rank in range(2)]
            for scenario, (out, _) in arguments.items()
        }
    finally:
        shutil.rmtree(folder)


def test_healthy_sync_is_ended_once_by_the_rank_with_the_server(outcomes):
    ranks = outcomes["healthy"]
    assert [rank["raised"] for rank in ranks] == ["", ""]
    assert [rank["ended"] for rank in ranks] == [[3], []]


def test_first_sync_may_take_longer_to_prove_than_any_bucket(outcomes):
    """The other rank has sent everything, and waits for the first one's word as long."""
    ranks = outcomes["first proof is slow"]
    assert [rank["raised"] for rank in ranks] == ["", ""] and ranks[0]["ended"] == [3]
    assert min(rank["seconds"] for rank in ranks) > LIMITS["first proof is slow"]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("receiver fails early", "weight2: does not fit"),
        ("engine dies at once", "the rollout engine failed: EngineDeadError"),
    ],
)
def test_all_ranks_end_long_before_the_limit_and_name_the_cause(scenario, words, outcomes):
    """The other rank stands in a collective of the stream, or waits for a receiver that never comes."""
    ranks = outcomes[scenario]
    for rank in ranks:
        assert "weight sync 4 of step 3 failed" in rank["raised"] and words in rank["raised"], ranks
        assert rank["ended"] == []
    assert max(rank["seconds"] for rank in ranks) < LIMIT, ranks


def test_error_of_the_trainer_on_one_rank_is_not_lost_while_the_others_wait_for_it(outcomes):
    """The others stand in a collective that this rank never joins: it gives up alone, and says why."""
    first, second = outcomes["trainer fails on one rank"]
    assert "weight sync 4 of step 3 failed: MemoryError: no memory for weight5" in second["raised"]
    assert first["raised"] and first["ended"] == []
