"""The artifact for people: how the choice was made, what it cost, what it decided and how far to trust it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.allocation.budget_modes import budget_mode
from hybrid_lora_plugin.allocation.consensus import agreement_in_words, times_chosen
from hybrid_lora_plugin.allocation.learning import learned_in_words
from hybrid_lora_plugin.allocation.schema import Allocation, ModuleRecord, ProbeRecord, TrialRecord
from hybrid_lora_plugin.allocation.stability import DECIDED, EDGE, by_standing, in_words, shares_of
from hybrid_lora_plugin.allocation.stopping import stopping_in_words
from hybrid_lora_plugin.allocation.trial_words import trial_in_words, trial_markdown
from hybrid_lora_plugin.linear_account import account_markdown
from hybrid_lora_plugin.report.caveats import CONTROLS, caveats_text, caveats_title
from hybrid_lora_plugin.report.groups import depth_thirds, present_types
from hybrid_lora_plugin.report.ranking import by_preference, chosen_by_rule, find_cut, spearman


def write_report(allocation: Allocation, file: Path) -> None:
    """Write ``report.md`` (Markdown, one table an idea).

    Args:
        allocation: what was selected.
        file: where to.

    Raises:
        AllocationError: the artifact does not record what the parameters are counted from.
    """
    file.write_text("\n".join(_lines(allocation)) + "\n", encoding="utf-8")


def _lines(allocation: Allocation) -> list[str]:
    modules, counts = allocation.modules, allocation.parameter_counts()
    full = [module for module in modules if module.assignment == FULL]
    pictures = "[heatmap.png](heatmap.png) shows every module by layer and type"
    if by_preference(allocation):
        pictures += ", [scores.png](scores.png) all modules in the order of their score"
    sure = f"; {said}" if (said := in_words(allocation)) else ""
    return [
        f"# Allocation for {allocation.model.name_or_path}",
        "",
        f"{len(full)} of {len(modules)} candidate modules are fully fine-tuned, the other "
        f"{len(modules) - len(full)} get LoRA{sure}. {pictures}.",
        "",
        *_learning(allocation.probe),
        *([f"{agreed[0].upper()}{agreed[1:]}.", ""] if (agreed := agreement_in_words(allocation)) else []),
        *(line for said in trial_in_words(allocation.trial) for line in (_sentence(said), "")),
        *(line for said in stopping_in_words(allocation.probe) for line in (f"{said[0].upper()}{said[1:]}.", "")),
        "## What was probed" if allocation.probe else "## How it was chosen",
        "",
        *_settings(allocation),
        "",
        "## Budget",
        "",
        *budget_mode(allocation.budget.mode).table(
            allocation.budget, allocation.model.candidate_parameters, len(modules), allocation.full_parameters
        ),
        "",
        "## ParameterCounts of the model to train",
        "",
        "| group | parameters |",
        "| --- | ---: |",
        f"| frozen | {counts.frozen:,} |",
        f"| full fine-tuning | {counts.full:,} |",
        f"| LoRA (rank {allocation.budget.lora_rank}) | {counts.lora:,} |",
        "",
        *_linear_modules(allocation),
        "## Where full fine-tuning went",
        "",
        *_by_type_and_depth(modules, allocation.model.num_layers),
        "",
        *_full_modules(allocation, full),
        "",
        *_trial(allocation.trial),
        "## Does the score separate?",
        "",
        *_separation(allocation),
        "",
        *_sureness(allocation),
        *_agreement(allocation),
        f"## {caveats_title(allocation)}",
        "",
        caveats_text(allocation),
        "",
        "## How to use it",
        "",
        "Add two arguments to your verl command, with PATH the folder of this report:",
        "",
        "    python -m verl.trainer.main_ppo YOUR_ARGUMENTS +hybrid_lora=enabled hybrid_lora.allocation=PATH",
    ]


def _sentence(said: str) -> str:
    said = said.removeprefix("trial: ")
    return f"{said[0].upper()}{said[1:]}."


def _trial(record: TrialRecord | None) -> list[str]:
    """Every candidate of a trial, its losses and when it was dropped."""
    if record is None:
        return []
    return [
        "## The trial",
        "",
        f"{len(record.candidates)} candidates were trained from one start, on the same rows in the same order, and "
        f"compared on {record.rows} held-out rows ({record.tokens:,} response tokens). The loss before the first step "
        f"was {record.start:.4f} nats a token. All of them together took {record.steps:,} steps of {record.batch_size} "
        "rows. Differences are to the best candidate of the last round that one took part in, with 95 % intervals by a "
        "bootstrap over the rows.",
        "",
        *trial_markdown(record),
        "",
        "![held-out loss of each candidate](trial.png)",
        "",
    ]


def _learning(probe: ProbeRecord | None) -> list[str]:
    """The held-out loss before and after the warm-up; a warning stands out."""
    if not (said := learned_in_words(probe)):
        return []
    _, warning, rest = said.partition("warning: ")
    return [f"**Warning:** {rest}" if warning else f"{said[0].upper()}{said[1:]}.", ""]


def _linear_modules(allocation: Allocation) -> list[str]:
    model = allocation.model
    if not model.frozen_linear:
        return []  # an artifact of an earlier version does not say
    table = account_markdown(allocation.modules, model.frozen_linear, model.parameters)
    return ["## Linear modules, candidates and others", "", *table, ""]


def _settings(allocation: Allocation) -> list[str]:
    model, selection, probe = allocation.model, allocation.selection, allocation.probe
    if chosen_by_rule(allocation):
        chosen = f"{selection.criterion}, by rule, without scores"
    else:
        chosen = f"{selection.criterion}, {selection.direction} score first, normalise {selection.normalise}"
    lines = [
        "| setting | value |",
        "| --- | --- |",
        f"| model | {model.architecture}, {model.num_layers} layers, {model.candidate_parameters:,} candidate "
        f"parameters |",
        f"| criterion | {chosen} |",
        *(f"| option {name} | {value} |" for name, value in _flattened(selection.options)),
    ]
    if probe is None:
        return lines
    lines += _probe_settings(probe)
    if selection.criterion in CONTROLS:
        # Selected anew from a probe's artifact by hybrid-lora-allocate.
        lines += [
            "",
            f"The probe was made for another criterion; '{selection.criterion}' uses nothing that was measured.",
        ]
    return lines


def _probe_settings(probe: ProbeRecord) -> list[str]:
    policy = probe.objective == "policy"
    each = probe.partitions_per_batch
    partitions = "one random partition each" if each == 1 else f"in turns of {each} random partitions of one batch"
    lines = [
        f"| probe method | {probe.method} |",
        f"| objective | {probe.objective} |",
        f"| probe adapters | rank {probe.rank}, init {probe.init}, base in {probe.dtype} |",
        f"| warm-up | {probe.warmup_steps} steps of {'the run' if policy else f'{probe.batch_size} rows'} at lr "
        f"{probe.lr:g} |",
        f"| validation | T = {probe.partitions} batches of "
        f"{'rollouts of held-out prompts' if policy else f'{probe.batch_size} rows'}, {partitions} |",
        *([] if policy else [f"| longest row | {probe.max_length} tokens |"]),
        f"| seed | {', '.join(str(one.seed) for one in probe.seeds) if probe.seeds else probe.seed} |",
        *(f"| option {name} | {value} |" for name, value in _flattened(probe.options)),
    ]
    for source in probe.data.get("files", []):
        lines.append(f"| data | {source['name']}, {source['rows']} rows, sha256 {source['sha256'][:16]}… |")
    lines += [f"| rows | {told.replace('|', chr(92) + '|')} |" for told in probe.data.get("told", [])]
    return lines


def _flattened(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested options as ``a.b`` and text; a long list by its length, for it is in allocation.json."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        elif isinstance(value, list) and len(value) > 3:
            yield prefix + name, f"{len(value)} entries, see allocation.json"
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _by_type_and_depth(modules: list[ModuleRecord], num_layers: int) -> list[str]:
    """Counts ``full/all`` per type for each third of the depth."""
    thirds = depth_thirds(num_layers)

    def cell(type_: str, layers: range) -> str:
        here = [module for module in modules if module.type == type_ and module.layer in layers]
        return f"{sum(module.assignment == FULL for module in here)}/{len(here)}"

    heads = [f"layers {third[0]}–{third[-1]}" for third in thirds]
    lines = [f"| full/all | {' | '.join(heads)} | all layers |", "| --- |" + " ---: |" * (len(heads) + 1)]
    for type_ in present_types(modules):
        cells = [cell(type_, third) for third in thirds]
        lines.append(f"| {type_} | {' | '.join(cells)} | {cell(type_, range(num_layers))} |")
    return lines


def _full_modules(allocation: Allocation, full: list[ModuleRecord]) -> list[str]:
    if not by_preference(allocation):
        return ["| module | parameters |", "| --- | ---: |", *(f"| `{m.name}` | {m.parameters:,} |" for m in full)]
    shares = shares_of(allocation)
    lines = [
        f"| module | parameters | mean | std | score |{' chosen in |' if shares else ''}",
        f"| --- | ---: | ---: | ---: | ---: |{' ---: |' if shares else ''}",
        *(
            f"| `{m.name}` | {m.parameters:,} | {m.mean:.4g} | {m.std:.4g} | {m.score:.4g} |"
            + (f" {100 * shares[m.name]:.0f} % |" if shares else "")
            for m in full
        ),
    ]
    silent = [f"`{module.name}`" for module in allocation.modules if not module.signal]
    if silent:
        lines += ["", f"No signal, hence never selected: {', '.join(silent)}."]
    return lines


def _separation(allocation: Allocation) -> list[str]:
    """Numbers that tell a score with a gap at the cut from a continuum cut at an arbitrary place."""
    order = by_preference(allocation)
    if not order:
        return [
            f"There is no score: '{allocation.selection.criterion}' chooses without one."
            if chosen_by_rule(allocation)
            else "It cannot: no two modules have different scores."
        ]
    if allocation.selection.criterion == "random":
        return ["The scores are random numbers: where the cut lies means nothing."]
    scores = [module.score for module in order]
    levels = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "max": 1.0}
    quantiles = np.quantile(scores, list(levels.values()))
    lines = [
        "| score | " + " | ".join(levels) + " |",
        "| --- |" + " ---: |" * len(levels),
        f"| {len(scores)} modules | {' | '.join(f'{value:.4g}' for value in quantiles)} |",
        "",
        *_cut(allocation),
    ]
    if any(module.std != 0 for module in order):
        with_mean = spearman([module.mean for module in order], [module.score for module in order])
        if with_mean is not None:
            lines += ["", _against_the_mean(with_mean, len(order))]
    return lines


def _sureness(allocation: Allocation) -> list[str]:
    """What a bootstrap over the batches chose, and the modules that it is undecided about."""
    stability = allocation.stability
    if stability is None:
        return []
    shares, groups = shares_of(allocation), by_standing(allocation)
    lines = [
        "## How sure is the choice?",
        "",
        f"The {stability.batches} validation batches were drawn anew, with replacement, {stability.draws} times, and "
        f"the modules chosen from each draw. Certain is a chosen module that {100 * DECIDED:.0f} % of the draws or "
        f"more choose, out is another that {100 - 100 * DECIDED:.0f} % or less do. This is the part of the uncertainty "
        "that the batches bring; another seed of the warm-up or other rows may move more.",
        "",
        "| | modules |",
        "| --- | ---: |",
        *(f"| {name} | {len(members)} |" for name, members in groups.items()),
        "",
    ]
    if groups[EDGE]:
        edge = sorted(groups[EDGE], key=lambda module: -shares[module.name])
        lines += [
            "| on the edge | chosen here | chosen in |",
            "| --- | --- | ---: |",
            *(
                f"| `{m.name}` | {'yes' if m.assignment == FULL else 'no'} | {100 * shares[m.name]:.0f} % |"
                for m in edge
            ),
            "",
        ]
    return lines


def _agreement(allocation: Allocation) -> list[str]:
    """What several seeds would each choose alone."""
    found = allocation.agreement
    if found is None:
        return []
    times = times_chosen(allocation)
    some = [module for module in allocation.modules if 0 < times[module.name] < len(found.seeds)]
    pairs = itertools.combinations(found.seeds, 2)
    return [
        "## Do the seeds agree?",
        "",
        "Each seed has adapters, order, split and partitions of its own. The choice is by the mean of a module's ranks "
        "over the seeds; here is what each would choose alone.",
        "",
        "| two seeds | overlap (Jaccard) |",
        "| --- | ---: |",
        *(f"| {a} and {b} | {100 * value:.0f} % |" for (a, b), value in zip(pairs, found.overlaps, strict=True)),
        "",
        *(["| chosen by some seeds | of them | chosen here |", "| --- | ---: | --- |"] if some else []),
        *(
            f"| `{m.name}` | {times[m.name]} of {len(found.seeds)} | {'yes' if m.assignment == FULL else 'no'} |"
            for m in sorted(some, key=lambda module: -times[module.name])
        ),
        *([""] if some else []),
    ]


def _cut(allocation: Allocation) -> list[str]:
    cut = find_cut(allocation)
    if cut is None:
        return ["There is no cut: all modules with a score are on the same side of it."]
    ends = (
        f"{cut.last.score:.4g} (`{cut.last.name}`, the last that is full) and {cut.next.score:.4g} (`{cut.next.name}`)"
    )
    size = (
        f"{100 * cut.gap:.3g} % of the smaller" if cut.relative else f"{100 * cut.gap:.3g} % of the range of all scores"
    )
    kind = "ratio" if cut.relative else "difference"
    lines = [
        f"The cut lies between {ends}. The gap is {size}; of the {cut.neighbours} pairs of neighbours in the order, "
        f"{cut.larger_gaps} have a larger {kind}.",
    ]
    if cut.last.score == cut.next.score:
        lines += ["", "The two have the same score, so the mean and then layer and type decided between them."]
    if cut.passed_over:
        before = (
            "1 module before the cut is" if cut.passed_over == 1 else f"{cut.passed_over} modules before the cut are"
        )
        reason = ", because more would not have fitted the budget" if allocation.budget.overflow == "skip" else ""
        lines += ["", f"{before} not fully fine-tuned{reason}."]
    return lines


def _against_the_mean(value: float, count: int) -> str:
    text = f"Spearman correlation of the score with the mean alone, over {count} modules: {value:.3f}"
    if abs(value) >= 0.95:
        return text + "; the spread over the batches hardly changes the order."
    return text + "."
