"""vLLM without a server, which writes the responses of an evaluation."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import Subject, behaviour, rows

_FILE = "verl_backend/generation.py"

GENERATION = Subject(
    "Responses of an evaluation",
    (
        *rows("evaluation", "vllm", "", ("LLM", _FILE, "the engine", "tokenizer tensor_parallel_size dtype")),
        *rows(
            "evaluation",
            "vllm",
            "LLM",
            ("enqueue", _FILE, "takes requests without waiting for them", "prompts sampling_params lora_request"),
        ),
        *rows(
            "evaluation",
            "vllm.v1.engine.llm_engine",
            "LLMEngine",
            ("step", _FILE, "answers those that have ended"),
        ),
    ),
    (
        behaviour(
            "evaluation",
            _FILE,
            "`enqueue` answers the number of a request, with something behind a dash or without, and an output has it "
            "as `request_id`",
            "tests/test_evaluation_vllm.py::test_an_interruption_keeps_what_had_come_and_the_same_command_goes_on",
        ),
    ),
)
