"""What a probe says about itself: the settings a resumed run must share, and the identity in the artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import nn

from hybrid_lora_plugin import __version__
from hybrid_lora_plugin.allocation.schema import ModelIdentity, ProbeRecord, SeedRecord
from hybrid_lora_plugin.candidates import Candidate, architecture_of, model_fingerprint
from hybrid_lora_plugin.config import WITHOUT_WARMUP, ProbeCommandConfig
from hybrid_lora_plugin.linear_account import frozen_linear
from hybrid_lora_plugin.probing.data.batches import ProbeData
from hybrid_lora_plugin.probing.trial.options import recorded

# These change memory and speed, not what is measured.
_WITHOUT_EFFECT = ("files", "micro_batch_size", "micro_batch_tokens", "gradient_checkpointing", "dry_run")
# What these measure beyond the others of their run.
_MORE = {"perturbation": " with perturbations", "residual_gradient": " after a warm-up"}


def probe_settings(
    config: ProbeCommandConfig, run: str, model: nn.Module, data: ProbeData, weights: str
) -> dict[str, Any]:
    """What the measurements depend on. Budget, direction and normalisation do not count: they come after.

    In the order in which a difference is reported: with equal settings and files, other tokens can only come from
    another tokenizer, and with an equal path and config, other weights only from a checkpoint that was overwritten.

    Args:
        config: of the command.
        run: name of the probing run.
        model: with its dtype.
        data: the rows.
        weights: ``weights_digest`` of the model as loaded.
    """
    probe: dict[str, Any] = {}
    for name, value in vars(config.probe).items():
        if is_dataclass(value):
            probe |= {f"probe.{name}.{inner}": inner_value for inner, inner_value in vars(value).items()}
        elif name not in _WITHOUT_EFFECT:
            probe[f"probe.{name}"] = value
    # The day that a chat template prints, which began with the probe; None where it prints none.
    probe["probe.date"] = data.date
    files = [f"{file['name']}, {file['rows']} rows, sha256 {file['sha256']}" for file in data.record["files"]]
    return probe | {
        "criterion": f"needs the run {run}{_MORE.get(config.criterion, '')}",
        "model.path": config.model.path,
        "model.config": model_fingerprint(model.config),
        "model.dtype": str(model.dtype),
        "lora.rank": config.lora.rank,
        "probe.files": files,
        "model.tokenizer": data.record["tokens_sha256"],
        "model.weights": weights,
    }


def model_identity(path: str, model: nn.Module, candidates: Sequence[Candidate], parameters: int) -> ModelIdentity:
    """The model in the artifact; ``parameters`` counts all of its own, without those of the probe."""
    return ModelIdentity(
        name_or_path=path,
        architecture=architecture_of(model.config),
        config_sha256=model_fingerprint(model.config),
        num_layers=1 + max(candidate.layer for candidate in candidates),
        candidate_parameters=sum(candidate.parameters for candidate in candidates),
        parameters=parameters,
        frozen_linear=frozen_linear(model, candidates),
    )


def probe_record(
    config: ProbeCommandConfig, method: str, dtype: torch.dtype | None, data: dict[str, Any], lr: float
) -> ProbeRecord:
    """How the measurements of a probe are made, as far as the settings say it: numbers that are ``auto`` stay so.

    Args:
        config: of the command.
        method: name of the probe method.
        dtype: of the frozen base; None where it is not known yet, for a comparison of settings.
        data: rows and split.
        lr: learning rate of the warm-up.
    """
    probe = config.probe
    own = {"adalora": probe.adalora, "autolora": probe.autolora, "lookahead": probe.lookahead.settled}
    options = {method: asdict(own[method])} if method in own else {}
    if method == "trial":
        # What its portfolio may read of the probe, and what it trains with.
        asked = [name for name in own if name in config.trial.criteria]
        options = {name: asdict(own[name]) for name in asked} | {method: recorded(config)}
    return ProbeRecord(
        method=method,
        objective=probe.objective,
        rank=config.lora.rank,
        init="adalora" if method == "adalora" else probe.init,
        warmup_steps=0 if config.criterion in WITHOUT_WARMUP else probe.warmup_steps,
        lr=float(lr),
        partitions=probe.partitions,
        partitions_per_batch=probe.partitions_per_batch,
        batch_size=probe.batch_size,
        max_length=probe.max_length,
        dtype=str(dtype).removeprefix("torch."),
        seed=probe.seed,
        data=data,
        options=options,
    )


def record_of_seeds(records: Sequence[ProbeRecord]) -> ProbeRecord:
    """One record of probes that differ in nothing but the seed."""
    first = records[0]
    differing = [name for name in first.data if any(record.data.get(name) != first.data[name] for record in records)]
    seeds = [
        SeedRecord(
            **{spec.name: getattr(record, spec.name) for spec in dataclasses.fields(SeedRecord) if spec.name != "data"},
            data={name: record.data.get(name) for name in differing},
        )
        for record in records
    ]
    return dataclasses.replace(first, held_out=None, warmup_auto=None, partitions_auto=None, seeds=seeds)


def environment() -> dict[str, str]:
    """Versions that the artifact records."""
    import transformers

    return {
        "hybrid_lora_plugin": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
