"""What ``hybrid-lora-data`` takes."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config_field import Bound, at_least, documented

#: Sets that it prepares: one for training, and the evaluation sets of ``tasks.benchmarks``.
DATA_SETS = ("mixture_of_thoughts", "gsm8k", "math500", "aime24", "aime25", "mmlu_pro", "gpqa", "leetcode")
DATA_FORMATS = ("rl", "sft")
PROMPT_STYLES = ("cot", "io")


@dataclass
class DataCommandConfig:
    """What ``hybrid-lora-data`` takes on the command line as ``key=value``."""

    set: str = documented("", "Data set to prepare.", source="none: must be given", choices=("", *DATA_SETS))
    source: str | None = documented(
        None,
        "Where its rows are: a file, a pattern or a folder as in `probe.files`, a `.csv`, or "
        "`org/name[/configuration]:split`; of Mixture-of-Thoughts the folder that holds its parts. null: the set on "
        "the hub.",
        source="own choice",
    )
    output_dir: str | None = documented(
        None, "New folder for the files and their datasheet; must not hold another one.", source="none: must be given"
    )
    format: str = documented(
        "rl",
        "`rl`: verl's rows for reinforcement learning, with an answer that can be checked; `sft`: whole conversations, "
        "for the probe and verl's SFT (Mixture-of-Thoughts and GSM8K).",
        source="own choice",
        choices=DATA_FORMATS,
    )
    configs: list[str] = documented(
        ["all"],
        "Parts of Mixture-of-Thoughts: `math`, `code`, `science`, or `all` for the three.",
        source="own choice",
        bound=Bound(
            lambda value: value == ["all"] or (bool(value) and {*value} <= {"math", "code", "science"}),
            "parts such as [math,science], or all",
        ),
    )
    prompt: str = documented(
        "cot",
        "How a problem is asked: `cot` asks for the steps before the answer, `io` for the answer alone. Conversations "
        "of Mixture-of-Thoughts stay as they are.",
        source="paper §4.4",
        choices=PROMPT_STYLES,
    )
    validation: float = documented(
        0.005,
        "Share of questions held out as `validation.parquet`, by a hash of the question: the same ones whatever the "
        "order, the limit and the other options; 0 holds out none. A set that is for evaluation only has none.",
        source="own choice: about 500 of the 93,733 of math",
        bound=Bound(lambda value: 0 <= value < 1, "a share in [0, 1), e.g. 0.005"),
    )
    decontaminate: list[str] = documented(
        ["auto"],
        "Evaluation sets whose questions are left out: `NAME` from the hub, or `NAME=FILE`. `auto`: all of them for "
        "Mixture-of-Thoughts, else the set's own test split. `[]`: none.",
        source="own choice",
    )
    ngram: int = documented(
        13,
        "Words in a row that a question must not share with one of those sets. The same question is left out however "
        "short.",
        source="GPT-3 (arXiv 2005.14165, appendix C)",
        unit="words",
        bound=at_least(4, "at least 4 words, e.g. 13"),
    )
    evaluation: list[str] = documented(
        [],
        "Evaluation sets to write as `test_NAME.parquet` for `data.val_files`: `NAME` from the hub, or `NAME=FILE`; "
        "with `format=rl`.",
        source="own choice",
    )
    code_tests: str | None = documented(
        "newfacade/LeetCodeDataset:train",
        "Rows of LeetCodeDataset that lend their tests to the same questions in the part `code`; null drops that part "
        "whole.",
        source="own choice: Mixture-of-Thoughts has no tests",
    )
    limit: int | None = documented(
        None,
        "Most rows that are read of each part; null: all.",
        source="own choice",
        unit="rows",
        bound=at_least(1, "at least 1 row, or null"),
    )
    seed: int = documented(0, "Of what is held out, and of the order of GPQA's options.", source="own choice")
