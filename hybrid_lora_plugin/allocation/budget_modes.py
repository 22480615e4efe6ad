"""Budget modes: what is limited, how it is counted, and how that is said. One class each, registered in ``_MODES``.

A mode that a user may choose also has a row in ``config.BUDGET_AMOUNTS``, which names the option that says how much.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from hybrid_lora_plugin.allocation.placement import AUTO, FULL, LORA, unless_full
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.errors import AllocationError


@dataclass(frozen=True)
class BudgetRecord:
    """Budget asked, allowed and spent, as an allocation records it.

    Attributes:
        mode: of the budget, or ``fixed`` where the criterion named its modules and no budget was applied.
        ratio: the share asked for; in modes that ask for none, the share of candidate parameters that became full.
        overflow: ``stop`` or ``skip``.
        limit: what is allowed, in the unit of the mode.
        used: what of it is spent, in the same unit.
        lora_rank: rank r of the adapters that the other modules get.
    """

    mode: str
    ratio: float
    overflow: str
    limit: int
    used: int
    lora_rank: int


@dataclass(frozen=True)
class Account:
    """A budget as one sum that must stay within a limit, whatever its unit.

    Attributes:
        limit: the largest sum.
        start: the sum when no candidate that is left to the criterion is fully fine-tuned.
        costs: what each of the M candidates adds when it becomes fully fine-tuned; 0 where it is placed by hand.
    """

    limit: int
    start: int
    costs: list[int]


@dataclass(frozen=True)
class Shortage:
    """Why a budget admits no module at all.

    Attributes:
        amount: what was asked for.
        account: of the budget.
        name: the module that would have to fit.
        cost: what it adds.
        place: why it is that one, in words.
        smallest: parameters of the smallest candidate.
    """

    amount: float
    account: Account
    name: str
    cost: int
    place: str
    smallest: int

    #: how every such message goes on
    SO = "so nothing would be fully fine-tuned; give at least"

    @property
    def enough(self) -> str:
        """The smallest share that is enough, rounded up at the sixth decimal, so that the number shown works."""
        return f"{math.ceil(Fraction(self.cost, sum(self.account.costs)) * 10**6) / 10**6:g}"


def budget_limit(total: int, ratio: float) -> int:
    """``floor(ratio * total)`` in exact arithmetic, reading ``ratio`` as the decimal the user wrote.

    ``int(0.29 * 100)`` is 28 in floating point; this gives 29.
    """
    return math.floor(Fraction(repr(float(ratio))) * total)


class BudgetMode(ABC):
    """One way to limit full fine-tuning.

    Attributes:
        name: as in ``budget.mode`` and in the artifact.
        limits: whether a budget was applied; not where the criterion named its modules.
    """

    name: str
    limits: bool = True

    @abstractmethod
    def account(
        self, candidates: Sequence[Candidate], amount: float | None, rank: int, places: Sequence[str] | None = None
    ) -> Account:
        """The account before the criterion tunes any module fully.

        Args:
            candidates: the M candidates.
            amount: what the user asked for: the value of the option in ``config.BUDGET_AMOUNTS``.
            rank: LoRA rank r of the modules that stay LoRA.
            places: ``[M]``, from ``placement.places_of``; None where all are left to the criterion.

        Raises:
            AllocationError: the amount is missing or out of range, or the candidates lack what this mode counts.
        """

    @abstractmethod
    def shortage(self, short: Shortage) -> str:
        """One line: why nothing fits, with an amount that is enough."""

    @abstractmethod
    def summary(self, record: BudgetRecord, total: int, modules: int, criterion: str) -> str:
        """One line for a terminal: what was asked, allowed and used, in the unit of the mode.

        Args:
            record: of the allocation.
            total: parameters of the candidates that are left to the criterion.
            modules: how many those are.
            criterion: that chose.
        """

    @abstractmethod
    def table(self, record: BudgetRecord, total: int, modules: int, full: int) -> list[str]:
        """The same as lines of Markdown; ``full`` is the number of parameters of the fully fine-tuned modules."""

    def require_room(self, account: Account, rank: int) -> None:  # noqa: B027  most modes start from nothing
        """Raise ``AllocationError`` where the limit is exceeded before any module is fully fine-tuned."""

    def asked(self, record: BudgetRecord) -> float:
        """The amount that an allocation was made with."""
        return record.ratio

    def recorded_ratio(self, amount: float | None, share: float) -> float:
        """What stands in ``BudgetRecord.ratio``; ``share`` of the candidate parameters became full."""
        return float(amount)

    def expected(
        self,
        record: BudgetRecord,
        candidates: Sequence[Candidate],
        full: Sequence[bool],
        places: Sequence[str] | None = None,
    ) -> BudgetRecord:
        """The record that fits the assignment, for comparison; ``full`` ``[M]`` says which candidates are full."""
        account = self.account(candidates, self.asked(record), record.lora_rank, places)
        used = account.start + sum(cost for cost, taken in zip(account.costs, full, strict=True) if taken)
        ratio = self.recorded_ratio(self.asked(record), _share(candidates, full))
        return replace(record, ratio=ratio, limit=account.limit, used=used)


class ShareMode(BudgetMode):
    """A share of something that every candidate has."""

    unit: str

    @abstractmethod
    def costs(self, candidates: Sequence[Candidate]) -> list[int]:
        """What each candidate counts for."""

    def account(
        self, candidates: Sequence[Candidate], amount: float | None, rank: int, places: Sequence[str] | None = None
    ) -> Account:
        if amount is None or not 0 < amount <= 1:
            raise AllocationError(f"budget.ratio: {amount!r}; give a fraction in (0, 1], e.g. 0.1")
        places = places or [AUTO] * len(candidates)
        costs = [cost if place == AUTO else 0 for cost, place in zip(self.costs(candidates), places, strict=True)]
        return Account(budget_limit(sum(costs), amount), 0, costs)

    def _whole(self, total: int, modules: int) -> int:
        return total

    def summary(self, record: BudgetRecord, total: int, modules: int, criterion: str) -> str:
        whole = self._whole(total, modules)
        return (
            f"budget: {100 * record.ratio:g} % of {whole:,} {self.unit} = {record.limit:,}; "
            f"used {record.used:,} ({100 * record.used / whole:.2f} %)"
        )

    def table(self, record: BudgetRecord, total: int, modules: int, full: int) -> list[str]:
        whole = self._whole(total, modules)
        return [
            f"| | {self.unit} | of the candidates |",
            "| --- | ---: | ---: |",
            f"| asked ({self.name}, overflow {record.overflow}) | | {100 * record.ratio:g} % |",
            f"| limit | {record.limit:,} | {100 * record.limit / whole:.3f} % |",
            f"| used | {record.used:,} | {100 * record.used / whole:.3f} % |",
        ]


class ParametersMode(ShareMode):
    """The share of candidate parameters, weights and biases (Eq. 4)."""

    name = unit = "parameters"

    def costs(self, candidates: Sequence[Candidate]) -> list[int]:
        return [candidate.parameters for candidate in candidates]

    def shortage(self, short: Shortage) -> str:
        return (
            f"budget.ratio: {short.amount} allows {short.account.limit:,} of {sum(short.account.costs):,} parameters, "
            f"but {short.name}, {short.place}, has {short.cost:,} (the smallest candidate has {short.smallest:,}), "
            f"{short.SO} {short.enough}"
        )


class ModulesMode(ShareMode):
    """The share of candidate modules (§4.4)."""

    name = unit = "modules"

    def costs(self, candidates: Sequence[Candidate]) -> list[int]:
        return [1] * len(candidates)

    def shortage(self, short: Shortage) -> str:
        whole = sum(short.account.costs)
        return (
            f"budget.ratio: {short.amount} allows {short.account.limit} of {whole} modules, {short.SO} {short.enough}"
        )

    def _whole(self, total: int, modules: int) -> int:
        return modules

    def table(self, record: BudgetRecord, total: int, modules: int, full: int) -> list[str]:
        return [*super().table(record, total, modules, full), "", _weight(full, total)]


class TotalTrainableMode(BudgetMode):
    """The number of trainable parameters, full fine-tuning and LoRA together."""

    name = "total_trainable"

    def account(
        self, candidates: Sequence[Candidate], amount: float | None, rank: int, places: Sequence[str] | None = None
    ) -> Account:
        if amount is None or amount < 1:
            raise AllocationError(f"budget.total: {amount!r}; give the largest number of trainable parameters")
        for candidate in candidates:
            if candidate.in_features < 1 or candidate.out_features < 1:
                raise AllocationError(
                    f"budget.mode: 'total_trainable' needs the dimensions of {candidate.name}, which an artifact of an "
                    f"earlier version does not hold; probe again with hybrid-lora-probe, or use mode 'parameters'"
                )
        start, costs = 0, []
        for candidate, place in zip(candidates, places or [AUTO] * len(candidates), strict=True):
            before = candidate.lora_parameters(rank) if unless_full(place, candidate) == LORA else 0
            start += candidate.parameters if place == FULL else before
            costs.append(candidate.parameters - before if place == AUTO else 0)
        return Account(int(amount), start, costs)

    def require_room(self, account: Account, rank: int) -> None:
        if account.start > account.limit:
            raise AllocationError(
                f"budget.total: {account.limit:,}, but LoRA of rank {rank} on the candidates, with those placed full, "
                f"alone has {account.start:,} parameters; give more than that, or a smaller lora.rank"
            )

    def asked(self, record: BudgetRecord) -> float:
        return record.limit

    def recorded_ratio(self, amount: float | None, share: float) -> float:
        return share

    def shortage(self, short: Shortage) -> str:
        limit, start = short.account.limit, short.account.start
        return (
            f"budget.total: {limit:,} leaves {limit - start:,} parameters beyond LoRA on every candidate, but "
            f"{short.name}, {short.place}, adds {short.cost:,}, {short.SO} {start + short.cost}"
        )

    def summary(self, record: BudgetRecord, total: int, modules: int, criterion: str) -> str:
        return f"budget: {record.limit:,} trainable parameters, LoRA included; used {record.used:,}"

    def table(self, record: BudgetRecord, total: int, modules: int, full: int) -> list[str]:
        return [
            f"Budget mode {self.name}, overflow {record.overflow}: full fine-tuning and LoRA together.",
            "",
            "| | trainable parameters | of the limit |",
            "| --- | ---: | ---: |",
            f"| limit | {record.limit:,} | 100.000 % |",
            f"| used | {record.used:,} | {100 * record.used / record.limit:.3f} % |",
            "",
            _weight(full, total),
        ]


class FixedMode(BudgetMode):
    """No budget: the criterion named its modules. No user chooses this mode."""

    name, limits = "fixed", False

    def account(
        self, candidates: Sequence[Candidate], amount: float | None, rank: int, places: Sequence[str] | None = None
    ) -> Account:
        raise AllocationError(f"budget.mode: {self.name!r} is not supported; choose one of {', '.join(CHOICES)}")

    def shortage(self, short: Shortage) -> str:
        raise NotImplementedError("a criterion that names its modules is short of nothing")

    def expected(
        self,
        record: BudgetRecord,
        candidates: Sequence[Candidate],
        full: Sequence[bool],
        places: Sequence[str] | None = None,
    ) -> BudgetRecord:
        taken = sum(candidate.parameters for candidate, is_full in zip(candidates, full, strict=True) if is_full)
        return replace(record, ratio=_share(candidates, full), limit=taken, used=taken)

    def summary(self, record: BudgetRecord, total: int, modules: int, criterion: str) -> str:
        return (
            f"budget: none, criterion {criterion} names the modules; they have {record.used:,} of {total:,} parameters "
            f"({100 * record.ratio:.2f} %)"
        )

    def table(self, record: BudgetRecord, total: int, modules: int, full: int) -> list[str]:
        return [
            "The criterion itself says which modules are fully fine-tuned; no budget limits them.",
            "",
            "| | parameters | of the candidates |",
            "| --- | ---: | ---: |",
            f"| fully fine-tuned | {full:,} | {100 * full / total:.3f} % |",
        ]


_MODES: dict[str, BudgetMode] = {
    mode.name: mode for mode in (ParametersMode(), ModulesMode(), TotalTrainableMode(), FixedMode())
}
FIXED = FixedMode.name
CHOICES = tuple(name for name, mode in _MODES.items() if mode.limits)


def budget_mode(name: str) -> BudgetMode:
    """The mode of that name, ``fixed`` included.

    Raises:
        AllocationError: there is none; the message lists those a user can choose.
    """
    if name not in _MODES:
        raise AllocationError(f"budget.mode: {name!r} is not supported; choose one of {', '.join(CHOICES)}")
    return _MODES[name]


def _share(candidates: Sequence[Candidate], full: Sequence[bool]) -> float:
    taken = sum(candidate.parameters for candidate, is_full in zip(candidates, full, strict=True) if is_full)
    return taken / sum(candidate.parameters for candidate in candidates)


def _weight(full: int, total: int) -> str:
    return f"The fully fine-tuned modules hold {full:,} parameters, {100 * full / total:.3f} % of the candidates."
