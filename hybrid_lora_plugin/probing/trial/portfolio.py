"""Which candidate allocations a trial compares: entries of the portfolio and random draws, from few probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hybrid_lora_plugin.allocation.budget import FULL, assign
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.config_trial import REVERSED, spread_of
from hybrid_lora_plugin.errors import ConfigurationError, ProbeError
from hybrid_lora_plugin.scoring import Measured, get_criterion, score_modules
from hybrid_lora_plugin.scoring.registry import Criterion

RANDOM, LORA = "random", "lora"
#: criterion that leads a probe -> what its method measures for the criteria of another one
_ALSO_MEASURES = {"lookahead": "svd_lora"}


@dataclass(frozen=True)
class Entry:
    """What a candidate is chosen by.

    Attributes:
        name: as in ``trial.portfolio``, or ``random:N``.
        config: criterion, direction, control and budget of the choice.
    """

    name: str
    config: ProbeCommandConfig

    @property
    def criterion(self) -> Criterion:
        """Of the registry."""
        return get_criterion(self.config.criterion)

    @property
    def direction(self) -> str:
        """``lowest`` or ``highest`` score first."""
        return self.criterion.direction if self.config.direction == "auto" else self.config.direction


@dataclass(frozen=True)
class Contender:
    """One allocation that is trained.

    Attributes:
        name: of the first entry that chose it.
        also: names of other entries that chose the same modules.
        modules: names of the fully tuned ones, in model order; none for LoRA on all modules.
        rank: of the adapters.
    """

    name: str
    also: tuple[str, ...]
    modules: tuple[str, ...]
    rank: int

    def trainable_parameters(self, candidates: Sequence[Candidate]) -> int:
        """Weights and biases of the full modules, and the adapters' factors."""
        full = set(self.modules)
        return sum(one.parameters if one.name in full else one.lora_parameters(self.rank) for one in candidates)


def entries_of(config: ProbeCommandConfig) -> list[Entry]:
    """The portfolio of a checked configuration in its order, and ``trial.draws`` random entries behind it."""
    found = []
    for name in config.trial.portfolio:
        spread = spread_of(name)
        if spread is not None:
            control = dataclasses.replace(config.control, type=spread[0], depth=spread[1])
            found.append(Entry(name, dataclasses.replace(config, criterion="spread", control=control)))
            continue
        criterion = name.removesuffix(REVERSED)
        direction = "auto"
        if criterion != name:
            direction = "highest" if get_criterion(criterion).direction == "lowest" else "lowest"
        found.append(Entry(name, dataclasses.replace(config, criterion=criterion, direction=direction)))
    for draw in range(config.trial.draws):
        control = dataclasses.replace(config.control, seed=1000 * config.probe.seed + draw)
        found.append(Entry(f"{RANDOM}:{draw}", dataclasses.replace(config, criterion=RANDOM, control=control)))
    return found


def probes_of(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """The probes that measure for the entries: the criterion to probe with, and whom it serves.

    Criteria of one method share a probe, led by one that measures what the others need as well.
    """
    of_method: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.criterion.method is not None:
            of_method.setdefault(entry.criterion.method, []).append(entry)
    for leader, method in _ALSO_MEASURES.items():
        # A perturbation is measured by its own method alone.
        if leader in of_method and all(e.config.criterion != "perturbation" for e in of_method.get(method, ())):
            of_method[leader] += of_method.pop(method, [])
    found = []
    for served in of_method.values():
        names = [entry.config.criterion for entry in served]
        # These measure more than the others of their methods.
        leader = next((name for name in ("perturbation", "residual_gradient", "lookahead") if name in names), names[0])
        found.append((leader, served))
    return found


def contenders_of(
    entries: Sequence[Entry],
    candidates: Sequence[Candidate],
    measurements: Callable[[Entry], Mapping[str, Tensor]],
) -> list[Contender]:
    """The allocations that the entries choose; entries with the same modules share one.

    Args:
        entries: of ``entries_of``.
        candidates: the M candidates.
        measurements: what was measured for an entry, ``[T, M]`` or ``[M]`` by name.

    Raises:
        ConfigurationError: an entry has no ranking, or the budget admits none of its modules; the message names it.
    """
    chosen: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        config = entry.config
        try:
            scored = score_modules(config.criterion, Measured(candidates, measurements(entry), config.control))
            modules = assign(candidates, scored, config.budget, entry.direction, config.lora.rank).modules
        except ConfigurationError as error:
            raise ProbeError(f"trial.portfolio: {entry.name}: {error}") from error
        full = tuple(one.name for one in candidates if modules[one.name] == FULL)
        if len(full) == len(candidates):
            raise ProbeError(f"trial.portfolio: {entry.name} leaves no module to LoRA; lower budget.ratio")
        chosen.setdefault(full, []).append(entry.name)
    rank = entries[0].config.lora.rank
    return [Contender(names[0], tuple(names[1:]), modules, rank) for modules, names in chosen.items()]


def matched_lora(contenders: Sequence[Contender], candidates: Sequence[Candidate]) -> Contender:
    """LoRA on every module, of the largest rank that trains no more parameters than the candidates do on average."""
    wanted = sum(one.trainable_parameters(candidates) for one in contenders) / len(contenders)
    each = sum(one.lora_parameters(1) for one in candidates)
    return Contender(LORA, (), (), max(1, int(wanted // each)))
