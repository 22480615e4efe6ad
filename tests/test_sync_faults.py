"""Weight syncs with a real rollout engine: what a healthy one brings, and that each fault is caught and named."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from tests.support import rollout_harness as processes  # noqa: E402
from tests.support import sleeping_engine  # noqa: E402
from tests.support.faults import KINDS, MODES, combinations, draw_fault, draw_faults  # noqa: E402
from tests.support.rollout_harness import RolloutHarness, SyncHangs, SyncRefused, start_side_by_side, stop_ray  # noqa: E402
from tests.support.sync_faults import (  # noqa: E402
    ENGINES,
    PROMPT,
    Outcome,
    digests,
    inject,
    kill,
    main,
    make_inputs,
    report,
)

pytestmark = [pytest.mark.verl, pytest.mark.ray]

PLAIN = ("merge", "receiver_merge")
#: with two trainer ranks: one rank's stream is damaged, and both have to stop
ON_TWO_RANKS = (
    "ranks differ",
    "tensor dropped",
    "tensors reordered",
    "bit flipped",
    "stale sync",
    "wrong shape",
    "header dropped",
    "tensor never sent",
    "shard sent",
    "adapter of another rank",
    "engine lost a weight",
)
WITHOUT_DIGESTS = (
    "tensor dropped",
    "tensors reordered",
    "wrong shape",
    "wrong dtype",
    "shard sent",
    "stale sync",
    "header damaged",
    "tensor never sent",
    "unknown name sent",
    "engine lost a weight",
)


@dataclass
class Engines:
    #: a plain engine with one worker, for merge and receiver_merge
    plain: RolloutHarness
    #: one that runs adapters, with two tensor-parallel workers
    adapter: RolloutHarness
    #: one in 16 bits, with two tensor-parallel workers, for sparse_merge and where both ends of a sync merge
    sixteen: RolloutHarness
    #: of model and allocation, from the beginning
    files: dict[str, str]

    def of(self, mode: str) -> RolloutHarness:
        return {"adapter": self.adapter, "sparse_merge": self.sixteen}.get(mode, self.plain)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    model, allocation = make_inputs(tmp_path_factory.mktemp("inputs"))
    plain = RolloutHarness(model, allocation, "receiver_merge", number=0, timeout=30)
    # Started for logprobs, they look at the base model before anything else.
    adapter = RolloutHarness(
        model, allocation, "adapter", number=1, tensor_parallel=2, timeout=30, sync_check="logprobs"
    )
    sixteen = RolloutHarness(
        model, allocation, "sparse_merge", number=2, tensor_parallel=2, timeout=30, sync_check="logprobs",
        **ENGINES["sparse_merge"],
    )  # fmt: skip
    try:
        start_side_by_side(plain, adapter, sixteen)
        adapter.begin_run("digest"), sixteen.begin_run("digest")
        yield Engines(plain, adapter, sixteen, digests(model, allocation))
        plain.close(), adapter.close(), sixteen.close()
    finally:
        stop_ray()


# -- healthy syncs; the first test has to be the first ----------------------------------------------------------------


def test_nothing_is_generated_before_the_first_sync(engines):
    for mode in ("receiver_merge", "adapter", "sparse_merge"):
        assert "no weights have been synced yet" in engines.of(mode).refusal()


@pytest.mark.parametrize("mode", MODES)
def test_rollout_agrees_with_the_trainer_after_every_update(engines, mode):
    replica = engines.of(mode)
    for step in range(4):
        replica.update(step)
        measured = replica.sync(mode)
        assert replica.difference(PROMPT) < (1e-4 if mode != "sparse_merge" else replica.agrees)
        assert measured["sync_digest_ok"] == 1 and measured["sync_seconds"] > 0
    assert replica.sync(mode)["sync_tensors_changed"] == 0, "nothing was trained"


def test_metrics_count_what_was_sent_and_what_changed(engines):
    replica, second = engines.plain, {}
    for mode in PLAIN:
        replica.begin_run("digest")
        first = replica.sync(mode)
        assert first["sync_tensors_changed"] == first["sync_tensors"], "all of them in the first sync of a run"
        replica.update(0)
        second[mode] = replica.sync(mode)
    # All of a partial sync was trained; a merged one carries norms, embedding and frozen biases too.
    assert second["receiver_merge"]["sync_tensors_changed"] == second["receiver_merge"]["sync_tensors"]
    assert 0 < second["merge"]["sync_tensors_changed"] < second["merge"]["sync_tensors"]
    assert second["receiver_merge"]["sync_bytes"] < second["merge"]["sync_bytes"] / 2


@pytest.mark.parametrize("engine", ["plain", "sixteen"])
def test_merge_and_receiver_merge_leave_the_same_bits_in_vllm(engines, engine):
    """Where two workers hold a model between them, each merges its own part."""
    replica = getattr(engines, engine)
    for step in range(3):
        replica.update(step)
        replica.sync("merge")
        merged = replica.in_engine(processes.parameter_digests)
        replica.update(100 + step)
        replica.sync("receiver_merge")
        assert replica.in_engine(processes.parameter_digests) != merged
        replica.sync("merge")
        merged = replica.in_engine(processes.parameter_digests)
        replica.sync("receiver_merge")
        assert replica.in_engine(processes.parameter_digests) == merged


def test_sparse_merge_leaves_the_bits_of_merge_in_both_workers_and_sends_a_fraction(engines):
    replica = engines.sixteen
    replica.begin_run("digest")
    whole = replica.sync("sparse_merge")
    assert whole["sync_elements_changed"] == 1 and whole["sync_tensors_changed"] == whole["sync_tensors"]
    for step in range(3):
        replica.update(step)
        sparse = replica.sync("sparse_merge")
        assert 0 < sparse["sync_elements_changed"] < 0.1 and sparse["sync_bytes"] < 0.25 * whole["sync_bytes"]
        assert 0 < sparse["sync_tensors_changed"] == sparse["sync_tensors"] < whole["sync_tensors"]
    held = replica.in_engine(processes.parameter_digests)
    replica.sync("merge")
    assert replica.in_engine(processes.parameter_digests) == held


def test_a_sync_that_was_lost_is_not_papered_over_by_the_next(engines):
    replica = engines.sixteen
    replica.sync("sparse_merge")
    replica.update(0)
    replica.on_trainers("lose_sync")
    replica.update(1)
    with pytest.raises(SyncRefused, match="has only what changed since sync .* the last one proven here is sync"):
        replica.sync("sparse_merge")
    assert "has not been completed" in replica.refusal()
    replica.on_trainers("send_all")
    replica.sync("sparse_merge")
    assert not replica.refusal()


@pytest.mark.parametrize("mode", ["sparse_merge", "adapter", "receiver_merge"])
def test_weights_that_no_sync_sends_stay(engines, mode):
    replica = engines.of(mode)
    replica.sync(mode)
    unsent = replica.on_trainers("unsent", mode)[0]
    assert any(name.endswith("norm.weight") for name in unsent) and any(name.endswith(".bias") for name in unsent)
    before = replica.in_engine(processes.weight_digests, unsent)
    for step in range(2):
        replica.update(step)
        replica.sync(mode)
    assert replica.in_engine(processes.weight_digests, unsent) == before


# -- sleep; by verl's own calls in its order --------------------------------------------------------------------------


@pytest.fixture
def beside(engines, request):
    """The engine of a mode as one that shares its device with the trainer, and begins another run."""
    mode = request.getfixturevalue("mode")
    replica = engines.of(mode)
    replica.begin_run("digest")
    replica.place(colocated=True, mode=mode)
    yield replica
    replica.set_sleep_level(None)
    replica.place(colocated=False)
    # Whatever a test has chosen, or where it has failed.
    replica.begin_run("digest")


def agreed(replica, mode: str) -> float:
    return 1e-4 if mode != "sparse_merge" else replica.agrees


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("mode", MODES)
def test_after_every_sleep_a_sync_leaves_the_right_weights(beside, mode, level):
    """``None``: the plugin's own level. Nothing but that sync brings back what a level discards."""
    beside.set_sleep_level(level)
    beside.sleep()  # verl does while it loads a checkpoint
    for step in range(3):
        beside.update(step)
        measured = beside.sync_asleep(mode)
        assert measured["sync_digest_ok"] == 1 and beside.difference(PROMPT) < agreed(beside, mode)
        held = beside.in_engine(processes.parameter_digests)
        beside.sleep()
        assert beside.in_engine(processes.parameter_digests) != held, "the memory is gone meanwhile"
    discards = mode == "merge" and level is None
    assert set(beside.in_engine(sleeping_engine.offloaded)) == {() if discards else ("weights",)}
    if not discards:
        beside.wake_up("kv_cache", "weights")
        assert beside.in_engine(processes.parameter_digests) == held and not beside.refusal()
    else:
        beside.wake_up("kv_cache", "weights")
        assert "its weights were discarded by a sleep" in beside.refusal()
        beside.sync(mode)
    if mode in ("sparse_merge", "receiver_merge"):
        beside.sync("merge")
        assert beside.in_engine(processes.parameter_digests) == held


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_apart_that_frees_its_cache_for_a_sync_has_the_right_weights(engines, mode):
    replica = engines.of(mode)
    replica.begin_run("digest")
    replica.place(colocated=False, mode=mode)
    for step in range(2):
        replica.update(step)
        assert replica.sync_apart(mode)["sync_digest_ok"] == 1
        assert replica.difference(PROMPT) < agreed(replica, mode)
    replica.place(colocated=False)
    assert set(replica.in_engine(sleeping_engine.offloaded)) == {() if mode == "merge" else ("weights",)}


@pytest.mark.parametrize("sync_check", ["digest", "off"])
@pytest.mark.parametrize("mode", ["sparse_merge", "adapter", "receiver_merge"])
def test_a_sleep_that_discards_weights_is_noticed_where_no_sync_brings_them_back(beside, mode, sync_check):
    """A level that the plugin would not take, as by a call of the user's own."""
    beside.begin_run(sync_check)
    whole = beside.sync(mode)
    unsent = beside.on_trainers("unsent", mode)[0]
    beside.set_sleep_level(2)
    beside.sleep()
    beside.update(0)
    with pytest.raises(
        SyncRefused, match="changed in the rollout engine without being sent; a sleep that d"
    ) as refused:
        beside.sync_asleep(mode)
    assert any(f"{name}: " in str(refused.value) for name in unsent)
    beside.wake_up("kv_cache")
    assert "has not been completed" in beside.refusal()
    if mode == "sparse_merge":
        # As the first sync of the run that goes on from a checkpoint: all of it.
        beside.on_trainers("send_all")
        # Its account is a little shorter: fewer elements differ from what was sent before.
        assert beside.sync(mode)["sync_bytes"] == pytest.approx(whole["sync_bytes"], rel=1e-3)
    else:
        beside.begin_run(sync_check)
        with pytest.raises(SyncRefused, match="the rollout engine holds other values than its checkpoint"):
            beside.sync(mode)
        beside.in_engine(sleeping_engine.bring_back)
        beside.sync(mode)
    assert beside.difference(PROMPT) < agreed(beside, mode)


# -- faults -----------------------------------------------------------------------------------------------------------


def named(fault) -> str:
    return f"{fault.mode}-{fault.kind}-{fault.where}-{fault.seed}"


def check(outcome) -> None:
    assert not outcome.problems, f"{outcome.problems}: {outcome.victim}: {outcome.message}"


@pytest.mark.parametrize("fault", draw_faults(44, seed=0, modes=PLAIN, slow=False), ids=named)
def test_fault_is_caught_and_named(engines, fault):
    check(inject(engines.plain, fault, engines.files))


@pytest.mark.parametrize(
    "fault", draw_faults(27, seed=0, modes=("sparse_merge",), slow=False, tensor_parallel=2), ids=named
)
def test_fault_of_changed_elements_is_caught_and_named(engines, fault):
    check(inject(engines.sixteen, fault, engines.files))


@pytest.mark.parametrize("kind", ON_TWO_RANKS)
def test_fault_on_one_of_two_ranks_stops_both(engines, kind):
    for rank in (0, 1) if kind == "ranks differ" else (1,):
        fault = next(f for f in (draw_fault(kind, "adapter", seed, 2) for seed in range(99)) if f.rank == rank)
        check(inject(engines.adapter, fault, engines.files))


@pytest.mark.parametrize("kind", ["sender silent", "receiver silent"])
def test_silence_has_an_end(engines, kind):
    outcome = inject(engines.plain, draw_fault(kind, "receiver_merge", seed=0), engines.files)
    check(outcome)
    assert outcome.seconds < 45


def test_without_digests_the_shape_of_a_sync_is_still_proven_and_values_are_not(engines):
    replica = engines.plain
    replica.begin_run("off")
    try:
        for kind in WITHOUT_DIGESTS:
            check(inject(replica, draw_fault(kind, "receiver_merge", seed=1), engines.files))
        for kind in ("tensor never sent", "unknown name sent"):
            check(inject(replica, draw_fault(kind, "merge", seed=1), engines.files))
        outcome = inject(replica, draw_fault("bit flipped", "receiver_merge", seed=1), engines.files)
        assert outcome.problems == ["missed", "tokens were generated"]
        assert replica.sync("merge")["sync_digest_ok"] == 0
    finally:
        replica.begin_run("digest")


@pytest.mark.parametrize("sync_check", ["digest", "off"])
def test_an_engine_that_a_sleep_has_emptied_before_the_first_sync_is_refused(engines, sync_check):
    replica = engines.plain
    replica.sync("receiver_merge")
    lost = next(name for name in replica.on_trainers("unsent", "receiver_merge")[0] if name.endswith("norm.weight"))
    replica.in_engine(processes.lose_weight, lost, 0)
    replica.begin_run(sync_check)
    try:
        with pytest.raises(SyncRefused, match=f"{lost}: the rollout engine holds other values than its checkpoint"):
            replica.sync("receiver_merge")
    finally:
        replica.in_engine(processes.restore_weight)
        replica.begin_run("digest")
    replica.sync("receiver_merge")


# -- the policy; the engines hold the base model no more, and remember it --------------------------------------------


@pytest.fixture
def logprobs(engines):
    """Lets engines check the policy, whose trainers begin at the base model again."""

    def begin(replica: RolloutHarness, rounding: str = "stochastic", steps: int = 2) -> RolloutHarness:
        replica.begin_run("logprobs", rounding)
        replica.on_trainers("train", steps)
        return replica

    yield begin
    for replica in (engines.adapter, engines.sixteen):
        replica.begin_run("digest")


def test_small_update_lost_in_rounding_is_refused_and_passes_with_thresholds(engines, logprobs):
    """As in ``test_policy_engine.py``, through a whole sync: digests agree either way."""
    # The server's last checks are heard by the one rank that asked for them; its error ends a run.
    said = r"gone 0\.[0-4]\d ± 0\.\d+ of the trainer's way.*sync_rounding=stochastic"
    with pytest.raises((SyncRefused, SyncHangs), match=said):
        logprobs(engines.sixteen, "nearest").sync("sparse_merge")
    assert "differ from the trainer's" in engines.sixteen.refusal()
    measured = logprobs(engines.sixteen).sync("sparse_merge")
    assert measured["sync_policy_judged"] == 1 and measured["sync_policy_slope_error"] < 0.0625
    assert measured["sync_policy_slope"] == pytest.approx(1, abs=0.15) and measured["sync_policy_kl_ratio"] < 0.1
    assert engines.sixteen.refusal() == ""


def test_policy_that_has_not_moved_has_no_verdict(engines, logprobs):
    measured = logprobs(engines.sixteen, steps=0).sync("merge")
    assert measured["sync_policy_judged"] == 0 and "sync_policy_slope" not in measured


def test_adapter_in_float32_goes_all_of_the_way_from_the_first_step(engines, logprobs):
    measured = logprobs(engines.adapter, steps=1).sync("adapter")
    assert measured["sync_policy_judged"] == 1
    assert measured["sync_policy_slope"] == pytest.approx(1, abs=0.01)
    assert abs(measured["sync_policy_kl_ratio"]) < 0.01


# -- kills; after them the engines are gone ----------------------------------------------------------------------------


def test_killed_receiver_is_noticed_at_once(engines):
    check(kill(engines.plain, draw_fault("receiver killed", "receiver_merge", seed=0), engines.files))


def test_killed_sender_is_noticed_at_once(engines):
    check(kill(engines.adapter, draw_fault("sender killed", "adapter", seed=0, tensor_parallel=2), engines.files))


# -- the harness itself -----------------------------------------------------------------------------------------------


def test_drawn_faults_cover_every_kind_in_every_mode_and_follow_the_seed():
    faults = draw_faults(120, seed=3, tensor_parallel=2)
    counted = Counter((fault.kind, fault.mode) for fault in faults)
    assert len(faults) == 120 and set(counted) == set(combinations(MODES, 2))
    assert {kind for kind, _ in counted} == {kind for kind, known in KINDS.items() if not known.kill}
    assert max(count for (kind, _), count in counted.items() if KINDS[kind].slow) == 1
    assert faults == draw_faults(120, seed=3, tensor_parallel=2) != draw_faults(120, seed=4, tensor_parallel=2)


def test_report_tells_what_is_wrong_with_a_fault():
    good = Outcome(
        "bit flipped", "merge", "network", 1, 0, "a.bias", "a.bias: sent …", 0.1, 60, True, True, "no", True, 0
    )
    changes = {
        "missed": {"caught": False, "named": False},
        "late, after 61.0 s": {"seconds": 61.0},
        "not named": {"named": False},
        "tokens were generated": {"refusal": ""},
        "files changed": {"intact": False},
        "then off by nan": {"difference": float("nan")},
    }
    assert good.problems == []
    bad = [replace(good, **change) for change in changes.values()]
    assert [outcome.problems for outcome in bad] == [[text] for text in changes]
    text = report([good, *bad], ("merge", "adapter"), 12.0)
    assert (
        "| bit flipped | 7 / 6 / 5, 61.00 s |  |" in text
        and "7 faults in 12 s: 1 caught in time and named, 6 not" in text
    )
    assert all(problem in text for problem in changes) and "bias 7" in text


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--modes", "merge,adaptor"], "--modes: adaptor, wanted some of merge, sparse_merge, adapter, receiver_merge"),
        (["--modes", ""], "--modes: none"),
        (["--faults", "3"], "--faults: 3 faults, wanted at least"),
        (["--tensor-parallel", "3"], "--tensor-parallel: 3, wanted 1 or 2"),
        (["--kills", "-1"], "--kills: -1, wanted 0 or more"),
    ],
)
def test_bad_arguments_are_one_line(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and wanted in error and len(error.splitlines()) == 1
