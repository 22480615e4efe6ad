"""The paper's Table 1 (arXiv 2605.18822), the rows of one model size beside one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: benchmarks of its columns, in their order
COLUMNS = ("math500", "aime24", "aime25", "mmlu_pro", "gpqa", "leetcode")


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1.

    Attributes:
        approach: of post-training; IO and COT are without.
        method: the parameter-efficient approach.
        tunable: parameters, as printed.
        figures: %, in the order of ``COLUMNS``.
    """

    approach: str
    method: str
    tunable: str
    figures: tuple[float, ...]


def _rows(*lines: str) -> tuple[PaperRow, ...]:
    rows = []
    for line in lines:
        approach, method, tunable, *figures = (cell.strip() for cell in line.split("|"))
        rows.append(PaperRow(approach, method, tunable, tuple(map(float, figures[0].split()))))
    return tuple(rows)


_HYBRID = "Hybrid-LoRA (ours)"
TABLE_1: dict[str, tuple[PaperRow, ...]] = {
    "Qwen2.5 1.5B Instruct": _rows(
        "IO | – | 0 | 25.4 3.3 0.0 13.1 18.8 0.0",
        "COT | – | 0 | 56.8 14.7 10.7 20.6 34.1 14.6",
        "SFT | Full-FT | 1544M | 68.4 22.7 21.3 46.9 37.9 40.6",
        "GRPO | Full-FT (ref.) | 1544M | 80.6 40.0 36.7 55.6 37.2 48.3",
        "GRPO | AdaLoRA | 105M | 75.3 32.0 33.3 50.5 33.9 45.4",
        "GRPO | AutoLoRA | 106M | 77.4 34.7 31.3 52.1 34.4 45.7",
        "GRPO | LoRA-Drop | 105M | 76.8 34.0 32.0 53.2 35.1 46.3",
        f"GRPO | {_HYBRID} | 105M | 80.2 38.0 35.3 54.9 37.3 48.0",
        "GSPO | Full-FT (ref.) | 1544M | 82.0 42.0 37.3 56.8 38.7 49.1",
        "GSPO | LoRA-FFN | 122M | 79.2 34.0 30.7 53.1 36.3 44.5",
        "GSPO | AdaLoRA | 106M | 79.4 36.0 31.3 53.5 36.6 44.8",
        "GSPO | AutoLoRA | 107M | 80.2 35.3 32.7 54.9 37.1 45.2",
        "GSPO | LoRA-Drop | 105M | 79.8 40.0 34.0 54.7 36.9 44.7",
        f"GSPO | {_HYBRID} | 105M | 81.6 42.0 36.7 56.9 38.5 47.6",
    ),
    "Qwen2.5 3B Instruct": _rows(
        "COT | – | 0 | 77.2 24.0 20.6 40.4 50.3 40.2",
        "GRPO | Full-FT (ref.) | 3086M | 91.2 46.0 44.0 71.8 60.7 63.8",
        "GRPO | AutoLoRA | 201M | 89.6 40.7 38.7 69.3 58.4 59.6",
        f"GRPO | {_HYBRID} | 192M | 91.4 43.3 42.0 71.9 60.4 62.7",
        "GSPO | Full-FT (ref.) | 3086M | 92.4 49.3 47.3 73.4 62.1 65.1",
        "GSPO | AutoLoRA | 194M | 90.2 44.0 40.7 71.1 60.3 62.6",
        f"GSPO | {_HYBRID} | 192M | 91.8 48.0 45.3 72.9 61.6 64.0",
    ),
    "Qwen2.5 7B Instruct": _rows(
        "GRPO | AutoLoRA | 453M | 91.4 52.7 48.7 80.3 73.5 71.5",
        f"GRPO | {_HYBRID} | 449M | 93.6 56.0 52.0 83.1 76.3 73.2",
        "GSPO | AutoLoRA | 453M | 92.2 55.3 52.7 81.9 74.8 72.5",
        f"GSPO | {_HYBRID} | 449M | 94.4 60.0 55.3 83.8 77.9 74.5",
    ),
}

#: (hidden size, layers) of Qwen2.5's config.json
_SIZES = {
    (1536, 28): "Qwen2.5 1.5B Instruct",
    (2048, 36): "Qwen2.5 3B Instruct",
    (3584, 28): "Qwen2.5 7B Instruct",
}


def size_in_paper(config: Mapping[str, Any]) -> str | None:
    """Title of the part of Table 1 that a model belongs to; None where it has none.

    Args:
        config: of the model, as ``config.json`` has it. A base and an instruct model look alike there, and so does a
            fine-tuned one.
    """
    if config.get("model_type") != "qwen2":
        return None
    return _SIZES.get((config.get("hidden_size"), config.get("num_hidden_layers")))
