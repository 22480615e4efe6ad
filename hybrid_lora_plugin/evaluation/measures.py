"""How each benchmark is measured, after the paper's §4.2 and Table 1."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config_evaluation import EVALUATIONS


@dataclass(frozen=True)
class Measure:
    """What a benchmark's figure is.

    Attributes:
        title: of its column in Table 1.
        k: responses of which any may be right.
        name: of the figure, as the paper has it.
        repeats: by default.
    """

    title: str
    k: int = 1
    name: str = "pass@1"
    repeats: int = 1


MEASURES: dict[str, Measure] = {
    "math500": Measure("Math-500"),
    # Five, as the paper's figures are multiples of 1/150: with 30 problems one repeat says next to nothing.
    "aime24": Measure("AIME-24", 4, "pass@4", 5),
    "aime25": Measure("AIME-25", 4, "pass@4", 5),
    "mmlu_pro": Measure("MMLU-Pro", name="Accuracy"),
    "gpqa": Measure("GPQA", name="Accuracy"),
    "leetcode": Measure("LeetCodeDataset", 4, "pass@4"),
    "gsm8k": Measure("GSM8K"),
}
assert tuple(MEASURES) == EVALUATIONS
