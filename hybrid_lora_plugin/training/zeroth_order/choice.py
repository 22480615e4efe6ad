"""Which weights move: those of named modules, or of every candidate that is not fully tuned."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.names import is_adapter, plain_name

_KIND = ".weight"


def moving_weights(
    model: nn.Module, names: Sequence[str], candidates: Collection[str], full: Collection[str], option: str = "modules"
) -> list[tuple[str, nn.Parameter]]:
    """(name in the model, parameter) of the frozen weights that zeroth order moves, in model order, a tied one once.

    Args:
        model: plain, or a hybrid model in any sharding.
        names: last parts of modules' names, e.g. ``up_proj``, or whole plain names; none is every candidate.
        candidates: plain names of the candidate modules.
        full: plain names of those that are fully tuned, which do not move here.
        option: what messages call ``names``.

    Raises:
        ConfigurationError: a name matches no module with a weight, or fully tuned ones alone; or nothing is left.
    """
    weights: dict[str, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not is_adapter(name) and name.endswith(_KIND):
            weights[plain_name(name).removesuffix(_KIND)] = (name, parameter)
    chosen: set[str] = set()
    for name in names or [None]:
        matched = {module for module in weights if _matches(module, name, candidates)}
        if not matched:
            raise ConfigurationError(
                f"{option}: {name!r} matches no module of this model that has a weight of its own; give the last part "
                "of a module's name, e.g. up_proj, a whole name, or leave it out for every candidate",
                see="zeroth-order-not-possible",
            )
        if not matched - set(full):
            raise ConfigurationError(
                f"{option}: {name or 'every candidate'!r} is fully tuned under this allocation, so it has a gradient; "
                "name modules with LoRA or frozen ones",
                see="zeroth-order-not-possible",
            )
        chosen |= matched - set(full)
    return [weights[module] for module in weights if module in chosen]


def _matches(module: str, name: str | None, candidates: Collection[str]) -> bool:
    return module in candidates if name is None else name in (module, module.rpartition(".")[2])
