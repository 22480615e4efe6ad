"""The options of zeroth order: frozen weights of a verl run that move without a gradient."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config_field import Bound, above, at_least, documented


@dataclass
class ZerothOrderConfig:
    """Two-point steps of frozen weights after each optimizer step; experimental."""

    enabled: bool = documented(
        False,
        "Whether frozen weights move, by two-point steps after each optimizer step of adapters and full modules; "
        "experimental, and no gain was shown with it. FSDP2 and `sync=merge` only.",
        source="own choice: the run is as without it by default",
    )
    lr: float | None = documented(
        None,
        "Learning rate of the frozen weights, which take plain descent: no momentum, no Adam. verl's warm-up and "
        "schedule act on it as on the other rates.",
        source="none: must be given where `enabled`; in our study the lowest of those tried did best",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 1e-8"),
    )
    epsilon: float = documented(
        1e-3,
        "How far every weight is moved, up and down, to measure the slope of the loss; at least 3e-4 where weights are "
        "held or computed with in 16 bits.",
        source="MeZO, arXiv 2305.17333",
        bound=above(0, "a distance above 0, e.g. 1e-3"),
    )
    directions: int = documented(
        1,
        "Random directions of each step; each costs two forward passes over the mini-batch.",
        source="MeZO, arXiv 2305.17333",
        bound=at_least(1, "1 direction or more"),
    )
    modules: list[str] = documented(
        [],
        "Modules whose weights move, by the last part of their names or by whole names, e.g. "
        "`[up_proj,model.embed_tokens]`; empty is every candidate that is not fully tuned. Biases stay.",
        source="own choice: as in the arm of `hybrid-lora-evidence`",
        bound=Bound(
            lambda names: all(names) and len(set(names)) == len(names),
            "each name once, e.g. [up_proj,model.embed_tokens], or leave it out for every candidate",
        ),
    )
    seed: int = documented(0, "Seed of the random directions.", source="own choice", bound=at_least(0, "0 or more"))
