"""The probe from command to artifact (paper Algorithm 1, then the selection of Algorithm 2).

Deterministic by seed, and interruptible: the state is saved at least every half minute, and a resumed run
ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lora_plugin import __version__
from hybrid_lora_plugin.allocation.artifact import (
    Allocation,
    BudgetRecord,
    CriterionRecord,
    ModelIdentity,
    ModuleRecord,
    refuse_existing,
    save_allocation,
)
from hybrid_lora_plugin.allocation.budget import allocate
from hybrid_lora_plugin.allocation.report import Census
from hybrid_lora_plugin.candidates import Candidate, architecture_of, find_candidates, model_fingerprint
from hybrid_lora_plugin.config import ProbeCommandConfig, validate
from hybrid_lora_plugin.probing.data import ProbeData
from hybrid_lora_plugin.probing.errors import ProbeError
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted, StopRequest
from hybrid_lora_plugin.probing.loading import load_model, load_tokenizer
from hybrid_lora_plugin.probing.progress import Progress
from hybrid_lora_plugin.probing.score import batch_sensitivities, draw_partition, prepare_scoring
from hybrid_lora_plugin.probing.state import PartialState
from hybrid_lora_plugin.probing.svd_lora import SvdLoraLinear, attach
from hybrid_lora_plugin.probing.warmup import Warmup, check_trained
from hybrid_lora_plugin.scoring import get_criterion, has_signal, moments

SAVE_EVERY_SECONDS = 30.0


def run_probe(config: ProbeCommandConfig, progress: Progress | None = None) -> Path:
    """Probe a model and write its allocation.

    Args:
        config: what ``hybrid-lora-probe`` takes.
        progress: where to report; silent by default.

    Returns:
        The artifact's folder, ``config.output_dir``.

    Raises:
        ConfigurationError: a setting, the data or the model cannot be used.
        ProbeInterrupted: SIGINT or SIGTERM came; the same call continues where it stopped.
    """
    progress = progress or Progress()
    validate(config)
    for field, value, example in (
        ("model.path", config.model.path, "model.path=Qwen/Qwen2.5-1.5B-Instruct"),
        ("output_dir", config.output_dir, "output_dir=outputs/probe"),
    ):
        if not value:
            raise ProbeError(f"{field}: nothing given; give it, e.g. {example}")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ProbeError(
            f"WORLD_SIZE: {ranks} processes were started, the probe runs on one; start it without torchrun"
        )
    output_dir = Path(config.output_dir)
    refuse_existing(output_dir)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The data first: a mistake there is found before the weights are read.
    data = ProbeData(config.probe, load_tokenizer(config.model))
    if data.dropped:
        progress.note(
            f"{data.dropped} rows left out: no response token within probe.max_length={config.probe.max_length}"
        )
    model = load_model(config.model, device)
    candidates = find_candidates(model)
    progress.note(
        f"{architecture_of(model.config)}: {len(candidates)} candidate modules, "
        f"{sum(candidate.parameters for candidate in candidates):,} parameters, {model.dtype} on {device}"
    )
    state = PartialState(output_dir, _settings(config, model, data))
    with _deterministic(device):
        layers = attach(model, candidates, config.lora.rank, config.probe.seed)
        with StopRequest() as stop:
            _warm_up(config, model, layers, data, device, state, progress, stop)
            check_trained(layers)
            sensitivities = _score(config, model, layers, data, device, state, progress, stop)
    allocation = decide(config, model, candidates, sensitivities, data.record)
    save_allocation(output_dir, allocation, sensitivities, census(model, layers, allocation))
    state.delete()
    return output_dir


def _settings(config: ProbeCommandConfig, model: nn.Module, data: ProbeData) -> dict[str, Any]:
    """What the sensitivities depend on. The budget and the direction do not count: they come after.

    In the order in which a difference is reported: with equal settings and files, other tokens can only
    come from another tokenizer.
    """
    probe = {f"probe.{name}": value for name, value in vars(config.probe).items() if name != "files"}
    files = [f"{file['name']}, {file['rows']} rows, sha256 {file['sha256']}" for file in data.record["files"]]
    return probe | {
        "model.path": config.model.path,
        "model.config": model_fingerprint(model.config),
        "model.dtype": str(model.dtype),
        "lora.rank": config.lora.rank,
        "probe.files": files,
        "model.tokenizer": data.record["tokens_sha256"],
    }


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on an accelerator; those of the CPU are so already."""
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Saver:
    """Saves when half a minute has passed, and when asked to stop; then raises."""

    def __init__(self, state: PartialState, stop: StopRequest, save: Callable[[], None]) -> None:
        self._state, self._stop, self._save = state, stop, save
        self._last = time.monotonic()

    def __call__(self, finished: bool) -> None:
        stopping = self._stop.signum is not None
        if finished or stopping or time.monotonic() - self._last >= SAVE_EVERY_SECONDS:
            self._save()
            self._last = time.monotonic()
        if stopping:
            raise ProbeInterrupted(self._state.folder, self._stop.signum)


def _warm_up(
    config: ProbeCommandConfig,
    model: nn.Module,
    layers: dict[str, SvdLoraLinear],
    data: ProbeData,
    device: torch.device,
    state: PartialState,
    progress: Progress,
    stop: StopRequest,
) -> None:
    """Take the warm-up steps that are still missing."""
    warmup = Warmup(model, layers, config.probe.lr)
    saved = state.load_warmup()
    if saved is not None:
        warmup.load(*saved)
        progress.note(f"continuing {state.folder} after warm-up step {warmup.step}")
    steps = config.probe.warmup_steps
    progress.stage("warm-up", steps, warmup.step)
    save = _Saver(state, stop, lambda: state.save_warmup(warmup.step, warmup.tensors()))
    while warmup.step < steps:
        loss = warmup.run(data.warmup_batch(warmup.step).to(device))
        progress.advance(warmup.step, loss)
        save(finished=warmup.step == steps)
    warmup.release()


def _score(
    config: ProbeCommandConfig,
    model: nn.Module,
    layers: dict[str, SvdLoraLinear],
    data: ProbeData,
    device: torch.device,
    state: PartialState,
    progress: Progress,
    stop: StopRequest,
) -> Tensor:
    """Score the validation batches that are still missing; returns sensitivities ``[T, M]`` float64."""
    prepare_scoring(model, layers)
    rows = state.load_scores()
    batches = config.probe.partitions
    progress.stage("scoring", batches, len(rows))
    save = _Saver(state, stop, lambda: state.save_scores(rows))
    while len(rows) < batches:
        index = len(rows)
        partition = draw_partition(config.probe.seed, index, len(layers))
        row, loss = batch_sensitivities(model, layers, data.validation_batch(index).to(device), partition)
        rows.append(row)
        progress.advance(len(rows), loss)
        save(finished=len(rows) == batches)
    return torch.stack(rows)


def decide(
    config: ProbeCommandConfig,
    model: nn.Module,
    candidates: list[Candidate],
    sensitivities: Tensor,
    data_record: dict[str, Any],
) -> Allocation:
    """From sensitivities ``[T, M]`` to the allocation that is written.

    Raises:
        ConfigurationError: no ranking can be made, or the budget admits no module.
    """
    import transformers

    criterion = get_criterion(config.criterion)
    direction = criterion.direction if config.direction == "auto" else config.direction
    scores = criterion.score(sensitivities)
    mean, std = moments(sensitivities)
    signal = has_signal(scores)
    assignment = allocate(candidates, scores, config.budget, direction, signal=signal, means=mean)
    modules = [
        ModuleRecord(
            **vars(candidate),
            mean=float(mean[index]),
            std=float(std[index]),
            score=float(scores[index]),
            signal=bool(signal[index]),
            assignment=assignment.modules[candidate.name],
        )
        for index, candidate in enumerate(candidates)
    ]
    probe = config.probe
    return Allocation(
        model=ModelIdentity(
            name_or_path=config.model.path,
            architecture=architecture_of(model.config),
            config_sha256=model_fingerprint(model.config),
            num_layers=1 + max(candidate.layer for candidate in candidates),
            candidate_parameters=assignment.total,
        ),
        criterion=CriterionRecord(
            name=config.criterion,
            direction=direction,
            normalise=config.normalise,
            objective=probe.objective,
            rank=config.lora.rank,
            init=probe.init,
            warmup_steps=probe.warmup_steps,
            lr=float(probe.lr),
            partitions=probe.partitions,
            batch_size=probe.batch_size,
            max_length=probe.max_length,
            dtype=str(model.dtype).removeprefix("torch."),
            seed=probe.seed,
            data=data_record,
        ),
        budget=BudgetRecord(
            mode=config.budget.mode,
            ratio=float(config.budget.ratio),
            overflow=config.budget.overflow,
            limit=assignment.limit,
            used=assignment.used,
        ),
        modules=modules,
        environment={
            "hybrid_lora_plugin": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def census(model: nn.Module, layers: dict[str, SvdLoraLinear], allocation: Allocation) -> Census:
    """Count the parameters of the model under an allocation, adapters at the probe's rank.

    Args:
        model: the model with the probe still attached.
        layers: the probe's layers.
        allocation: who is fully fine-tuned.
    """
    probe = {id(parameter) for layer in layers.values() for parameter in (layer.A, layer.B, layer.e, layer.alpha)}
    base = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in probe)
    lora = sum(layers[name].A.numel() + layers[name].B.numel() for name in allocation.lora_names)
    return Census(frozen=base - allocation.budget.used, full=allocation.budget.used, lora=lora)
