"""The rows of a probe from its command, with what only the model's folder knows; and a look at them on their own."""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.config import WITHOUT_PROBE, ModelConfig, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.probing.data.batches import ProbeData, TrialRows
from hybrid_lora_plugin.probing.loading import load_model_config, load_tokenizer
from hybrid_lora_plugin.probing.method import warmup_steps
from hybrid_lora_plugin.probing.progress import Progress
from hybrid_lora_plugin.probing.resume import partial_folder


def prepare_data(config: ProbeCommandConfig, progress: Progress) -> ProbeData:
    """Read, check and tokenise the rows of a probe; no weights are needed.

    Raises:
        ProbeError: the tokenizer, the model's configuration or the rows cannot be used.
    """
    tokenizer, model_config = load_tokenizer(config.model), load_model_config(config.model)
    return ProbeData(
        needed_rows(config),
        tokenizer,
        vocabulary=getattr(model_config.get_text_config(), "vocab_size", None),
        stops=_stop_tokens(config.model, model_config),
        day=_day(config),
        progress=progress,
        trial=trial_rows(config) if config.criterion == "trial" else None,
    )


def needed_rows(config: ProbeCommandConfig) -> ProbeConfig:
    """The probe's settings without the rows that no criterion of it reads."""
    if config.criterion != "trial":
        # Rows for a warm-up are read where there is one.
        return dataclasses.replace(config.probe, warmup_steps=warmup_steps(config))
    asked = [dataclasses.replace(config, criterion=name) for name in config.trial.criteria if name not in WITHOUT_PROBE]
    steps = max((warmup_steps(one) for one in asked), default=0)
    return dataclasses.replace(config.probe, warmup_steps=steps, partitions=config.probe.partitions if asked else 0)


def trial_rows(config: ProbeCommandConfig) -> TrialRows:
    """What a trial needs of the rows: those of its longest run, and those that it compares on."""
    trial = config.trial
    size = trial.batch_size or config.probe.batch_size
    return TrialRows(trial.held_out_rows, round(trial.steps / trial.keep ** (trial.rounds - 1)) * size, size)


def seeds_settings(config: ProbeCommandConfig) -> dict[str, Any]:
    """What a probe of several seeds shares before any of them has begun: the seeds, and the day that they all print."""
    return {"probe.seeds": config.probe.seeds, "probe.date": _day(config).isoformat()}


def dry_run(config: ProbeCommandConfig, progress: Progress) -> str:
    """What a probe with these rows would train, as a text for people: one row, then the counts.

    Raises:
        ConfigurationError: the tokenizer, the model's configuration or the rows cannot be used.
    """
    data, tokenizer = prepare_data(config, progress), load_tokenizer(config.model)
    example = data.first_held_out
    lines = [
        f"one row of {data.record['rows']:,}, number {data.record['validation_rows'][0] + 1}: "
        f"{len(example.input_ids):,} tokens, of which those between >>> and <<< are trained ({example.trained:,})",
        "",
        _marked(example.input_ids.tolist(), example.spans, tokenizer),
        "",
        *data.told,
        "nothing was trained and nothing written; without probe.dry_run=true the same command probes",
    ]
    return "\n".join(lines)


def _marked(ids: list[int], spans: tuple[tuple[int, int], ...], tokenizer: Any) -> str:
    parts, last = [], 0
    for start, end in spans:
        parts += [tokenizer.decode(ids[last:start]), ">>>", tokenizer.decode(ids[start:end]), "<<<"]
        last = end
    return "".join([*parts, tokenizer.decode(ids[last:])])


def _stop_tokens(model: ModelConfig, model_config: Any) -> list[int]:
    """Ids at which a rollout ends by the generation config of the model, or else by its config."""
    from transformers import GenerationConfig

    try:
        stop = GenerationConfig.from_pretrained(model.path).eos_token_id
    except (OSError, ValueError):
        stop = None  # most models of one's own have none
    if stop is None:
        stop = getattr(model_config, "eos_token_id", None)
    return [] if stop is None else stop if isinstance(stop, list) else [stop]


def _day(config: ProbeCommandConfig) -> date:
    """The day that is asked for, or on which the unfinished probe of this output folder was begun, or today."""
    if config.probe.date is not None:
        return date.fromisoformat(config.probe.date)
    try:
        settings = partial_folder(config.output_dir or "") / "settings.json"
        return date.fromisoformat(json.loads(Path(settings).read_text(encoding="utf-8"))["probe.date"])
    except (OSError, ValueError, KeyError, TypeError):
        return date.today()  # no unfinished probe, or one whose template prints no date
