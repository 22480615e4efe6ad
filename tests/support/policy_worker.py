"""Runs by itself: a real vLLM in bfloat16 beside a hybrid model that has moved a little; writes what the check says.

``python tests/support/policy_worker.py OUT.json``; vLLM's engine lives in this process, without Ray.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.wire import MANIFEST, read_header
from hybrid_lora_plugin.verl_backend.receiver.logprob_check import Base, compare

LENGTH = 63
#: what moves and how far: two steps at rates for LoRA and for full modules, far below half a unit in the last place
CASES = {"the paper's rates": (2.5e-5, 1e-6), "LoRA alone": (2.5e-5, 0.0), "full modules alone": (0.0, 1e-5)}


def main(out: str) -> None:
    from vllm import LLM, SamplingParams

    from tests.support.hybrid_model_engine import HybridModelEngine
    from tests.support.sync_faults import make_inputs

    with tempfile.TemporaryDirectory() as folder:
        model, allocation = make_inputs(Path(folder))
        engine = LLM(str(model), dtype="bfloat16", enforce_eager=True, max_model_len=LENGTH + 1, max_num_seqs=8)
        trainer = HybridModelEngine(0, str(model), str(allocation), dtype="bfloat16", sync_check="logprobs")
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0)
    prompts = [tokens[:LENGTH] for tokens in trainer._prompts]

    def log_probs() -> list[list[float]]:
        engine.reset_prefix_cache()
        answers = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [
            [entry[token].logprob for token, entry in zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)]
            for tokens, answer in zip(prompts, answers, strict=True)
        ]

    live = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    base, seen = Base(trainer._prompts, log_probs()), {}
    for case, rates in CASES.items():
        trainer.train(2, *rates)
        for rounding in ("nearest", "stochastic"):
            trainer.begin_run("logprobs", rounding)
            (name, header), *sent = [(name, tensor.clone()) for name, tensor in trainer._stream()]
            live.load_weights((name, tensor) for name, tensor in sent if name != MANIFEST)
            try:
                prompt = read_header(name, header).fixed_prompt
                seen[f"{case}, {rounding}"] = compare(prompt, log_probs(), base, "bfloat16")
            except WeightSyncError as error:
                seen[f"{case}, {rounding}"] = {"error": str(error)}
    Path(out).write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
