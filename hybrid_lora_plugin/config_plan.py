"""The options of ``hybrid-lora-plan``: which run is planned, and what is taken for granted of the machines."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config_field import Bound, above, at_least, documented


@dataclass
class PlanCommandConfig:
    """What ``hybrid-lora-plan`` takes on the command line as ``key=value``, in front of ``--``."""

    recipe: str | None = documented(
        None,
        "Name of a recipe, planned as `verl.trainer.main_ppo` starts it with `--config-dir`, `+hybrid_lora=enabled`, "
        "`+recipe=` and the overrides behind `--`; null plans the command behind `--`.",
        source="none: this or a command behind `--`",
    )
    recipes: str = documented("recipes", "Folder of the recipes, with `recipe/` in it.", source="this repository")
    model: str | None = documented(
        None,
        "Hugging Face folder or name whose config.json is planned in place of the run's own model; weights are never "
        "read.",
        source="own choice",
    )
    gpu_memory: float = documented(
        79.0,
        "Memory of one GPU as torch can use it.",
        source="an 80 GB card has 80 GiB less what the driver keeps",
        unit="GiB",
        bound=above(0, "the memory of a GPU in GiB, e.g. 79"),
    )
    reserve: float = documented(
        4.0,
        "Of that, what no part of the plan accounts for: contexts of two processes, NCCL's buffers, captured graphs, "
        "gaps between blocks of the allocator.",
        source="an assumption, not measured",
        unit="GiB",
        bound=at_least(0, "0 or more GiB, e.g. 4"),
    )
    host_memory: float | None = documented(
        None,
        "Memory of one machine that this run may take; null: it is counted and not judged.",
        source="own choice",
        unit="GiB",
        bound=above(0, "the memory of a machine in GiB, e.g. 1000"),
    )
    teraflops: float = documented(
        312.0,
        "Peak of one GPU in the type that is computed in.",
        source="data sheet of A100 and A800, dense bf16",
        unit="10^12 operations a second",
        bound=above(0, "the peak of a GPU, e.g. 312"),
    )
    utilisation: float = documented(
        0.4,
        "Share of that peak that training computes at; times follow from it and from nothing that was measured.",
        source="an assumption",
        unit="fraction in (0, 1]",
        bound=Bound(lambda value: 0 < value <= 1, "a fraction in (0, 1], e.g. 0.4"),
    )
    output_dir: str | None = documented(
        None, "New folder for plan.json, plan.txt and plan.png; null prints only.", source="own choice"
    )
