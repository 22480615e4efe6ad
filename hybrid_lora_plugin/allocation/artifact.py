"""The allocation on disk: a folder that says which modules are fully fine-tuned, and from what evidence.

    allocation.json              the decision; all that training needs
    sensitivities.safetensors    tensor ``sensitivities`` [T, M] float64, module names as metadata
    heatmap.png  report.md       for people

Written to a temporary sibling and renamed, so a folder of that name is always complete. It holds no time
stamps: the same seed, data and versions give the same bytes. Read strictly: what is not understood is an
error that names the field.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.budget import FULL, LORA, budget_limit
from hybrid_lora_plugin.allocation.errors import AllocationError
from hybrid_lora_plugin.allocation.strict_json import build, read_json
from hybrid_lora_plugin.candidates import COMPONENT_OF_TYPE, Candidate, architecture_of, model_fingerprint

SCHEMA_VERSION = 1
ALLOCATION_FILE = "allocation.json"
SENSITIVITIES_FILE = "sensitivities.safetensors"
_PROBE_AGAIN = "probe again with hybrid-lora-probe"


@dataclass(frozen=True)
class ModelIdentity:
    """The model an allocation is for; ``config_sha256`` is ``candidates.model_fingerprint``."""

    name_or_path: str
    architecture: str
    config_sha256: str
    num_layers: int
    candidate_parameters: int


@dataclass(frozen=True)
class CriterionRecord:
    """The criterion with every setting that shaped the scores; ``data`` describes rows and split."""

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


@dataclass(frozen=True)
class BudgetRecord:
    """Budget asked (``ratio``), allowed (``limit``) and spent (``used``), in parameters."""

    mode: str
    ratio: float
    overflow: str
    limit: int
    used: int


@dataclass(frozen=True)
class ModuleRecord:
    """One candidate with its moments over T batches (Eq. 15), its score and its assignment."""

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
            f"{getattr(config, '_name_or_path', '')!r}: {difference}; {_PROBE_AGAIN} on the model you train"
        )


def check_allocation(allocation: Allocation, where: str) -> None:
    """Refuse an allocation that contradicts itself.

    Args:
        allocation: what to check.
        where: file name for the messages.

    Raises:
        AllocationError: naming the field, the value and the way out.
    """

    def require(ok: bool, field: str, message: str) -> None:
        if not ok:
            raise AllocationError(f"{where}: {field}: {message}; {_PROBE_AGAIN}")

    model, budget, modules = allocation.model, allocation.budget, allocation.modules
    require(bool(modules), "modules", "empty, at least one module is wanted")
    seen: set[str] = set()
    for index, module in enumerate(modules):
        field = f"modules[{index}]"
        require(module.name not in seen, field, f"duplicate module {module.name!r}")
        seen.add(module.name)
        require(
            module.assignment in (FULL, LORA),
            f"{field}.assignment",
            f"{module.assignment!r} for {module.name}, {FULL!r} or {LORA!r} is wanted",
        )
        require(module.type in COMPONENT_OF_TYPE, f"{field}.type", f"{module.type!r} is unknown")
        require(
            module.component == COMPONENT_OF_TYPE[module.type],
            f"{field}.component",
            f"{module.component!r} for a {module.type}, {COMPONENT_OF_TYPE[module.type]!r} is wanted",
        )
        require(
            0 <= module.layer < model.num_layers,
            f"{field}.layer",
            f"{module.layer} for {module.name}, 0 to {model.num_layers - 1} is wanted",
        )
        require(module.parameters > 0, f"{field}.parameters", f"{module.parameters}, more than 0 is wanted")
    total = sum(module.parameters for module in modules)
    used = sum(module.parameters for module in modules if module.assignment == FULL)
    require(
        total == model.candidate_parameters,
        "model.candidate_parameters",
        f"{model.candidate_parameters:,} but the modules add up to {total:,}",
    )
    require(0 < budget.ratio <= 1, "budget.ratio", f"{budget.ratio}, a fraction in (0, 1] is wanted")
    limit = budget_limit(total, budget.ratio)
    require(budget.limit == limit, "budget.limit", f"{budget.limit:,} but ratio {budget.ratio} allows {limit:,}")
    require(budget.used == used, "budget.used", f"{budget.used:,} but the full modules add up to {used:,}")
    require(used <= limit, "budget.used", f"{used:,} exceeds the limit of {limit:,}")


def save_allocation(folder: str | Path, allocation: Allocation, sensitivities: Tensor, census: Any) -> Path:
    """Write a complete artifact, or nothing.

    Args:
        folder: where to; it must not exist, or be an empty folder.
        allocation: the decision.
        sensitivities: ``[T, M]``, columns in the order of ``allocation.modules``.
        census: ``report.Census`` of the model under this allocation.

    Returns:
        The folder.

    Raises:
        AllocationError: the folder holds something, cannot be written, or the pieces do not fit together.
    """
    from safetensors.torch import save_file

    from hybrid_lora_plugin.allocation.heatmap import draw_heatmap
    from hybrid_lora_plugin.allocation.report import write_report

    folder = Path(folder)
    check_allocation(allocation, ALLOCATION_FILE)
    if sensitivities.ndim != 2 or sensitivities.shape[1] != len(allocation.modules):
        raise AllocationError(
            f"sensitivities: shape {list(sensitivities.shape)}; give [T, {len(allocation.modules)}], a column a module"
        )
    refuse_existing(folder)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        payload = {"schema_version": allocation.schema_version} | asdict(allocation)
        text = json.dumps(payload, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (temporary / ALLOCATION_FILE).write_text(text, encoding="utf-8")
        # One metadata key only: the order of several is not fixed, and with it the bytes.
        names = json.dumps([module.name for module in allocation.modules])
        save_file(
            {"sensitivities": sensitivities.double().cpu().contiguous()},
            temporary / SENSITIVITIES_FILE,
            metadata={"modules": names},
        )
        draw_heatmap(allocation, temporary / "heatmap.png")
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
    check_allocation(allocation, str(file))
    return allocation


def load_sensitivities(folder: str | Path, allocation: Allocation) -> Tensor:
    """The raw sensitivities of an artifact ``[T, M]``, columns in the order of ``allocation.modules``.

    Raises:
        AllocationError: the file is missing, unreadable or about other modules.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / SENSITIVITIES_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            names = json.loads((tensors.metadata() or {}).get("modules", "[]"))
            values: torch.Tensor = tensors.get_tensor("sensitivities")
    except (OSError, SafetensorError, ValueError) as error:
        raise AllocationError(f"{file}: cannot be read ({error}); {_PROBE_AGAIN}") from error
    if names != [module.name for module in allocation.modules] or values.shape[1:] != (len(names),):
        raise AllocationError(f"{file}: does not list the modules of {ALLOCATION_FILE}; {_PROBE_AGAIN}")
    return values
