"""What an arm trains, in the words of a command of verl: modules that verl adapts, components that stay frozen."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_lora_plugin.allocation.placement import FROZEN
from hybrid_lora_plugin.candidates import COMPONENTS, TYPE_ORDER, Candidate
from hybrid_lora_plugin.config_selection import PlacementConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.protocol import Choice


def refuse_untrainable(arm: str, choice: Choice, candidates: Sequence[Candidate]) -> None:
    """Refuse what neither verl nor the plugin trains.

    Raises:
        ConfigurationError: naming the arm.
    """
    if choice.dora:
        raise ConfigurationError(f"arms: {arm}: verl trains no DoRA; leave it out of plans with protocol rl")
    if len(choice.full) == len(candidates):
        return
    if choice.rank == 0 and not choice.frozen:
        raise ConfigurationError(f"arms: {arm}: rank 0 leaves modules without an adapter; give a rank of 1 or more")
    if choice.rank == 0 or len(choice.full) + len(choice.frozen) == len(candidates):
        raise ConfigurationError(
            f"arms: {arm}: verl trains all weights, and the plugin some of them beside adapters, of which there would "
            f"be none; give lora to a component, or leave the arm out of plans with protocol rl"
        )
    if choice.full:
        frozen_components(arm, choice, candidates)
    else:
        adapter_targets(arm, choice, candidates)


def adapter_targets(arm: str, choice: Choice, candidates: Sequence[Candidate]) -> str:
    """``target_modules`` of verl's own LoRA: ``all-linear``, or the types of the adapted modules as Hydra takes them.

    Raises:
        ConfigurationError: a type is adapted in one layer and frozen in another, which no list of types can say.
    """
    if not choice.frozen:
        return "all-linear"
    frozen = set(choice.frozen)
    adapted, left = ({one.type for one in candidates if (one.name in frozen) is still} for still in (False, True))
    if both := sorted(adapted & left):
        raise ConfigurationError(
            f"arms: {arm}: {both[0]} is frozen in some layers and adapted in others, which target_modules of verl "
            f"cannot say; freeze whole components"
        )
    return f"[{','.join(type_ for type_ in TYPE_ORDER if type_ in adapted)}]"


def frozen_components(arm: str, choice: Choice, candidates: Sequence[Candidate]) -> PlacementConfig:
    """The placement of a run of the plugin: ``frozen`` for the components of which nothing trains.

    Raises:
        ConfigurationError: a component is frozen in part, though its modules take adapters.
    """
    placement, full, frozen = PlacementConfig(), set(choice.full), set(choice.frozen)
    for component in COMPONENTS:
        names = [one.name for one in candidates if one.component == component]
        # What takes no adapter is frozen wherever it is not fully tuned.
        left = [one.name for one in candidates if one.name in frozen and one.component == component]
        if names and len(left) == len(names):
            setattr(placement, component, FROZEN)
        elif any(one.takes_adapter for one in candidates if one.name in left):
            others = "fully tuned" if full & set(names) else "adapted"
            raise ConfigurationError(
                f"arms: {arm}: {left[0]} is frozen and others of its component are {others}, which the plugin does "
                f"not train; freeze whole components"
            )
    return placement
