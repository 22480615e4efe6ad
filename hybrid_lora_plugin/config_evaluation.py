"""The options of an evaluation: what is asked, how responses are drawn, and by which engine."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config_field import Bound, above, at_least, documented

#: in the order of the paper's Table 1, and GSM8K, which is not in it
EVALUATIONS = ("math500", "aime24", "aime25", "mmlu_pro", "gpqa", "leetcode", "gsm8k")
ENGINE_DTYPES = ("auto", "float32", "bfloat16", "float16")
_PLACES = (
    "JSONL, JSON arrays (both also `.gz`, `.zst`) or Parquet: files, folders, or `org/name:split` of the hub; empty "
    "takes the set from the hub."
)


@dataclass
class EvaluationDataConfig:
    """Where the problems of each benchmark are."""

    math500: list[str] = documented([], f"MATH-500. {_PLACES}", source="hub: HuggingFaceH4/MATH-500")
    aime24: list[str] = documented([], "AIME-24, likewise.", source="hub: HuggingFaceH4/aime_2024")
    aime25: list[str] = documented([], "AIME-25, likewise.", source="hub: math-ai/aime25")
    mmlu_pro: list[str] = documented([], "MMLU-Pro, likewise.", source="hub: TIGER-Lab/MMLU-Pro")
    gpqa: list[str] = documented([], "GPQA diamond, likewise; the hub asks for a token.", source="hub: Idavidrein/gpqa")
    leetcode: list[str] = documented([], "LeetCodeDataset, likewise.", source="hub: newfacade/LeetCodeDataset")
    gsm8k: list[str] = documented([], "GSM8K, likewise.", source="hub: openai/gsm8k")


@dataclass
class SamplingConfig:
    """How a token is drawn; nothing of it is taken from the model's generation_config.json."""

    temperature: float = documented(
        1.0, "Temperature; 0 takes the likeliest token.", source="paper §4.3", bound=at_least(0, "0 or more, e.g. 1.0")
    )
    top_p: float = documented(
        1.0,
        "Share of the likeliest tokens that is drawn from.",
        source="own choice: all of them, as in training",
        bound=Bound(lambda value: 0 < value <= 1, "a share above 0 and up to 1, e.g. 1.0"),
    )
    top_k: int = documented(
        -1,
        "How many of the likeliest tokens are drawn from; -1 is all.",
        source="verl default",
        unit="tokens",
        bound=Bound(lambda value: value == -1 or value >= 1, "-1 or at least 1"),
    )
    repetition_penalty: float = documented(
        1.0,
        "Above 1 makes tokens that have been written less likely.",
        source="own choice: none, as in training",
        bound=above(0, "above 0, e.g. 1.0"),
    )
    seed: int = documented(
        0,
        "Of all draws; each response has a seed of its own, which follows from this one, its problem and its number.",
        source="own choice",
        bound=at_least(0, "0 or more"),
    )


@dataclass
class EngineConfig:
    """The vLLM that generates."""

    dtype: str = documented("auto", "Of the weights; auto is the model's own.", source="vLLM", choices=ENGINE_DTYPES)
    tensor_parallel_size: int = documented(
        1, "GPUs that share one copy of the model.", source="vLLM", unit="GPUs", bound=at_least(1, "at least 1 GPU")
    )
    gpu_memory_utilization: float = documented(
        0.9,
        "Share of a GPU's memory for weights and keys and values; nothing on a CPU.",
        source="vLLM",
        unit="fraction",
        bound=Bound(lambda value: 0 < value <= 1, "a share above 0 and up to 1, e.g. 0.9"),
    )
    max_num_seqs: int = documented(
        256, "Responses written at once, at most.", source="vLLM", unit="rows", bound=at_least(1, "at least 1 row")
    )
    enforce_eager: bool = documented(
        False, "Start sooner and generate slower: no compilation, no CUDA graphs.", source="vLLM"
    )


@dataclass
class ScoringConfig:
    """How responses are judged; by the rewards of training."""

    code_seconds: float = documented(
        30.0,
        "CPU time of a program for all tests of its problem; by the clock it has three times that. One that takes "
        "longer is wrong and counted.",
        source="own choice: at 15 s two of LeetCodeDataset's own solutions end too late, at 30 s one",
        unit="s",
        bound=above(0, "above 0, e.g. 30"),
    )
    workers: int | None = documented(
        None,
        "Responses judged at once; null is one for each core.",
        source="own choice",
        bound=at_least(1, "at least 1, or null"),
    )
    unsandboxed_code: bool = documented(
        False,
        "Run programs that a model wrote with your rights where there is no sandbox; without it LeetCodeDataset is "
        "refused there.",
        source="own choice",
    )


@dataclass
class EvaluateCommandConfig:
    """What ``hybrid-lora-eval`` takes on the command line as ``key=value``."""

    model: str | None = documented(
        None,
        "What is evaluated: a Hugging Face folder or name, a folder that `hybrid-lora-export` wrote merged, or one "
        "with `format=adapter` (adapter and full weights). Null with `rescore` or `compare`.",
        source="none: this, `rescore` or `compare`",
    )
    output_dir: str | None = documented(
        None,
        "Folder for the responses and results; the same command continues there. With `compare` a new folder for the "
        "comparison, and null prints only.",
        source="none: must be given with `model`",
    )
    benchmarks: list[str] = documented(
        ["math500", "aime24", "aime25", "mmlu_pro", "gpqa", "leetcode"],
        f"What is asked: any of {', '.join(EVALUATIONS)}.",
        source="paper Table 1",
    )
    data: EvaluationDataConfig = documented(EvaluationDataConfig, "The problems.", source="the hub")
    prompt: str = documented(
        "cot",
        "`cot` asks for the steps before the answer, `io` for the answer alone.",
        source="paper §4.4",
        choices=("cot", "io"),
    )
    repeats: int | None = documented(
        None,
        "Times that each problem is tried with the k responses of its benchmark (k = 4 for AIME and LeetCodeDataset, "
        "1 for the others); null is 5 for AIME and 1 for the others.",
        source="paper Table 1: its AIME figures are multiples of 1/150",
        unit="repeats",
        bound=at_least(1, "at least 1, or null"),
    )
    limit: int | None = documented(
        None,
        "Ask the first so many problems of each benchmark only, for a try; the results say so.",
        source="own choice",
        unit="problems",
        bound=at_least(1, "at least 1 problem, or null"),
    )
    sampling: SamplingConfig = documented(SamplingConfig, "How a token is drawn.", source="paper §4.3")
    max_prompt_length: int = documented(
        4096,
        "Longest prompt; a longer one is not asked, counts as wrong and is counted.",
        source="own choice",
        unit="tokens",
        bound=at_least(1, "at least 1 token"),
    )
    max_response_length: int = documented(
        8192,
        "Longest response; one that is cut there is judged as it stands and counted.",
        source="own choice: the paper does not say",
        unit="tokens",
        bound=at_least(1, "at least 1 token"),
    )
    engine: EngineConfig = documented(EngineConfig, "vLLM.", source="vLLM")
    scoring: ScoringConfig = documented(ScoringConfig, "Judging.", source="own choice")
    label: str | None = documented(
        None, "What tables call this run, e.g. `GSPO Hybrid-LoRA`; null is the model's name.", source="own choice"
    )
    trust_remote_code: bool = documented(False, "Run model code from the checkpoint.", source="transformers")
    rescore: str | None = documented(
        None,
        "Folder of an earlier evaluation whose responses are judged again by the installed version, without a model.",
        source="own choice",
    )
    compare: list[str] = documented(
        [], "Two folders of evaluations of the same problems, A and B: is B better than A?", source="own choice"
    )
