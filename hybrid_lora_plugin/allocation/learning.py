"""Whether the warm-up of a probe learned anything that holds for rows it never saw, in words."""

from __future__ import annotations

import dataclasses

from hybrid_lora_plugin.allocation.schema import ProbeRecord
from hybrid_lora_plugin.errors import with_reference


def rate_option(method: str, init: str) -> str:
    """The option that the learning rate of a warm-up comes from.

    Args:
        method: name of the probe method.
        init: ``probe.init`` of its adapters.
    """
    if method == "full_delta":
        return "probe.full_lr"
    initialised = method in ("svd_lora", "lookahead", "weight_gradient", "trial") and init == "adalora"
    return "probe.adalora.lr" if method == "adalora" or initialised else "probe.lr"


def learned_in_words(probe: ProbeRecord | None) -> str:
    """One sentence on the held-out loss before and after the warm-up, a warning where it did not fall; empty where an
    artifact does not record it, as after a policy probe.
    """
    if probe is not None and probe.seeds:
        # The seed that learned least speaks for all.
        least = max(probe.seeds, key=lambda seed: seed.held_out.after / seed.held_out.before if seed.held_out else 0)
        said = learned_in_words(dataclasses.replace(probe, seeds=None, held_out=least.held_out))
        return said.replace("the warm-up", f"the warm-up of seed {least.seed}, which learned least,", 1)
    if probe is None or probe.held_out is None:
        return ""
    held_out, rate = probe.held_out, rate_option(probe.method, probe.init)
    over = f"on {held_out.batches} held-out batches ({held_out.tokens:,} response tokens)"
    change = held_out.before - held_out.after
    if change > 0:
        return (
            f"the warm-up lowered the loss {over} from {held_out.before:.4f} to {held_out.after:.4f}, by "
            f"{100 * change / held_out.before:.2g} %"
        )
    # Nothing learned, or too much of it: the way out is the opposite.
    way_out = (
        f"more probe.warmup_steps or a higher {rate}"
        if change > -0.01 * held_out.before
        else f"a lower {rate}, fewer probe.warmup_steps or more rows"
    )
    return with_reference(
        f"warning: the warm-up did not lower the loss {over}: {held_out.before:.4f} before, {held_out.after:.4f} "
        f"after. What was scored learned nothing that holds for other rows; probe again with {way_out}",
        see="warm-up-did-not-learn",
    )
