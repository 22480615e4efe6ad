"""Start verl's standalone replicas on this machine and drive them step by step."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from recipes.demo.environment import CPU_ENVIRONMENT
from tests.support import sleeping_engine
from tests.support.faults import Fault

ROOT = Path(__file__).parents[2]
ENGINE_MODULE = "tests.support.hybrid_model_engine"
PLUGIN_MODULE = "hybrid_lora_plugin.verl_backend.engine_registration"
#: of Ray's processes only
RAY_ENVIRONMENT = {
    # vLLM's workers are asked to run functions, which it sends pickled.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VERL_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
#: seconds beyond ``sync_timeout`` after which a sync hangs: the plugin's own longest wait, and some for a busy machine
_MARGIN = 120.0


class SyncRefused(Exception):
    """What the server adapter raised: the text a training run would end with."""


class SyncHangs(Exception):
    """A sync neither succeeded nor failed within every limit that it has."""


def start_ray(gpus: int = 32) -> None:
    """A local Ray of our own, with logical GPUs and processors for verl's placement."""
    os.environ.update(CPU_ENVIRONMENT)
    # A failed sync fails on every rank, and one of the errors is enough.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    import ray

    if ray.is_initialized():
        return
    sleeping = sleeping_engine.plugin_folder(ROOT / ".cache/sleeping-engine")
    search = os.pathsep.join([str(ROOT), str(sleeping), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, RAY_ENVIRONMENT | {"PYTHONPATH": search}):
        ray.init(num_gpus=gpus, num_cpus=4 * gpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def stop_ray() -> None:
    """End Ray and everything it started."""
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()


def compose(overrides: list[str]):
    """verl's configuration of a run with these overrides, as ``main_ppo`` would have it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra_compose("ppo_trainer", overrides=[f"hydra.searchpath=[file://{ROOT / 'recipes'}]", *overrides])
    if "hybrid_lora" in config:
        from hybrid_lora_plugin.verl_backend.run_settings import settle

        settle(config)
    # As main_ppo does, before parts of it go to other processes.
    OmegaConf.resolve(config)
    return config


class RolloutHarness:
    """One replica and the hybrid models that feed it, one for each of its tensor-parallel workers.

    Args:
        model, allocation: base model folder and its artifact.
        sync: what the engine is started for; ``adapter`` starts it with LoRA.
        number: replica rank, different for all replicas of a process.
        tensor_parallel: workers of the engine.
        dtype: of the engine.
        rank, alpha: of the adapters.
        sync_check: as in ``hybrid_lora``.
        timeout: ``hybrid_lora.sync_timeout`` in seconds.
        overrides: more of verl's settings.
        scale: of the trainer's updates, 1 for very large ones.
    """

    def __init__(
        self,
        model: str | Path,
        allocation: str | Path,
        sync: str,
        *,
        number: int = 0,
        tensor_parallel: int = 1,
        dtype: str = "float32",
        rank: int = 4,
        alpha: int = 8,
        sync_check: str = "digest",
        timeout: float = 60.0,
        overrides: tuple[str, ...] = (),
        scale: float = 1.0,
    ):
        self.model, self.allocation = Path(model), Path(allocation)
        self.sync_mode, self.tensor_parallel, self.timeout, self._step = sync, tensor_parallel, timeout, 0
        self._scale = scale
        #: largest difference of a log-probability between trainer and engine after a healthy sync, for a model whose
        #: logits have grown over hundreds of large updates
        self.agrees = 1e-3 if dtype == "float32" else 0.25
        #: processes of vLLM, which outlive the actor that started them when that is killed
        self._engine_processes: set[int] = set()
        self._overrides = [
            "+hybrid_lora=enabled",
            "+recipe=demo",
            f"hybrid_lora.allocation={allocation}",
            f"hybrid_lora.sync={sync}",
            f"hybrid_lora.sync_check={sync_check}",
            f"hybrid_lora.sync_timeout={timeout}",
            f"hybrid_lora.lora.rank={rank}",
            f"hybrid_lora.lora.alpha={alpha}",
            f"actor_rollout_ref.model.path={model}",
            f"actor_rollout_ref.rollout.dtype={dtype}",
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={tensor_parallel}",
            f"actor_rollout_ref.rollout.n_gpus_per_node={tensor_parallel}",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend="
            + ("uni" if tensor_parallel == 1 else "mp"),
            *sleeping_engine.SETTINGS,
            "actor_rollout_ref.rollout.checkpoint_engine.backend=hybrid_model",
            # The smallest that verl takes: a sync of a small model goes in several buckets.
            "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=1",
            f"actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=[{PLUGIN_MODULE},{ENGINE_MODULE}]",
            f"++actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.hybrid_model={{model:'{model}',allocation:"
            f"'{allocation}',rank:{rank},alpha:{alpha},dtype:{dtype},sync_check:{sync_check}}}",
            *overrides,
        ]
        self._number = number

    def prepare(self) -> None:
        """Everything before processes are started; not for several threads."""
        start_ray()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from hybrid_lora_plugin.verl_backend import engine_registration  # noqa: F401  registers the replica
            from hybrid_lora_plugin.verl_backend.receiver.server import HybridLoraReplica

            settings = compose(self._overrides).actor_rollout_ref
            self.replica = HybridLoraReplica(
                self._number, settings.rollout, settings.model, gpus_per_node=self.tensor_parallel
            )

    def launch(self) -> None:
        """Start the replica's processes and wait until it answers: a minute or two."""
        asyncio.run(self.replica.init_standalone())
        for identifiers in self.in_engine(process_ids):
            self._engine_processes.update(identifiers)
        self._engine_processes.discard(self._get(self.server.__ray_call__.remote(_own_id)))
        self.in_engine(record_receptions)

    @property
    def server(self):
        return self.replica._server_handle

    @property
    def workers(self) -> list[Any]:
        """verl's checkpoint engine workers: here, the trainer's ranks."""
        return self.replica.workers

    def _get(self, references, timeout: float = 300.0):
        import ray

        return ray.get(references, timeout=timeout)

    def on_trainers(self, method: str, *arguments, timeout: float = 300.0) -> list[Any]:
        """Call a method of every rank's ``HybridModelEngine``."""
        return self._get([w.execute_checkpoint_engine.remote(method, *arguments) for w in self.workers], timeout)

    # -- what a run does --------------------------------------------------------------------------------------

    def begin_run(self, sync_check: str, rounding: str = "stochastic") -> None:
        """Another training run with that ``sync_check`` and ``sync_rounding``, on an engine that knows of none."""
        self.on_trainers("begin_run", sync_check, rounding)
        self.in_engine(forget_run)

    def update(self, seed: int) -> None:
        """Let the trainer's model move."""
        self.on_trainers("update", seed, self._scale)

    def sync(self, mode: str | None = None, fault: Fault | None = None, keep: bool = False) -> dict[str, float]:
        """One sync.

        Args:
            mode: sync mode; the one that the engine was started for by default.
            fault: what goes wrong with it.
            keep: whether it is kept, to be the stale one of a later fault.

        Returns:
            The plugin's measurements, without ``hybrid_lora/``.

        Raises:
            SyncRefused: the sync was not proven.
            SyncHangs: a rank still waits after every limit.
        """
        import ray

        from hybrid_lora_plugin.verl_backend.sender.sync_metrics import combined, last_sync

        self._step += 1
        for rank, worker in enumerate(self.workers):
            hit = fault if fault is not None and fault.rank == rank else None
            self._get(worker.execute_checkpoint_engine.remote("configure", mode or self.sync_mode, hit, keep))
        running = [worker.update_weights.remote(global_steps=self._step) for worker in self.workers]
        limit = 2 * self.timeout + _MARGIN
        _, waiting = ray.wait(running, num_returns=len(running), timeout=limit)
        if waiting:
            ranks = [rank for rank, reference in enumerate(running) if reference in waiting]
            raise SyncHangs(f"trainer ranks {ranks} still wait in a sync after {limit:g} s")
        texts = [_error_of(reference) for reference in running]
        if any(texts):
            if not all(texts):
                raise SyncHangs(f"trainer rank {texts.index('')} goes on after a sync that failed: {max(texts)}")
            # A process that died has nothing to say; the others have.
            raise SyncRefused(next((text for text in texts if "weight sync" in text), texts[0]))
        return combined([self._get(self.workers[0].__ray_call__.remote(last_sync))])

    # -- sleep ------------------------------------------------------------------------------------------------

    def place(self, colocated: bool, mode: str | None = None) -> None:
        """Have verl's server take itself for one beside the trainer, which sleeps, or for one apart from it.

        Args:
            colocated: which of them.
            mode: sync mode that it is started for; the engine's own by default.
        """
        self._get(self.server.__ray_call__.remote(_place, colocated, mode or self.sync_mode))

    def set_sleep_level(self, level: int | None) -> None:
        """Sleep at that level, whatever the plugin says; None for the plugin's own."""
        self._get(self.server.__ray_call__.remote(_set_sleep_level, level))

    def sleep(self) -> None:
        """As verl puts all its replicas to sleep."""
        asyncio.run(self.replica.sleep())

    def wake_up(self, *tags: str) -> None:
        """As verl's server adapter has its server wake up."""
        self._get(self.server.wake_up.remote(list(tags)))

    def sync_asleep(self, mode: str) -> dict[str, float]:
        """One sync of a sleeping engine in the order of verl's ``ActorRolloutRefWorker.update_weights``."""
        self.wake_up("weights")
        measured = self.sync(mode)
        self.wake_up("kv_cache")
        return measured

    def sync_apart(self, mode: str) -> dict[str, float]:
        """One sync of an engine apart from the trainer, as verl's ``CheckpointEngineManager.update_weights`` does."""
        self._get(self.server.release_kv_cache.remote())
        measured = self.sync(mode)
        self._get(self.server.resume_kv_cache.remote())
        return measured

    def struck(self, rank: int = 0) -> Fault:
        """The fault of the last sync, which knows by now what it damaged."""
        return self._get(self.workers[rank].execute_checkpoint_engine.remote("struck"))

    def generate(self, prompt: list[int], tokens: int, **sampling) -> Any:
        """verl's ``TokenOutput`` for one prompt."""
        return self._get(self.server.generate.remote(prompt, {"max_tokens": tokens} | sampling, os.urandom(8).hex()))

    def refusal(self) -> str:
        """Why the rollout engine generates nothing; "" where it generates."""
        from ray.exceptions import RayError

        try:
            self.generate([1, 2, 3], 1)
        except RayError as error:
            return _text_of(error)
        return ""

    def difference(self, tokens: list[int]) -> float:
        """Largest difference of a prompt's log-probabilities between trainer and rollout engine."""
        theirs = self.generate(tokens, 1, prompt_logprobs=0).extra_fields["prompt_logprobs"]
        ours = self.on_trainers("log_probs", tokens)[0]
        return max(abs(a - b[0]) for a, b in zip(ours, theirs, strict=False))

    # -- around a fault ---------------------------------------------------------------------------------------

    def in_engine(self, function: Callable, *arguments, timeout: float = 300.0) -> list[Any]:
        """``function(worker, *arguments)`` in every vLLM worker; it must be importable there."""
        return self._get(self.server.collective_rpc.remote(function, args=arguments), timeout)

    def set_sync_timeout(self, seconds: float) -> None:
        """Give ``hybrid_lora.sync_timeout`` another value from the next sync on."""
        self.timeout = seconds
        self._get([worker.__ray_call__.remote(_set_sync_timeout, seconds) for worker in self.workers])

    def close(self) -> None:
        """End the replica's processes."""
        import ray

        for actor in [*self.replica.servers, *self.replica.workers]:
            ray.kill(actor, no_restart=True)
        for group in self.replica.resource_pool.pgs or ():
            ray.util.remove_placement_group(group)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(map(_lives, self._engine_processes)):
            time.sleep(0.2)
        for process in filter(_lives, self._engine_processes):
            os.kill(process, signal.SIGKILL)


def start_side_by_side(*replicas: RolloutHarness) -> None:
    """Start replicas at the same time; an error of any of them is raised."""
    for replica in replicas:
        replica.prepare()
    errors: list[BaseException] = []

    def launch(replica: RolloutHarness) -> None:
        try:
            replica.launch()
        except BaseException as error:
            errors.append(error)

    # Daemons: an interrupted start must not wait for them.
    threads = [threading.Thread(target=launch, args=(replica,), daemon=True) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _error_of(reference) -> str:
    """Text of the error that a finished call ended with, "" where it did not."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        return _text_of(error)
    return ""


def _text_of(error: Exception) -> str:
    """The exception's own text, without Ray's traceback around it."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _lives(process: int) -> bool:
    """Whether the process runs; one that waits only for its parent to notice its end does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# -- run in other processes: verl's checkpoint engine workers, and vLLM's workers ---------------------------------


def _own_id(_actor) -> int:
    return os.getpid()


def _set_sync_timeout(worker, seconds: float) -> None:
    worker.server_adapter.model_config.lora["hybrid"]["sync_timeout"] = seconds


def _place(server, colocated: bool, mode: str) -> None:
    from verl.workers.rollout.replica import RolloutMode

    from hybrid_lora_plugin.sync.modes import sync_mode

    server._mode = sync_mode(mode)
    server.rollout_mode = RolloutMode.HYBRID if colocated else RolloutMode.STANDALONE


def _set_sleep_level(server, level: int | None) -> None:
    server.__dict__.pop("_resolve_sleep_level", None)
    if level is not None:
        server._resolve_sleep_level = lambda: level


def process_ids(worker) -> tuple[int, int]:
    """Of vLLM's worker and of the process that started it."""
    return os.getpid(), os.getppid()


def forget_run(worker) -> None:
    """Leave nothing of earlier syncs but the weights."""
    worker.worker.__dict__.pop("_hybrid_rollout", None)


def parameter_digests(worker) -> dict[str, str]:
    """Digest of every parameter of vLLM's model, by vLLM's name."""
    from hybrid_lora_plugin.sync.digest import digest_of

    return {name: digest_of(parameter) for name, parameter in worker.model_runner.model.named_parameters()}


def weight_digests(worker, names: list[str]) -> dict[str, str]:
    """Digest of this worker's part of each plain weight."""
    from hybrid_lora_plugin.sync.digest import digest_of

    return {name: digest_of(worker._hybrid_rollout.live(name).view) for name in names}


def lose_weight(worker, name: str, rank: int) -> None:
    """Zero a plain weight in the worker of that rank, as a sleep that discards weights could."""
    if worker.rank == rank:
        view = worker._hybrid_rollout.live(name).view
        worker.worker.lost = (view, view.clone())
        view.zero_()


def restore_weight(worker) -> None:
    """Undo ``lose_weight``."""
    view, values = worker.worker.__dict__.pop("lost", (None, None))
    if view is not None:
        view.copy_(values)


def record_receptions(worker) -> None:
    """Let the worker remember what its last sync ended with, for when nobody is left to be told."""
    worker = worker.worker
    receive = worker.receive_hybrid_weights

    def recorded(*arguments, **options):
        worker.last_reception = None
        result = receive(*arguments, **options)
        worker.last_reception = {"error": result.get("error", ""), "at": time.time()}
        return result

    worker.receive_hybrid_weights = recorded


def last_reception(worker) -> dict[str, Any] | None:
    """Error of the last sync ("" for none) and when it ended, in seconds since the epoch."""
    return worker.worker.last_reception
