"""The model card of an export: what it is, how it was trained, and which modules were tuned in which way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hybrid_lora_plugin import __version__
from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.candidates import TYPE_ORDER
from hybrid_lora_plugin.training.checkpoint import CheckpointDescription

CARD = "README.md"
#: how the Hub's cache calls the folder of a model
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
LIBRARY = {"merged": "transformers", "adapter": "peft", "delta": "hybrid-lora"}


def hub_name(base: str) -> str | None:
    """The name on the Hugging Face hub that a base model was given by, or None for a folder of one's own.

    The Hub takes no card whose ``base_model`` is none of its names.
    """
    if cached := _CACHED.search(base):
        return f"{cached['owner']}/{cached['name']}"
    if Path(base).exists() or base.startswith((".", "~")):
        return None
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base


def model_card(
    format: str, base: str, description: CheckpointDescription, allocation: Allocation, weights: str, use: Sequence[str]
) -> str:
    """The text of ``README.md``.

    Args:
        format: of the export.
        base: Hugging Face folder or name of the base model.
        description, allocation: of the checkpoint.
        weights: what of the update is in the weights, one line.
        use: how it is loaded, in Markdown, a paragraph each.
    """
    name = hub_name(base)
    data = ModelCardData(
        base_model=name,
        base_model_relation=None if name is None else "adapter" if format == "adapter" else "finetune",
        library_name=LIBRARY[format],
        pipeline_tag="text-generation",
        tags=["hybrid-lora", *(["lora"] if format == "adapter" else []), "fine-tuned"],
    )
    recorded = base if name is not None else f"{base}, a folder where it was trained; no name on a hub is known"
    settings = [
        ("base model", recorded),
        ("steps", f"{description.global_step:,}"),
        ("LoRA", f"rank {description.rank}, alpha {description.alpha}: scaled by {description.scaling:g}"),
        *_recipe(description),
        ("weights of the rollouts", _rollout(description)),
        ("fully tuned modules chosen by", _selection(allocation)),
        ("written by", f"hybrid_lora_plugin {__version__}, format {format}"),
    ]
    text = [
        "---",
        data.to_yaml().strip(),
        "---",
        "",
        f"# {Path(base).name or base}, tuned with Hybrid-LoRA",
        "",
        _counts(allocation),
        "",
        *("\n\n".join(use).splitlines()),
        "",
        "## Recipe",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {_cell(value)} |" for name, value in settings),
        "",
        f"What is here: {weights}.",
        "",
        "## Allocation",
        "",
        *_table(allocation),
    ]
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _counts(allocation: Allocation) -> str:
    modules, full = allocation.modules, allocation.full_parameters
    share = full / allocation.model.candidate_parameters
    return (
        f"{len(allocation.full_names)} of {len(modules)} linear modules of the decoder were fully fine-tuned, {full:,} "
        f"parameters or {share:.1%} of theirs; the other {len(allocation.lora_names)} have a LoRA adapter, and all "
        f"else is the base model's."
    )


def _recipe(description: CheckpointDescription) -> list[tuple[str, str]]:
    recipe = description.recipe if isinstance(description.recipe, dict) else {}
    rates = [recipe.get(name) for name in ("full_lr", "lora_lr")]
    if not all(isinstance(rate, float) for rate in rates):
        return [("learning rates", "not recorded in the checkpoint")]
    trainer = str(recipe.get("run")).replace("_", " ")
    return [("trainer", trainer), ("learning rates", f"{rates[0]:g} for full modules, {rates[1]:g} for LoRA")]


def _rollout(description: CheckpointDescription) -> str:
    if description.rollout_dtype in (None, "float32"):
        return description.rollout_dtype or "not recorded in the checkpoint"
    seed = f", seed {description.rounding_seed}" if description.rounding_mode == "stochastic" else ""
    return f"{description.rollout_dtype}, rounding {description.rounding_mode}{seed}"


def _selection(allocation: Allocation) -> str:
    selection, probe = allocation.selection, allocation.probe
    text = f"criterion {selection.criterion}, {selection.direction} first, budget {allocation.budget.mode}"
    if probe is None:
        return text + "; nothing was probed"
    return f"{text}; probe {probe.method} on {probe.objective}, {probe.warmup_steps} steps of warm-up"


def _table(allocation: Allocation) -> list[str]:
    rows = [
        "| type | modules | fully tuned | in layers | parameters of these | share of the type |",
        "| --- " * 6 + "|",
    ]
    for kind in TYPE_ORDER:
        modules = [module for module in allocation.modules if module.type == kind]
        if not modules:
            continue
        full = [module for module in modules if module.assignment == FULL]
        tuned, parameters = (sum(module.parameters for module in some) for some in (full, modules))
        layers = _ranges(sorted(module.layer for module in full)) or "–"
        share = tuned / parameters
        rows.append(f"| `{kind}` | {len(modules)} | {len(full)} | {layers} | {tuned:,} | {share:.1%} |")
    return rows


def _ranges(layers: Sequence[int]) -> str:
    """``0, 3–5`` for 0, 3, 4, 5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
