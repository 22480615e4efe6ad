"""The whole artifact of a selection: what training reads, and what people read.

allocation.json  sensitivities.safetensors    see ``allocation.storage``
heatmap.png  scores.png  trial.png  report.md    for people
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.storage import refuse_existing, write_allocation
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.files import complete_folder
from hybrid_lora_plugin.report.heatmap import draw_heatmap
from hybrid_lora_plugin.report.page import write_report
from hybrid_lora_plugin.report.score_plot import draw_scores
from hybrid_lora_plugin.report.trial_plot import draw_trial


def save_allocation(folder: str | Path, allocation: Allocation, measurements: Mapping[str, Tensor]) -> Path:
    """Write a complete artifact, or nothing.

    Args:
        folder: where to; it must not exist, or be an empty folder.
        allocation: what was selected.
        measurements: everything measured by name, ``[T, M]`` or ``[M]``, columns in the order of
            ``allocation.modules``; may be empty.

    Returns:
        The folder.

    Raises:
        AllocationError: the folder holds something, cannot be written, or the pieces do not fit together.
    """
    folder = Path(folder)
    refuse_existing(folder)
    try:
        with complete_folder(folder) as unfinished:
            write_allocation(unfinished, allocation, measurements)
            draw_heatmap(allocation, unfinished / "heatmap.png")
            draw_scores(allocation, unfinished / "scores.png")
            draw_trial(allocation.trial, unfinished / "trial.png")
            write_report(allocation, unfinished / "report.md")
    except OSError as error:
        raise AllocationError(f"output_dir: {folder} cannot be written ({error}); give another folder") from error
    return folder
