"""Contracts with verl and vLLM that the weight sync relies on: each fails when they change under it."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from omegaconf import OmegaConf  # noqa: E402
from verl.checkpoint_engine.base import CheckpointEngineManager  # noqa: E402
from verl.trainer.ppo.v1 import trainer_base  # noqa: E402
from verl.workers.config import RolloutConfig  # noqa: E402
from verl.workers.engine_workers import ActorRolloutRefWorker  # noqa: E402
from verl.workers.rollout import base as rollout_base  # noqa: E402
from verl.workers.rollout.replica import RolloutMode, RolloutReplicaRegistry  # noqa: E402
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer, vllm_async_server  # noqa: E402
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension  # noqa: E402

from hybrid_lora_plugin.errors import ConfigurationError, WeightSyncError  # noqa: E402
from hybrid_lora_plugin.sync.modes import sync_mode  # noqa: E402
from hybrid_lora_plugin.sync.received import ReceivedWeights  # noqa: E402
from hybrid_lora_plugin.sync.wire import OutgoingWeights, SyncHeader, read_header  # noqa: E402
from hybrid_lora_plugin.verl_backend import engine_registration, patches  # noqa: E402
from hybrid_lora_plugin.verl_backend.receiver.replica import ReplicaForModel  # noqa: E402
from hybrid_lora_plugin.verl_backend.receiver.server import HybridLoraHttpServer, HybridLoraReplica  # noqa: E402
from hybrid_lora_plugin.verl_backend.receiver.vllm_model import VllmRolloutModel  # noqa: E402
from hybrid_lora_plugin.verl_backend.receiver.worker import HybridLoraWorkerExtension  # noqa: E402
from hybrid_lora_plugin.verl_backend.sender import sync_metrics  # noqa: E402
from hybrid_lora_plugin.verl_backend.sender.server_adapter import HybridLoraServerAdapter  # noqa: E402

pytestmark = pytest.mark.verl

SERVER = vllm_async_server.vLLMHttpServer


def test_registration_puts_our_rollout_side_where_verl_looks():
    engine_registration.register()
    assert rollout_base.get_rollout_class("vllm") is HybridLoraServerAdapter
    assert RolloutReplicaRegistry.get("vllm") is ReplicaForModel


@pytest.mark.parametrize("hybrid", [True, False])
def test_replica_is_ours_for_a_hybrid_model_only(hybrid):
    """Also where nothing has read the model: verl's experimental trainers start servers in processes that do not."""
    lora = {"hybrid": {"sync": "merge"}} if hybrid else {}
    model = OmegaConf.create({"path": "m", "lora": lora})
    replica = RolloutReplicaRegistry.get("vllm")(replica_rank=0, config=RolloutConfig(name="vllm"), model_config=model)
    assert type(replica) is (HybridLoraReplica if hybrid else vllm_async_server.vLLMReplica)


@pytest.mark.parametrize("kind", [SERVER, HybridLoraHttpServer])
@pytest.mark.parametrize("lora", [{"hybrid": {"sync": "merge"}}, {}], ids=["hybrid", "plain"])
def test_a_server_of_verls_own_is_refused_for_a_hybrid_model_while_it_is_made(kind, lora):
    made = inspect.getsource(SERVER.__init__)
    assert made.index("self._init_model_config(") < made.index("self._validate_configs()")
    # As in the server's own process, where reading the model imports the plugin's module.
    patches.refuse_plain_servers()
    server = kind.__new__(kind)
    server.config = RolloutConfig(name="vllm", max_model_len=8)
    server.model_config = SimpleNamespace(lora=lora, hf_config=SimpleNamespace(max_position_embeddings=16))
    if lora and kind is SERVER:
        with pytest.raises(ConfigurationError, match="vllm_async_server.vLLMHttpServer, which proves no weights"):
            server._validate_configs()
    else:
        server._validate_configs()
    before = SERVER._validate_configs.verls_own
    patches.refuse_plain_servers()
    assert SERVER._validate_configs.verls_own is before, "applied once"


def test_verl_still_reads_the_model_before_it_looks_for_the_rollout_side():
    setup = inspect.getsource(trainer_base.PPOTrainer._setup)
    assert setup.index("_init_tokenizer()") < setup.index("LLMServerManager.create(")
    assert "omega_conf_to_dataclass(self.config.actor_rollout_ref.model)" in inspect.getsource(
        trainer_base.PPOTrainer._init_tokenizer
    )


def test_no_trainer_of_verl_lets_an_engine_join_a_run():
    """One that did would need a whole sync in mode ``sparse_merge``, and the trainer's ranks would have to know."""
    assert callable(CheckpointEngineManager.add_replicas)
    package = Path(inspect.getfile(trainer_base)).parents[3]
    assert package.name == "verl"
    found = {
        str(file.relative_to(package)): calls
        for file in package.rglob("*.py")
        if (calls := re.findall(r"manager\w*\.add_replicas\(", file.read_text(encoding="utf-8")))
    }
    # The experimental one adds engines that are there since the start to its load balancer, and to nothing else.
    assert found == {"experimental/fully_async_policy/fully_async_rollouter.py": ["manager.add_replicas("]}


def test_metrics_of_a_sync_are_logged_with_its_step():
    """The patch: verl still merges what ``_consume_sync_metrics`` returns, right after the sync."""
    fit = inspect.getsource(trainer_base.PPOTrainer.fit)
    assert (
        fit.index("self.on_step_end()")
        < fit.index("self._consume_sync_metrics()")
        < fit.index("self.logger.log(data=metrics")
    )
    original = inspect.unwrap(trainer_base.PPOTrainer._consume_sync_metrics)
    assert "last_sync" not in inspect.getsource(original), "verl may log syncs itself now"
    patches.log_sync_metrics()
    patched = trainer_base.PPOTrainer._consume_sync_metrics
    assert patched is not original and inspect.unwrap(patched) is original
    patches.log_sync_metrics()
    assert trainer_base.PPOTrainer._consume_sync_metrics is patched, "applied once"


def test_a_lost_update_is_told_once_with_its_cure(monkeypatch, capsys):
    """From the sums of all ranks: a rank that holds no rows of a kind has none."""
    monkeypatch.setattr(sync_metrics, "_warned", False)
    few = {"lora": [4.0, 100.0, 5.0, 1e6]}
    records = [
        {"sync_bytes": 7.0, "sync_digest_ok": 1.0, sync_metrics.UPDATE_SUMS: few},
        {"sync_bytes": 7.0, "sync_digest_ok": 0.0, sync_metrics.UPDATE_SUMS: few | {"full": [99.0, 100.0, 99.0, 1e6]}},
    ]
    metrics = sync_metrics.combined(records)
    assert metrics["update_arrived_lora"] == 0.04 and metrics["update_arrived_full"] == 0.99
    assert metrics["sync_bytes"] == 7.0 and metrics["sync_digest_ok"] == 0.0
    for _ in range(2):
        sync_metrics.warn_of_lost_update(records)
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "update_arrived_lora is 0.04" in said
    assert "hybrid_lora.sync_rounding=stochastic" in said and "docs/weight-sync.md#rollouts-in-16-bits" in said


def test_policy_of_a_sync_is_that_of_the_engine_that_stands_furthest():
    def record(slope, error):
        sync_metrics.last_sync()
        compared = {"sync_logprob_difference": slope / 10, "sync_policy_judged": 1.0}
        sync_metrics.add(1.0, compared | {"sync_policy_slope": slope, "sync_policy_slope_error": error})
        return sync_metrics.last_sync()

    not_judged = {"sync_seconds": 2.0, sync_metrics.POLICY: {"sync_policy_judged": 0.0}}
    metrics = sync_metrics.combined([record(1.02, 0.03), not_judged, record(0.9, 0.01), {"sync_seconds": 1.0}])
    assert metrics["sync_policy_slope"] == 0.9 and metrics["sync_policy_slope_error"] == 0.01
    assert metrics["sync_logprob_difference"] == pytest.approx(0.102) and metrics["sync_seconds"] == 2.0
    sync_metrics.add(1.0, {})
    assert sync_metrics.combined([sync_metrics.last_sync()]) == {"sync_seconds": 1.0}


def test_an_engine_that_loads_no_checkpoint_says_that_it_cannot_judge(capsys):
    dummy = server(config=SimpleNamespace(load_format="dummy"))
    asyncio.run(dummy._look_at_base())
    said = capsys.readouterr().out
    assert dummy._base is None and "load_format=dummy" in said and "give safetensors" in said


def test_last_sync_is_empty_before_the_first():
    sync_metrics._last.clear()
    assert sync_metrics.last_sync() == {}


def test_two_syncs_of_one_step_count_together_and_those_of_two_steps_do_not():
    """As before the first step: nobody asks for the metrics of the sync at the start of a run."""

    def send(step: int | None, before: dict[str, str]) -> dict[str, str]:
        header = SyncHeader(run="r", number=1, mode="merge", dtype="float32", digests=True)
        stream = OutgoingWeights(header, [("w", torch.ones(2))], before=before, on_end=sync_metrics.keep)
        stream.step = step
        list(stream)
        return stream.digests

    sync_metrics.last_sync()
    sent = send(0, {})
    send(0, sent)
    assert sync_metrics.last_sync()["sync_tensors_changed"] == 1
    send(0, {})
    send(1, sent)
    assert sync_metrics.last_sync()["sync_tensors_changed"] == 0
    # Engines apart from the trainer are not told the step in its process.
    send(None, {})
    send(2, sent)
    assert sync_metrics.last_sync()["sync_tensors_changed"] == 1


def test_transport_still_waits_and_acknowledges_where_ours_looks():
    send = inspect.getsource(bucketed_weight_transfer.BucketedWeightSender)
    receive = inspect.getsource(bucketed_weight_transfer.BucketedWeightReceiver)
    assert "self.zmq_context.socket(zmq.REQ)" in send and "self.zmq_context.socket(zmq.REP)" in receive
    assert send.count("self.socket.recv()") == 4, "each of these waits without a limit in verl"
    assert receive.count("self.socket.recv_pyobj()") == 2 and 'self.socket.send(b"")' in receive
    # The last acknowledgement goes out after the callback of the last bucket, so it can carry its result.
    loop = inspect.getsource(bucketed_weight_transfer.BucketedWeightReceiver.receive_weights)
    assert loop.index("on_bucket_received(weights, is_last)") < loop.index("self._ack_pending = True")


@pytest.mark.parametrize("number", [9, 10, 99, 100])
@pytest.mark.parametrize("mode", ["adapter", "receiver_merge"])
def test_verls_buckets_without_gaps_carry_a_sync(number, mode):
    """verl's nccl, nixl and hccl engines put tensors one behind the other and view each by its dtype."""
    from verl.checkpoint_engine.base import merge_weight_chunks, split_weight_chunks

    factor_dtype = torch.float32 if mode == "receiver_merge" else torch.bfloat16
    tensors = [("a.lora_A.weight", torch.randn(3, 5).to(factor_dtype)), ("b.weight", torch.randn(7, 3).bfloat16())]
    stream = OutgoingWeights(SyncHeader(run="r", number=number, mode=mode, dtype="bfloat16", digests=True), tensors)

    async def through() -> list:
        bucket, offset, metas = torch.zeros(1 << 16, dtype=torch.uint8), 0, []
        async for meta, chunk in split_weight_chunks(stream, bucket.numel()):
            bucket[offset : offset + meta.chunk_size] = chunk
            metas.append((meta, bucket[offset : offset + meta.chunk_size]))
            offset += meta.chunk_size

        async def chunks():
            for pair in metas:
                yield pair

        return [(name, tensor) async for name, tensor in merge_weight_chunks(chunks(), bucket.numel())]

    (name, header), *arrived = asyncio.run(through())
    received = ReceivedWeights(read_header(name, header))
    for name, tensor in arrived:
        received.take(name, tensor)
    assert [entry.name for entry in received.finish()] == [name for name, _ in tensors]


def test_server_still_has_what_ours_overrides():
    assert "await self.engine.reset_prefix_cache" in inspect.getsource(SERVER.clear_kv_cache)
    assert "await self.engine.collective_rpc(" in inspect.getsource(SERVER.collective_rpc)
    assert "return await" not in inspect.getsource(SERVER.collective_rpc), (
        "verl returns the workers' answers itself now"
    )
    assert "self._resolve_sleep_level()" in inspect.getsource(SERVER._sleep_hybrid)
    assert "self._get_worker_extension_cls()" in inspect.getsource(SERVER.launch_server)
    generate = inspect.getsource(SERVER.generate)
    assert generate.index("self._park_until_admitted(request_id)") < generate.index("self.engine.generate(")
    assert "self._admitting += 1" in inspect.getsource(SERVER._park_until_admitted)


def test_verl_still_launches_engines_before_it_puts_them_to_sleep():
    """Between the two they hold the base model, and can generate."""
    setup = inspect.getsource(trainer_base.PPOTrainer._setup)
    assert setup.index("LLMServerManager.create(") < setup.index("sleep_replicas()")
    launch = inspect.getsource(SERVER.launch_server)
    assert launch.rindex("await self.run_server(") > launch.index("server_args")
    assert "self.engine = engine_client" in inspect.getsource(SERVER.run_server)


def test_verl_still_wakes_weights_then_syncs_then_wakes_the_cache():
    """The order in which ``tests/test_sync_faults.py`` puts engines to sleep and wakes them."""
    beside = inspect.getsource(ActorRolloutRefWorker.update_weights)
    order = ['resume(tags=["weights"])', "self.rollout.update_weights(", 'resume(tags=["kv_cache"])']
    assert [beside.count(call) for call in order] == [1, 2, 1] and sorted(order, key=beside.index) == order
    apart = inspect.getsource(CheckpointEngineManager.update_weights)
    order = ["release_kv_cache_replicas()", "rollout.update_weights(", "resume_kv_cache_replicas()"]
    assert sorted(order, key=apart.index) == order
    released = inspect.getsource(SERVER.release_kv_cache)
    assert released.index("self.engine.sleep(") < released.index('self.engine.wake_up(tags=["weights"])')
    # Before the checkpoint is loaded, and after the rollouts of a step.
    setup = inspect.getsource(trainer_base.PPOTrainer._setup)
    assert setup.index("sleep_replicas()") < setup.index("self._load_checkpoint()")


def test_extension_adds_no_name_that_vllm_or_verl_use():
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    ours = {name for name in vars(HybridLoraWorkerExtension) if not name.startswith("__")}
    for theirs in (Worker, CPUWorker, vLLMColocateWorkerExtension):
        assert not ours & set(dir(theirs))


def test_verl_still_asks_for_the_unstacked_mapper_and_our_worker_gives_it_under_its_new_name(monkeypatch):
    """vLLM 0.29 has ``get_rename_mapper`` in its place; here vLLM's own class gets that name."""
    from verl.utils.vllm.utils import VLLMHijack
    from vllm.model_executor.models.utils import WeightsMapper

    assert "hf_to_vllm_mapper = hf_to_vllm_mapper.get_unstacked_mapper()" in inspect.getsource(VLLMHijack)
    own = [name for name in ("get_unstacked_mapper", "get_rename_mapper") if hasattr(WeightsMapper, name)]
    without_packing = getattr(WeightsMapper, own[0])
    # Its own would end this process with its parent.
    monkeypatch.setattr(vLLMColocateWorkerExtension, "__new__", staticmethod(lambda cls, **_: object.__new__(cls)))
    for name in own:
        monkeypatch.delattr(WeightsMapper, name)
    HybridLoraWorkerExtension()
    assert not hasattr(WeightsMapper, "get_unstacked_mapper"), "neither name: nothing is made up"
    monkeypatch.setattr(WeightsMapper, "get_rename_mapper", without_packing, raising=False)
    HybridLoraWorkerExtension()
    names = WeightsMapper(orig_to_new_prefix={"a.": "b."}, orig_to_new_stacked={"q_proj": ("qkv_proj", "q")})
    assert names.apply_list(["a.q_proj.weight"]) == ["b.qkv_proj.weight"]
    assert names.get_unstacked_mapper().apply_list(["a.q_proj.weight"]) == ["b.q_proj.weight"]


class Engine:
    """As much of vLLM's engine as one call of the server asks for."""

    vllm_config = SimpleNamespace(kv_transfer_config=None)

    def __init__(self, resets: bool = True):
        self.resets = resets

    async def reset_prefix_cache(self, reset_connector):
        return self.resets

    async def reset_mm_cache(self):
        pass

    async def reset_encoder_cache(self):
        pass

    async def list_loras(self):
        return set()


def server(**attributes) -> HybridLoraHttpServer:
    """The server's own logic without the process around it."""
    made = object.__new__(HybridLoraHttpServer)
    defaults = dict(
        node_rank=0, engine=Engine(), _unproven="", _fixed_prompt={}, _base=None, _compared={},
        model_config=SimpleNamespace(lora={"merge": True}, lora_rank=4),
        _kv_cache_released=False,
        _submission_paused=False, _rejecting=False, _admitting=0, global_steps=None,
    )  # fmt: skip
    for name, value in (defaults | attributes).items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("mode", ["sparse_merge", "adapter", "receiver_merge"])
def test_an_engine_keeps_its_weights_asleep_where_no_sync_brings_all_of_them(mode):
    assert server(_mode=sync_mode(mode))._resolve_sleep_level() == 1


@pytest.mark.parametrize(
    ("parallel", "shares"),
    [
        ({"nnodes": 1, "distributed_executor_backend": "mp"}, [["a", "d"], ["b", "e"], ["c"]]),
        ({"nnodes": 2, "distributed_executor_backend": "mp"}, [["a", "b", "c", "d", "e"]] * 3),
        ({"nnodes": 1, "distributed_executor_backend": "ray"}, [["a", "b", "c", "d", "e"]] * 3),
    ],
)
def test_workers_share_what_one_look_at_a_checkpoint_settles_only_on_one_machine(parallel, shares):
    config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=3, **parallel))
    workers = [SimpleNamespace(rank=rank, vllm_config=config) for rank in range(3)]
    assert [list("abcde")[VllmRolloutModel(worker).share] for worker in workers] == shares


def test_prefix_cache_that_cannot_be_reset_is_an_error():
    with pytest.raises(WeightSyncError, match="prefix cache"):
        asyncio.run(server(engine=Engine(resets=False))._forget_old_weights())
    asyncio.run(server()._forget_old_weights())


def test_nothing_is_admitted_while_weights_are_unproven_and_the_count_stays_right():
    locked = server()
    asyncio.run(locked.begin_weight_sync(7))
    with pytest.raises(WeightSyncError, match="sync of step 7 has not been completed"):
        asyncio.run(locked._park_until_admitted("request"))
    assert locked._admitting == 0
    locked._unproven = ""
    assert asyncio.run(locked._park_until_admitted("request")) is None and locked._admitting == 1


def test_nothing_is_admitted_from_the_moment_a_sleep_begins_to_discard_weights():
    class Falling(Engine):
        async def sleep(self, level):
            self.seen = level, made._unproven, made._kv_cache_released

        async def wake_up(self, tags):
            pass

        async def reset_encoder_cache(self):
            pass

    for call in ("sleep", "release_kv_cache"):
        made = server(engine=Falling(), _mode=sync_mode("merge"), rollout_mode=RolloutMode.HYBRID)
        made.model_config = SimpleNamespace(lora_rank=4, lora={"merge": True})
        made.config = SimpleNamespace(free_cache_engine=True, enable_sleep_mode=True, mtp=None)
        asyncio.run(getattr(made, call)())
        assert made.engine.seen == (2, "its weights were discarded by a sleep, and no sync has brought them back", True)
        with pytest.raises(WeightSyncError, match="discarded by a sleep"):
            asyncio.run(made._park_until_admitted("request"))


def test_request_that_comes_behind_verls_closed_gate_waits_for_the_sync_instead_of_failing():
    async def scenario():
        gate = server(_submission_paused=True, _resume_event=asyncio.Event())
        await gate.begin_weight_sync(7)
        waiting = asyncio.create_task(gate._park_until_admitted("request"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        gate._unproven, gate._submission_paused = "", False
        gate._resume_event.set()
        assert await waiting is None

    asyncio.run(scenario())


def test_fixed_prompt_that_differs_locks_the_server_and_names_the_token():
    async def scenario():
        probed = server(_limit=5.0, config=SimpleNamespace(dtype="float32"))
        probed._fixed_prompt = {"tokens": [[1, 2, 3]], "log_probs": [[-1.0, -2.0]], "limit": 1e-4}

        async def ours(tokens, adapter):
            return [-1.0, -2.5]

        probed._prompt_log_probs = ours
        with pytest.raises(WeightSyncError, match="token 2 has log-probability -2.5.*-2.0.*1e-04|0.0001.*float32"):
            await probed._compare_fixed_prompt()
        with pytest.raises(WeightSyncError, match="differ from the trainer's"):
            await probed._park_until_admitted("request")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("attributes", "compares"),
    [({}, True), ({"_kv_cache_released": True}, False), ({"_submission_paused": True}, False)],
)
def test_fixed_prompt_waits_until_the_engine_can_generate(attributes, compares):
    async def scenario():
        asked = []
        waiting = server(_limit=5.0, config=SimpleNamespace(dtype="float32"), **attributes)
        waiting._fixed_prompt = {"tokens": [[1, 2]], "log_probs": [[-1.0]], "limit": 1e-4}

        async def ours(tokens, adapter):
            asked.append(tokens)
            return [-1.0]

        waiting._prompt_log_probs = ours
        await waiting._compare_fixed_prompt()
        assert bool(asked) is compares and bool(waiting._fixed_prompt) is not compares

    asyncio.run(scenario())
