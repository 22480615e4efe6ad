"""Start verl's standalone replica on this machine and drive it step by step."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.rollout.faults import Fault
from recipes.demo.environment import CPU_ENVIRONMENT

ROOT = Path(__file__).parents[2]
ENGINE_MODULE = "benchmarks.rollout.hybrid_model_engine"
PLUGIN_MODULE = "hybrid_lora_plugin.verl_backend.engine_registration"


class SyncRefused(Exception):
    """What the adapter raised, its last line: the text a training run would end with."""


def start_ray(gpus: int = 4) -> None:
    """A local Ray of our own, with logical GPUs for verl's placement."""
    # Of this process too: Ray's own processes inherit it.
    os.environ.update(CPU_ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    import ray

    if not ray.is_initialized():
        ray.init(num_gpus=gpus, num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def compose(overrides: list[str]):
    """verl's configuration of a run with these overrides, as ``main_ppo`` would have it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra_compose("ppo_trainer", overrides=[f"hydra.searchpath=[file://{ROOT / 'recipes'}]", *overrides])
    # As main_ppo does, before parts of it go to other processes.
    OmegaConf.resolve(config)
    return config


class RolloutHarness:
    """One replica and the hybrid models that feed it, one for each of its tensor-parallel workers.

    Args:
        model, allocation: base model folder and its artifact.
        sync: what the engine is started for; ``adapter`` starts it with LoRA.
        number: replica rank, different for replicas that live at one time.
        tensor_parallel: workers of the engine.
        dtype: of the engine.
        rank, alpha: of the adapters.
        sync_check: as in ``hybrid_lora``.
        timeout: ``hybrid_lora.sync_timeout`` in seconds.
        overrides: more of verl's settings.
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
    ):
        start_ray()
        self.sync_mode, self._step = sync, 0
        executor = "uni" if tensor_parallel == 1 else "mp"
        config = compose(
            [
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
                f"actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend={executor}",
                "actor_rollout_ref.rollout.checkpoint_engine.backend=hybrid_model",
                f"actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=[{PLUGIN_MODULE},{ENGINE_MODULE}]",
                f"++actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.hybrid_model={{model:'{model}',allocation:"
                f"'{allocation}',rank:{rank},alpha:{alpha},dtype:{dtype},sync_check:{sync_check}}}",
                *overrides,
            ]
        )
        from hybrid_lora_plugin.verl_backend import engine_registration  # noqa: F401  registers the replica
        from hybrid_lora_plugin.verl_backend.rollout_server import HybridLoraReplica

        rollout = config.actor_rollout_ref.rollout
        self._loop = asyncio.new_event_loop()
        self.replica = HybridLoraReplica(number, rollout, config.actor_rollout_ref.model, gpus_per_node=tensor_parallel)
        self._loop.run_until_complete(self.replica.init_standalone())

    @property
    def server(self):
        return self.replica._server_handle

    @property
    def workers(self) -> list[Any]:
        return self.replica.workers

    def _get(self, references, timeout: float = 300.0):
        import ray

        return ray.get(references, timeout=timeout)

    def _on_engines(self, method: str, *arguments) -> list[Any]:
        return self._get([w.execute_checkpoint_engine.remote(method, *arguments) for w in self.workers])

    # -- what a run does --------------------------------------------------------------------------------------

    def update(self, seed: int) -> None:
        """Let the trainer's model move."""
        self._on_engines("update", seed)

    def sync(self, mode: str | None = None, fault: Fault | None = None, keep: bool = False) -> dict[str, float]:
        """One sync.

        Returns:
            The plugin's measurements, without ``hybrid_lora/``.

        Raises:
            SyncRefused: the sync was not proven.
        """
        from ray.exceptions import RayError

        from hybrid_lora_plugin.verl_backend.sync_record import last_sync

        self._step += 1
        self._on_engines("configure", mode or self.sync_mode, fault, keep)
        try:
            self._get([worker.update_weights.remote(global_steps=self._step) for worker in self.workers])
        except RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise SyncRefused(lines[-1]) from None
        return self._get(self.workers[0].__ray_call__.remote(last_sync))

    def generate(self, prompt: list[int], tokens: int, **sampling) -> Any:
        """verl's ``TokenOutput`` for one prompt."""
        return self._get(self.server.generate.remote(prompt, {"max_tokens": tokens} | sampling, os.urandom(8).hex()))

    def difference(self, tokens: list[int]) -> float:
        """Largest difference of a prompt's log-probabilities between trainer and rollout engine."""
        theirs = self.generate(tokens, 1, prompt_logprobs=0).extra_fields["prompt_logprobs"]
        ours = self._on_engines("log_probs", tokens)[0]
        return max(abs(a - b[0]) for a, b in zip(ours, theirs, strict=False))

    def in_engine(self, function) -> list[Any]:
        """Run ``function(worker)`` in every vLLM worker; only with one worker, which lives in the server's process."""
        return self._get(self.server.collective_rpc.remote(function))

    def close(self) -> None:
        """End the replica's processes."""
        import ray

        for actor in [*self.replica.servers, *self.replica.workers]:
            ray.kill(actor, no_restart=True)
        self._loop.close()


def stop_ray() -> None:
    """End Ray and everything it started."""
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()
