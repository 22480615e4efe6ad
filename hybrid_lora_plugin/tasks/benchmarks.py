"""The evaluation sets by name: where the hub has them, and how their rows become problems.

Names and columns follow the cards of the sets; no test asks the hub for them. The sets of numbers and expressions are
also read in the plain form ``prompt``, ``answer`` that many repositories keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError, RowError
from hybrid_lora_plugin.tasks import schemas
from hybrid_lora_plugin.tasks.problem import Problem
from hybrid_lora_plugin.tasks.schemas import Schema


@dataclass(frozen=True)
class Benchmark:
    """An evaluation set.

    Attributes:
        name: as an option and a file name.
        title: as a table's head.
        source: ``Problem.source``, whatever copy of the set is read; verl's column ``data_source``.
        kinds: what its problems are, of ``problem.KINDS``.
        rows: of the set as it is published.
        hub: its problems on the hub, as ``org/name[/configuration]:split``.
        schemas: ways in which it is published; the first that a row has the columns of is read.
        train: its training split on the hub, of the same schema; None where there is none.
        gated: whether the hub asks for an agreement and a token.
        also: other places on the hub with the same problems.
    """

    name: str
    title: str
    source: str
    kinds: tuple[str, ...]
    rows: int
    hub: tuple[str, ...]
    schemas: tuple[Schema, ...]
    train: str | None = None
    gated: bool = False
    also: tuple[str, ...] = ()

    def problem(self, row: Mapping[str, Any], *, seed: int = 0) -> Problem:
        """A row as a problem.

        Args:
            row: column -> value, as the hub or a file has it.
            seed: of the order of options, where the set gives none (GPQA).

        Raises:
            RowError: the row has no question, no answer or one of another kind; or it is of no known schema, with
                the reason ``other columns``.
        """
        for schema in self.schemas:
            if all(column in row for column in schema.columns):
                return schema.read(self.source, row, seed)
        wanted = " or ".join(" + ".join(f"`{column}`" for column in schema.columns) for schema in self.schemas)
        raise RowError(
            "other columns", f"{self.title}: a row with the columns {sorted(map(str, row))}; wanted {wanted}"
        )


def _sets() -> tuple[Benchmark, ...]:
    kept = ("prompt", "answer")
    aime_kept = Schema(kept, schemas.contest_integer("prompt"))
    return (
        Benchmark(
            "gsm8k",
            "GSM8K",
            "openai/gsm8k",
            ("integer", "math"),
            1_319,
            ("openai/gsm8k/main:test",),
            (Schema(("question", "answer"), schemas.gsm8k), Schema(kept, schemas.kept_gsm8k)),
            train="openai/gsm8k/main:train",
        ),
        Benchmark(
            "math500",
            "MATH-500",
            "HuggingFaceH4/MATH-500",
            ("math",),
            500,
            ("HuggingFaceH4/MATH-500:test",),
            (
                Schema(("problem", "answer"), schemas.expression(identity="unique_id", metadata=("subject", "level"))),
                Schema(kept, schemas.expression("prompt")),
            ),
        ),
        Benchmark(
            "aime24",
            "AIME-24",
            "HuggingFaceH4/aime_2024",
            ("integer",),
            30,
            ("HuggingFaceH4/aime_2024:train",),
            (
                Schema(("problem", "answer"), schemas.contest_integer(identity="id", metadata=("year",))),
                Schema(("Problem", "Answer"), schemas.contest_integer("Problem", "Answer", identity="ID")),
                Schema(("problem", "solution"), schemas.contest_integer(answer="solution", identity="id")),
                aime_kept,
            ),
            also=("Maxwell-Jia/AIME_2024:train", "math-ai/aime24:test"),
        ),
        Benchmark(
            "aime25",
            "AIME-25",
            "math-ai/aime25",
            ("integer",),
            30,
            ("math-ai/aime25:test",),
            (
                Schema(("problem", "answer"), schemas.contest_integer(identity="id", metadata=("year",))),
                Schema(("question", "answer"), schemas.contest_integer("question")),
                aime_kept,
            ),
            also=(
                "opencompass/AIME2025/AIME2025-I:test",
                "opencompass/AIME2025/AIME2025-II:test",
                "yentinglin/aime_2025:train",
            ),
        ),
        Benchmark(
            "mmlu_pro",
            "MMLU-Pro",
            "TIGER-Lab/MMLU-Pro",
            ("letter",),
            12_032,
            ("TIGER-Lab/MMLU-Pro:test",),
            (Schema(("question", "options", "answer", "answer_index"), schemas.mmlu_pro),),
        ),
        Benchmark(
            "gpqa",
            "GPQA diamond",
            "Idavidrein/gpqa",
            ("letter",),
            198,
            ("Idavidrein/gpqa/gpqa_diamond:train",),
            (Schema(("Question", "Correct Answer", "Incorrect Answer 1"), schemas.gpqa),),
            gated=True,
        ),
        Benchmark(
            "leetcode",
            "LeetCodeDataset",
            "newfacade/LeetCodeDataset",
            ("code",),
            228,
            ("newfacade/LeetCodeDataset:test",),
            (
                Schema(("problem_description", "starter_code", "test", "entry_point"), schemas.leetcode),
                Schema(("query", "test", "entry_point"), schemas.early_leetcode),
            ),
            train="newfacade/LeetCodeDataset:train",
        ),
    )


#: Name -> evaluation set, in the order of the paper's Table 1 with GSM8K before.
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _sets()}


def benchmark(name: str, option: str = "benchmark") -> Benchmark:
    """The evaluation set of a name.

    Args:
        name: e.g. ``math500``.
        option: where the user gave it, for the error.

    Raises:
        ConfigurationError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise ConfigurationError(f"{option}: {name!r} is no evaluation set; give one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
