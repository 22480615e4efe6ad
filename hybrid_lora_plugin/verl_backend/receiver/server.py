"""verl's vLLM server under Hybrid-LoRA: it generates from proven weights only (verl 0.9.1
``workers/rollout/vllm_rollout/vllm_async_server.py``).

verl's server forgets the answers of its workers, ignores a prefix cache that could not be reset, and generates from
the bare base model when an adapter is missing. This subclass does none of that, and sleeps only as deeply as the
next sync can restore.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.verl_backend.fixed_prompts import fixed_prompts
from hybrid_lora_plugin.verl_backend.receiver.logprob_check import Base, compare

WORKER_EXTENSION = "hybrid_lora_plugin.verl_backend.receiver.worker.HybridLoraWorkerExtension"


class HybridLoraHttpServer(vLLMHttpServer):
    """verl's server actor with a lock on generation while weights are not proven."""

    #: what ``patches.refuse_plain_servers`` looks for
    proves_its_weights = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._hybrid = self.model_config.lora["hybrid"]
        self._mode = sync_mode(self._hybrid["sync"])
        self._limit = float(self._hybrid["sync_timeout"])
        self._unproven = "no weights have been synced yet"
        #: fixed prompts that have still to be compared with the trainer
        self._fixed_prompt: dict[str, Any] = {}
        #: log-probabilities of the base model, from before the first sync
        self._base: Base | None = None
        #: what the last comparison measured
        self._compared: dict[str, float] = {}
        self._synced = False
        self._kv_cache_released = False

    def _get_worker_extension_cls(self) -> str:
        return WORKER_EXTENSION

    def _resolve_sleep_level(self) -> int:
        # Level 2 throws weights away, and not every mode's syncs bring them all back.
        return 1 if self._mode.engine_keeps_weights else super()._resolve_sleep_level()

    async def launch_server(self, *args, **kwargs):
        await super().launch_server(*args, **kwargs)
        if self.node_rank == 0 and self._hybrid["sync_check"] == "logprobs":
            await self._look_at_base()

    async def _look_at_base(self) -> None:
        """Log-probabilities of the fixed prompts under the weights that the engine has loaded itself.

        Now, because verl may put it to sleep before the first sync; and that one already has an update in it where a
        run resumes.
        """
        if self.config.load_format not in (None, "auto", "safetensors"):
            print(
                "hybrid_lora: sync_check=logprobs cannot judge the policy, only the present log-probabilities: with "
                f"actor_rollout_ref.rollout.load_format={self.config.load_format} the rollout engine never holds the "
                "base model; give safetensors",
                flush=True,
            )
            return
        tokens = fixed_prompts(self.model_config.tokenizer, self._hybrid["sync_texts"])
        limit = max(self._limit, float(self._hybrid["first_sync_timeout"]))
        self._base = Base(tokens, await asyncio.wait_for(self._log_probs(tokens, adapter=False), limit))

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        """As verl's, and returns what the workers returned, one item each."""
        return await self.engine.collective_rpc(method=method, timeout=timeout, args=args, kwargs=kwargs)

    async def _forget_old_weights(self) -> None:
        """Reset the caches; verl's own call does not look at what vLLM answers.

        The prefix cache is keyed by an adapter's name, not by its values: old blocks would be used with new weights.
        """
        # Asked for a connector that does not exist, some versions of vLLM answer False.
        connector = getattr(self.engine.vllm_config, "kv_transfer_config", None) is not None
        if self.node_rank == 0 and not await self.engine.reset_prefix_cache(reset_connector=connector):
            raise WeightSyncError(
                "the rollout engine could not reset its prefix cache because requests still hold blocks of it; they "
                "would continue on new weights with values computed by the old ones",
                see="prefix-cache-not-reset",
            )
        await self.clear_kv_cache()

    # -- one sync ---------------------------------------------------------------------------------------------

    async def begin_weight_sync(self, step: int | None) -> None:
        """From here on nothing is generated until ``end_weight_sync``."""
        self._unproven = f"the weight sync of step {step} has not been completed"
        self._fixed_prompt = {}

    async def end_weight_sync(self, step: int | None, prompt: dict[str, Any]) -> dict[str, float]:
        """The weights of this sync are proven on every worker.

        Args:
            step: verl's global step of the weights.
            prompt: ``SyncHeader.fixed_prompt``, to compare with before the first request; {} for none.

        Returns:
            Metrics of the last comparison, {} if there was none.
        """
        await self._forget_old_weights()
        if self.lora_as_adapter and VLLM_LORA_INT_ID not in await self.engine.list_loras():
            raise WeightSyncError(
                "the adapter was loaded, but the rollout engine does not list it", see="adapter-not-held-by-the-engine"
            )
        if step is not None:
            await self.set_global_steps(step)
        self._fixed_prompt, self._synced = prompt, True
        self._unproven = "the log-probabilities of a fixed prompt have not been compared yet" if prompt else ""
        await self._compare_fixed_prompt()
        return self._compared

    async def _compare_fixed_prompt(self, resumed: bool = False) -> None:
        """Compare the fixed prompts as soon as the engine can generate; it cannot asleep or paused."""
        if not self._fixed_prompt or self._kv_cache_released or (self._submission_paused and not resumed):
            return
        prompt, self._fixed_prompt = self._fixed_prompt, {}
        ours = await asyncio.wait_for(self._log_probs(prompt["tokens"], self.lora_as_adapter), self._limit)
        self._unproven = "the log-probabilities of a fixed prompt differ from the trainer's"
        self._compared = compare(prompt, ours, self._base, self.config.dtype)
        # Its blocks stay in the prefix cache: they are of these weights.
        self._unproven = ""

    async def _log_probs(self, prompts: list[list[int]], adapter: bool) -> list[list[float]]:
        """Log-probability of every token of each prompt but the first, of as many as fit the engine."""
        return await asyncio.gather(*(self._prompt_log_probs(tokens, adapter) for tokens in prompts))

    async def _prompt_log_probs(self, tokens: list[int], adapter: bool) -> list[float]:
        # A token is always generated, too.
        tokens = tokens[: self.config.max_model_len - 1]
        request = None
        if adapter:
            request = LoRARequest(lora_name=VLLM_LORA_NAME, lora_int_id=VLLM_LORA_INT_ID, lora_path=VLLM_LORA_PATH)
        stream = self.engine.generate(
            prompt=TokensPrompt(prompt_token_ids=tokens),
            sampling_params=SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0),
            request_id=f"hybrid-lora-logprobs-{uuid.uuid4().hex}",
            lora_request=request,
        )
        result = None
        async for output in stream:
            result = output
        return [entry[token].logprob for token, entry in zip(tokens[1:], result.prompt_logprobs[1:], strict=True)]

    # -- verl's calls that put the engine to sleep, wake it, and use it -------------------------------------------

    async def sleep(self):
        # Before, so that no request is admitted while weights go.
        self._falls_asleep()
        await super().sleep()

    async def release_kv_cache(self):
        self._falls_asleep()
        await super().release_kv_cache()

    def _falls_asleep(self) -> None:
        if self.config.free_cache_engine and self.config.enable_sleep_mode:
            self._kv_cache_released = True
            if self._resolve_sleep_level() == 2:
                self._unproven = "its weights were discarded by a sleep, and no sync has brought them back"

    async def wake_up(self, tags: list[str] | None = None):
        await super().wake_up(tags)
        if tags is None or "kv_cache" in tags:
            self._kv_cache_released = False
            await self._compare_fixed_prompt()

    async def resume_kv_cache(self):
        await super().resume_kv_cache()
        self._kv_cache_released = False
        await self._compare_fixed_prompt()

    async def resume_engine_generation(self):
        await super().resume_engine_generation()
        await self._compare_fixed_prompt(resumed=True)

    async def generate(self, *args, **kwargs):
        # Where requests have to wait, verl looks for the adapter before they do, and without one would run none. Where
        # they need not wait, an engine that has stopped would never answer that question.
        refused_now = self._unproven and not self._submission_paused
        if refused_now or (self.lora_as_adapter and not self._synced):
            raise WeightSyncError(
                f"the rollout engine generates nothing: {self._unproven}", see="nothing-generated-from-unproven-weights"
            )
        return await super().generate(*args, **kwargs)

    async def _park_until_admitted(self, request_id: str):
        # Not earlier: a request that comes while verl holds the gate closed waits there for the sync to end.
        rejected = await super()._park_until_admitted(request_id)
        if rejected is None and self._unproven:
            # verl has counted the request as admitted.
            self._admitting -= 1
            raise WeightSyncError(
                f"the rollout engine generates nothing: {self._unproven}", see="nothing-generated-from-unproven-weights"
            )
        return rejected


class HybridLoraReplica(vLLMReplica):
    """verl's replica; its servers are ours where the model asks for Hybrid-LoRA, verl's own elsewhere."""

    def __init__(self, replica_rank, config, model_config, *args, **kwargs):
        super().__init__(replica_rank, config, model_config, *args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model) and (model_config.get("lora") or {}).get("hybrid"):
            self.server_class = ray.remote(HybridLoraHttpServer)
