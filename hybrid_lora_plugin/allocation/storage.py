"""The allocation on disk: a folder that says which modules are fully fine-tuned, and from what evidence.

    allocation.json                        the decision; all that training needs
    sensitivities.safetensors              everything measured, [T, M] or [M] float64, module names as metadata
    heatmap.png  scores.png  report.md     for people

Written to a temporary sibling and renamed, so a folder of that name is always complete. It holds no time
stamps: the same seed, data and versions give the same bytes. Read strictly: what is not understood is an
error that names the field.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid_lora_plugin.allocation.budget import FULL, LORA
from hybrid_lora_plugin.allocation.census import parameter_counts_of
from hybrid_lora_plugin.allocation.measurement_file import check_measurements, write_measurements
from hybrid_lora_plugin.allocation.strict_json import build, read_json
from hybrid_lora_plugin.allocation.validate import validate_allocation
from hybrid_lora_plugin.candidates import Candidate, architecture_of, model_fingerprint
from hybrid_lora_plugin.errors import AllocationError

SCHEMA_VERSION = 1
ALLOCATION_FILE = "allocation.json"
_PROBE_AGAIN = "probe again with hybrid-lora-probe"


@dataclass(frozen=True)
class ModelIdentity:
    """The model an allocation is for.

    Attributes:
        config_sha256: ``candidates.model_fingerprint``.
        candidate_parameters: weights and biases of all candidates.
        parameters: all parameters of the model, tied ones once; 0 in artifacts that do not record it.
    """

    name_or_path: str
    architecture: str
    config_sha256: str
    num_layers: int
    candidate_parameters: int
    parameters: int = 0


@dataclass(frozen=True)
class CriterionRecord:
    """The criterion with every setting that shaped the scores.

    Attributes:
        data: rows and split of the probe.
        options: settings of this criterion only, e.g. the seed of ``random``.
    """

    name: str
    direction: str
    normalise: str
    objective: str
    rank: int
    init: str
    warmup_steps: int
    lr: float
    partitions: int
    batch_size: int
    max_length: int
    dtype: str
    seed: int
    data: dict
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class BudgetRecord:
    """Budget asked (``ratio``), allowed (``limit``) and spent (``used``), in the unit of the mode.

    See ``budget.Assignment`` for the units, and for what ``ratio`` says in the modes that ask for none.
    """

    mode: str
    ratio: float
    overflow: str
    limit: int
    used: int


@dataclass(frozen=True)
class ModuleRecord:
    """One candidate with its moments over T batches (Eq. 15), its score and its assignment.

    ``in_features`` and ``out_features`` are 0 in artifacts that do not record them.
    """

    name: str
    layer: int
    type: str
    component: str
    parameters: int
    mean: float
    std: float
    score: float
    signal: bool
    assignment: str
    in_features: int = 0
    out_features: int = 0


@dataclass(frozen=True)
class Allocation:
    """A checked allocation, as written to and read from ``allocation.json``."""

    model: ModelIdentity
    criterion: CriterionRecord
    budget: BudgetRecord
    modules: list[ModuleRecord]
    environment: dict
    schema_version: int = SCHEMA_VERSION

    @property
    def full_names(self) -> list[str]:
        """Names of the fully fine-tuned modules, in model order."""
        return [module.name for module in self.modules if module.assignment == FULL]

    @property
    def lora_names(self) -> list[str]:
        """Names of the LoRA modules, in model order."""
        return [module.name for module in self.modules if module.assignment == LORA]

    @property
    def candidates(self) -> list[Candidate]:
        """The M modules as candidates, in model order."""
        return [
            Candidate(m.name, m.layer, m.type, m.component, m.parameters, m.in_features, m.out_features)
            for m in self.modules
        ]

    def check_model(self, config: Any, candidates: Sequence[Candidate]) -> None:
        """Refuse to be applied to a model other than the one that was probed.

        Args:
            config: the Hugging Face config of the model to train.
            candidates: ``find_candidates`` of that model.

        Raises:
            AllocationError: naming both models and the first difference.
        """
        architecture, fingerprint = architecture_of(config), model_fingerprint(config)
        mine = {module.name: module.parameters for module in self.modules}
        theirs = {candidate.name: candidate.parameters for candidate in candidates}
        if architecture != self.model.architecture:
            difference = f"architecture {self.model.architecture} against {architecture}"
        elif mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())
            difference = f"{len(mine)} modules against {len(theirs)}, {odd[0]} is in only one of them"
        elif mine != theirs:
            odd = next(name for name in mine if mine[name] != theirs[name])
            difference = f"{odd} has {mine[odd]:,} parameters against {theirs[odd]:,}"
        elif fingerprint != self.model.config_sha256:
            difference = f"config_sha256 {self.model.config_sha256[:12]} against {fingerprint[:12]}"
        else:
            return
        raise AllocationError(
            f"hybrid_lora.allocation: artifact of another model, made for {self.model.name_or_path!r} but used with "
            f"{getattr(config, '_name_or_path', '')!r}: {difference}; {_PROBE_AGAIN} on the model you train",
            see="allocation-of-another-model",
        )


def save_allocation(folder: str | Path, allocation: Allocation, measurements: Mapping[str, Tensor]) -> Path:
    """Write a complete artifact, or nothing.

    Args:
        folder: where to; it must not exist, or be an empty folder.
        allocation: the decision.
        measurements: everything measured by name, ``[T, M]`` or ``[M]``, columns in the order of
            ``allocation.modules``; may be empty.

    Returns:
        The folder.

    Raises:
        AllocationError: the folder holds something, cannot be written, or the pieces do not fit together.
    """
    from hybrid_lora_plugin.report.heatmap import draw_heatmap
    from hybrid_lora_plugin.report.page import write_report
    from hybrid_lora_plugin.report.score_plot import draw_scores

    folder = Path(folder)
    validate_allocation(allocation, ALLOCATION_FILE)
    check_measurements(measurements, len(allocation.modules))
    census = parameter_counts_of(allocation)
    refuse_existing(folder)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        payload = {"schema_version": allocation.schema_version} | asdict(allocation)
        text = json.dumps(payload, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (temporary / ALLOCATION_FILE).write_text(text, encoding="utf-8")
        write_measurements(temporary, allocation, measurements)
        draw_heatmap(allocation, temporary / "heatmap.png")
        draw_scores(allocation, temporary / "scores.png")
        write_report(allocation, census, temporary / "report.md")
        os.rename(temporary, folder)
    except OSError as error:
        raise AllocationError(f"output_dir: {folder} cannot be written ({error}); give another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def refuse_existing(folder: str | Path) -> None:
    """Raise ``AllocationError`` if an artifact cannot be put at ``folder`` without overwriting something."""
    folder = Path(folder)
    if (folder / ALLOCATION_FILE).exists():
        raise AllocationError(f"output_dir: {folder} holds an allocation already; give another folder or delete it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AllocationError(f"output_dir: {folder} exists and is not an empty folder; give a new folder")


def load_allocation(path: str | Path) -> Allocation:
    """Read and check an allocation.

    Args:
        path: the artifact's folder, or its ``allocation.json``.

    Raises:
        AllocationError: missing, not JSON, unknown version, an unknown, missing, mistyped or contradictory field.
    """
    path = Path(path)
    file = path / ALLOCATION_FILE if path.is_dir() else path
    payload = read_json(file)
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise AllocationError(
            f"{file}: schema_version: {version!r}, {SCHEMA_VERSION} is wanted; {_PROBE_AGAIN}, or install the "
            f"version of hybrid_lora_plugin that wrote it"
        )
    allocation = build(Allocation, payload, file=str(file))
    validate_allocation(allocation, str(file))
    return allocation
