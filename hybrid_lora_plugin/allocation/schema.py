"""What an allocation says, as records: the model, how modules were selected, how it was probed, the budget, the
modules.

``allocation.json`` holds exactly these fields (schema version 2). ``storage`` reads and writes it, ``schema_v1`` reads
what earlier versions wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_lora_plugin.allocation.budget import FULL, LORA, BudgetRecord
from hybrid_lora_plugin.candidates import Candidate, architecture_of, model_fingerprint
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.linear_account import FrozenLinear
from hybrid_lora_plugin.parameter_counts import ParameterCounts

SCHEMA_VERSION = 2
PROBE_AGAIN = "probe again with hybrid-lora-probe"


@dataclass(frozen=True)
class ModelIdentity:
    """The model an allocation is for.

    Attributes:
        config_sha256: ``candidates.model_fingerprint``.
        candidate_parameters: weights and biases of all candidates.
        parameters: all parameters of the model, tied ones once; 0 in artifacts that do not record it.
        frozen_linear: the linear modules that are no candidates; empty in artifacts that do not record it.
    """

    name_or_path: str
    architecture: str
    config_sha256: str
    num_layers: int
    candidate_parameters: int
    parameters: int = 0
    frozen_linear: list[FrozenLinear] = field(default_factory=list)


@dataclass(frozen=True)
class SelectionRecord:
    """How the modules were selected, whether or not anything was measured for it.

    Attributes:
        criterion: name in the registry of ``scoring``.
        direction: ``lowest`` or ``highest`` score first; never ``auto``.
        normalise: what was divided out of the score.
        options: the fields of ``config.ControlConfig`` that this criterion reads, e.g. the seed of ``random``.
    """

    criterion: str
    direction: str
    normalise: str
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean negative log-likelihood of the response tokens of validation batches, without masks.

    Attributes:
        before, after: the first step and the last of the warm-up, in nats a token.
        batches: how many validation batches, the first ones.
        tokens: response tokens in them.
    """

    before: float
    after: float
    batches: int
    tokens: int


@dataclass(frozen=True)
class AutoStop:
    """How a number was found that was left to the probe.

    Attributes:
        limit: most there could have been.
        every: steps or partitions between two checks.
        threshold: what a check had to find.
        checks: what each found: the share of modules that a bootstrap was sure of, or, of a warm-up, the overlap
            (Jaccard) of the choice with that of the check before, from the second on.
        reason: ``settled`` or ``limit``.
        partitions: scored in each check of a warm-up; 0 where the partitions themselves are meant.
    """

    limit: int
    every: int
    threshold: float
    checks: list[float]
    reason: str
    partitions: int = 0


@dataclass(frozen=True)
class SeedRecord:
    """One of several probes that differ in nothing but the seed; fields as of ``ProbeRecord``.

    Attributes:
        data: what differs from seed to seed in ``ProbeRecord.data``.
    """

    seed: int
    warmup_steps: int
    partitions: int
    data: dict
    held_out: HeldOutLoss | None = None
    warmup_auto: AutoStop | None = None
    partitions_auto: AutoStop | None = None


@dataclass(frozen=True)
class ProbeRecord:
    """How the measurements were made. An allocation has none where nothing was probed.

    Attributes:
        method: name of the probe method, or ``unknown`` where an artifact of version 1 does not tell.
        rank: of the probe's adapters.
        lr: learning rate of the warm-up.
        partitions: T, rows of each series of measurements.
        batch_size: rows of a batch; of a policy probe, prompts of a step.
        max_length: longest row in tokens; 0 for a policy probe, whose rollouts set their own length.
        dtype: of the frozen base.
        data: rows and split, or the settings of the run whose rollouts were scored.
        options: settings of this method only.
        held_out: None of a policy probe, and in artifacts that do not record it; then the file has no such key.
        warmup_auto: how ``warmup_steps`` was found where it was ``auto``; else None, and no such key.
        partitions_auto: the same of ``partitions``.
        seeds: each probe, where there were several; then ``seed``, ``warmup_steps``, ``partitions`` and ``data`` are of
            the first, and what each found out is here alone. Else None, and no such key.
    """

    method: str
    objective: str
    rank: int
    init: str
    warmup_steps: int
    lr: float
    partitions: int
    partitions_per_batch: int
    batch_size: int
    max_length: int
    dtype: str
    seed: int
    data: dict
    options: dict = field(default_factory=dict)
    held_out: HeldOutLoss | None = None
    warmup_auto: AutoStop | None = None
    partitions_auto: AutoStop | None = None
    seeds: list[SeedRecord] | None = None


@dataclass(frozen=True, kw_only=True)
class ModuleRecord(Candidate):
    """A candidate with its moments over T batches (Eq. 15), its score and its assignment.

    Attributes:
        signal: whether anything was measured; a module without is never selected.
        assignment: ``full`` or ``lora``.
    """

    mean: float
    std: float
    score: float
    signal: bool
    assignment: str


@dataclass(frozen=True)
class AgreementRecord:
    """How far probes of several seeds agree.

    Attributes:
        method: how one choice is made of them: ``mean rank``.
        seeds: in their order.
        chosen: names of the modules that each would choose by itself, in model order.
        overlaps: Jaccard index of each two choices: the first with each later one, then the second, and so on.
    """

    method: str
    seeds: list[int]
    chosen: list[list[str]]
    overlaps: list[float]


@dataclass(frozen=True)
class StabilityRecord:
    """What a bootstrap over the validation batches chose; each list in the order of the M modules.

    Attributes:
        draws: how often T of the T batches were drawn, with replacement.
        batches: T, of all seeds together where there are several: each draws from its own.
        seed: of the draws.
        shares: in which share of the draws a module was chosen for full fine-tuning.
        low: 5 % quantile of its scores in the draws.
        high: 95 % quantile.
    """

    draws: int
    batches: int
    seed: int
    shares: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class LossDifference:
    """One candidate's held-out loss minus another's, of the same rows.

    Attributes:
        mean: in nats a token; below 0 the first is better.
        low, high: 95 % interval, by a bootstrap over the rows that keeps each row's pair together.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class TrialCandidate:
    """An allocation that was trained in a trial.

    Attributes:
        name: the entry of ``trial.portfolio`` that chose it, ``random:N``, or ``lora``.
        also: other entries that chose the same modules, and share its run.
        modules: names of the fully tuned ones, in model order.
        rank: of the adapters on the others.
        trainable_parameters: of both.
        losses: held-out loss after each round that it took part in, in nats a token.
        dropped: number of the round, from 1, after which it was dropped; 0 where it stayed to the end.
        diverged: step, from 1, whose loss was no number; 0 where none was. Then the last round has no loss.
        difference: to the best candidate of its last round; None of that one, and of one that diverged.
    """

    name: str
    also: list[str]
    modules: list[str]
    rank: int
    trainable_parameters: int
    losses: list[float]
    dropped: int = 0
    diverged: int = 0
    difference: LossDifference | None = None


@dataclass(frozen=True)
class TrialRecord:
    """Successive halving of candidate allocations from one start.

    Attributes:
        rounds: optimizer steps of a candidate at the end of each round.
        start: held-out loss before the first step, the same for all.
        rows, tokens: that candidates were compared on.
        batch_size: rows of a step.
        steps: optimizer steps of all candidates together.
        candidates: in the order of the portfolio, random draws behind it.
        chosen: name of the one that the allocation is of.
        alike: names of the candidates of the last round that the rows cannot tell from the best, that one included.
        lora: LoRA of the same trainable size, as a control.
        against_lora: the chosen one's loss minus that control's.
    """

    rounds: list[int]
    start: float
    rows: int
    tokens: int
    batch_size: int
    steps: int
    candidates: list[TrialCandidate]
    chosen: str
    alike: list[str]
    lora: TrialCandidate | None = None
    against_lora: LossDifference | None = None


@dataclass(frozen=True)
class Allocation:
    """A checked allocation, as written to and read from ``allocation.json``.

    Attributes:
        modules: the M candidates in model order.
        environment: versions of the libraries that made it.
        probe: None where nothing was probed; then the file has no such key.
        agreement: of several seeds; None where there was one; likewise.
        stability: None where there were no batches to draw from, and in artifacts that do not record it; likewise.
        trial: of criterion ``trial``; likewise.
    """

    model: ModelIdentity
    selection: SelectionRecord
    budget: BudgetRecord
    modules: list[ModuleRecord]
    environment: dict
    probe: ProbeRecord | None = None
    stability: StabilityRecord | None = None
    agreement: AgreementRecord | None = None
    trial: TrialRecord | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def full_names(self) -> list[str]:
        """Names of the fully fine-tuned modules, in model order."""
        return [module.name for module in self.modules if module.assignment == FULL]

    @property
    def lora_names(self) -> list[str]:
        """Names of the LoRA modules, in model order."""
        return [module.name for module in self.modules if module.assignment == LORA]

    @property
    def full_parameters(self) -> int:
        """Parameters of all fully fine-tuned modules together."""
        return sum(module.parameters for module in self.modules if module.assignment == FULL)

    def parameter_counts(self) -> ParameterCounts:
        """The parameters of the whole model under this allocation, adapters at the rank of its budget.

        Raises:
            AllocationError: the artifact was written before it recorded what this takes.
        """
        if self.model.parameters < 1 or any(
            module.in_features < 1 or module.out_features < 1 for module in self.modules
        ):
            raise AllocationError(
                f"model.parameters: the parameters of the model and the dimensions of its modules are not recorded, as "
                f"in an artifact of an earlier version; {PROBE_AGAIN}"
            )
        lora = sum(m.lora_parameters(self.budget.lora_rank) for m in self.modules if m.assignment == LORA)
        return ParameterCounts(self.model.parameters - self.full_parameters, self.full_parameters, lora)

    def check_model(self, config: Any, candidates: Sequence[Candidate]) -> None:
        """Refuse to be applied to a model other than the one that was probed.

        Args:
            config: the Hugging Face config of the model to train.
            candidates: ``find_candidates`` of that model.

        Raises:
            AllocationError: naming both models and the first difference.
        """
        architecture, fingerprint = architecture_of(config), model_fingerprint(config)
        mine = {module.name: module.parameters for module in self.modules}
        theirs = {candidate.name: candidate.parameters for candidate in candidates}
        if architecture != self.model.architecture:
            difference = f"architecture {self.model.architecture} against {architecture}"
        elif mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())
            difference = f"{len(mine)} modules against {len(theirs)}, {odd[0]} is in only one of them"
        elif mine != theirs:
            odd = next(name for name in mine if mine[name] != theirs[name])
            difference = f"{odd} has {mine[odd]:,} parameters against {theirs[odd]:,}"
        elif fingerprint != self.model.config_sha256:
            difference = f"config_sha256 {self.model.config_sha256[:12]} against {fingerprint[:12]}"
        else:
            return
        raise AllocationError(
            f"hybrid_lora.allocation: artifact of another model, made for {self.model.name_or_path!r} but used with "
            f"{getattr(config, '_name_or_path', '')!r}: {difference}; {PROBE_AGAIN} on the model you train",
            see="allocation-of-another-model",
        )
