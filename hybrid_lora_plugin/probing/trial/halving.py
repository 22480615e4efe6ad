"""The rounds of a trial: every candidate is trained on, compared on the held-out rows, and the worse ones are dropped.

Everything it decides is a function of what was measured, so it is the same on all ranks and after a resume.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.schema import TrialCandidate, TrialRecord
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import IGNORED, Batch
from hybrid_lora_plugin.probing.trial.contender import ContenderModel
from hybrid_lora_plugin.probing.trial.portfolio import Contender
from hybrid_lora_plugin.probing.trial.schedule import Cost, Round, cost_of
from hybrid_lora_plugin.probing.trial.verdict import alike, loss_difference, mean_loss, ranked

#: name of the losses before the first step
START = "start"


class Memory(Protocol):
    """What a trial remembers of itself. Ranks make the same calls; the first one's answers count."""

    def losses(self) -> dict[str, list[list[float]]]:
        """Row losses ``[N]`` by name, of each round that is done; a round in which the candidate diverged is empty."""

    def diverged(self) -> dict[str, int]:
        """Step, from 1, at which a candidate's loss was no number, by name."""

    def note_losses(self, name: str, sums: list[float], diverged: int = 0) -> None:
        """Keep the row losses of one more round."""

    def load(self, name: str) -> tuple[int, dict[str, Tensor]] | None:
        """A candidate's kept step and state; of other ranks than the first no tensors."""

    def save(self, name: str, step: int, tensors: dict[str, Tensor]) -> None:
        """Replace a candidate's kept state."""

    def forget(self, name: str) -> None:
        """Remove a candidate's state, if one is kept."""


class Halving:
    """A trial of given candidates."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        lora: Contender | None,
        rounds: Sequence[Round],
        candidates: Sequence[Candidate],
        *,
        make: Callable[[Contender], ContenderModel],
        batch: Callable[[int], Batch],
        held_out: Sequence[Batch],
        memory: Memory,
        continues: bool,
        after_step: Callable[[Callable[[], None]], None] = lambda save: None,
        note: Callable[[str], None] = lambda text: None,
        advance: Callable[[int, float], None] = lambda done, loss: None,
    ) -> None:
        """Nothing is trained yet.

        Args:
            contenders: two or more, in the order of preference.
            lora: the control, in every round.
            rounds: as ``schedule.rounds_of``.
            candidates: the M candidates.
            make: a contender's model at its start.
            batch: number of a step, from 0 -> its rows.
            held_out: that contenders are compared on.
            memory: what an earlier start did.
            continues: whether survivors go on from their kept state.
            after_step: called after each step with what keeps the state.
            note, advance: what the user sees; ``advance`` gets the steps of all contenders so far and the last loss.
        """
        self._contenders, self._lora, self._rounds, self._candidates = contenders, lora, rounds, candidates
        self._make, self._batch, self._held_out, self._memory = make, batch, held_out, memory
        self._continues, self._after_step, self._note, self._advance = continues, after_step, note, advance
        self._tokens = [int(n) for one in held_out for n in (one.labels[:, 1:] != IGNORED).sum(dim=1)]
        self._done = 0

    @property
    def cost(self) -> Cost:
        """Of the whole trial."""
        return cost_of(self._rounds, self._lora is not None, self._continues)

    @property
    def taken(self) -> int:
        """Steps in rounds that an earlier start has done."""
        ends = [0, *(one.steps for one in self._rounds)]
        named = {one.name for one in (*self._contenders, *([self._lora] if self._lora else []))}
        return sum(
            end - (start if self._continues else 0)
            for name, rounds in self._memory.losses().items()
            if name in named
            for start, end in zip(ends[: len(rounds)], ends[1:], strict=False)
        )

    def run(self) -> TrialRecord:
        """Train what is missing, and choose.

        Raises:
            ProbeError: every candidate diverged.
        """
        stay, dropped, before = [one.name for one in self._contenders], {}, 0
        named = {one.name: one for one in self._contenders}
        for number, one in enumerate(self._rounds):
            last = number + 1 == len(self._rounds)
            keep = len(stay) if last else self._rounds[number + 1].candidates
            for name in stay:
                self._train(named[name], number, before)
                if not last:
                    self._forget_worse(stay, number, keep)
            if self._lora is not None:
                self._train(self._lora, number, before)
            before = one.steps
            sums = {name: self._memory.losses()[name][number] for name in stay}
            order = ranked(sums, self._tokens)
            if not sums[order[0]]:
                raise ProbeError(
                    f"trial.full_lr: the loss of every candidate was no number before step {one.steps}; lower "
                    "trial.full_lr and trial.lora_lr, or use model.dtype=float32"
                )
            if not last:
                kept = set(order[:keep])
                dropped |= {name: number + 1 for name in stay if name not in kept}
                stay = [name for name in stay if name in kept]
            said = ", ".join(f"{name} {self._loss(name, number)}" for name in order)
            self._note(f"trial, round {number + 1} of {len(self._rounds)}, {one.steps} steps: {said}")
        return self._record(stay, dropped)

    def _loss(self, name: str, number: int) -> str:
        sums = self._memory.losses()[name][number]
        return f"{mean_loss(sums, self._tokens):.4f}" if sums else "diverged"

    def _forget_worse(self, stay: Sequence[str], number: int, keep: int) -> None:
        """Remove the states of candidates that cannot stay any more, so that few are kept at a time."""
        found = self._memory.losses()
        done = {name: found[name][number] for name in stay if len(found.get(name, ())) > number}
        for name in ranked(done, self._tokens)[keep:]:
            self._memory.forget(name)

    def _train(self, contender: Contender, number: int, before: int) -> None:
        """One round of one contender."""
        name, target = contender.name, self._rounds[number].steps
        found = self._memory.losses()
        first = before if self._continues else 0
        if len(found.get(name, ())) > number:
            self._done += target - first
            return
        if name in self._memory.diverged():
            self._memory.note_losses(name, [])
            self._done += target - first
            return
        sums, diverged = self._trained(contender, number, first)
        self._memory.note_losses(name, sums, diverged)
        if number + 1 == len(self._rounds) or diverged or not self._continues:
            self._memory.forget(name)
        self._done += target - first
        # One model at a time, also where modules of FSDP refer to each other.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _trained(self, contender: Contender, number: int, first: int) -> tuple[list[float], int]:
        """Row losses ``[N]`` at the end of a round, and the step that diverged; then there are no losses."""
        name, target, last = contender.name, self._rounds[number].steps, number + 1 == len(self._rounds)
        model = self._make(contender)
        kept = self._memory.load(name)
        if kept is not None and kept[0] <= target:
            model.load(*kept)
        since = model.step
        if START not in self._memory.losses() and not since:
            sums = self._measured(model)
            if not all(map(math.isfinite, sums)):
                raise ProbeError(
                    "model.dtype: the loss on the held-out rows is no number before the first step; use "
                    "model.dtype=float32 or check that the checkpoint is sound"
                )
            self._memory.note_losses(START, sums)
        while model.step < target:
            loss = model.train(self._batch(model.step))
            self._advance(self._done + model.step - first, loss)
            if not math.isfinite(loss):
                return [], model.step
            self._after_step(lambda: self._memory.save(name, model.step, model.tensors()))
        sums = self._measured(model)
        if not all(map(math.isfinite, sums)):
            return [], model.step
        if self._continues and not last and model.step > since:
            self._memory.save(name, model.step, model.tensors())
        return sums, 0

    def _measured(self, model: ContenderModel) -> list[float]:
        return [value for one in self._held_out for value in model.row_losses(one)]

    def _record(self, stay: Sequence[str], dropped: dict[str, int]) -> TrialRecord:
        """What was found, once all rounds are done; ranks have equal values."""
        found, last = self._memory.losses(), len(self._rounds) - 1
        final = {name: found[name][last] for name in stay}
        same = alike(final, self._tokens)
        chosen = same[0]
        lora = None
        against = None
        if self._lora is not None:
            lora = self._told(self._lora, found, None)
            if found[self._lora.name][last]:
                against = loss_difference(final[chosen], found[self._lora.name][last], self._tokens)
        told = []
        for one in self._contenders:
            number = dropped.get(one.name, last + 1)
            there = {name: found[name][number - 1] for name in found if self._takes_part(name, number, dropped)}
            best = ranked(there, self._tokens)[0]
            told.append(self._told(one, found, found[best][number - 1], number if one.name in dropped else 0, best))
        return TrialRecord(
            rounds=[one.steps for one in self._rounds],
            start=mean_loss(found[START][0], self._tokens),
            rows=len(self._tokens),
            tokens=sum(self._tokens),
            batch_size=self._batch(0).rows,
            steps=self.cost.steps,
            candidates=told,
            chosen=chosen,
            alike=same,
            lora=lora,
            against_lora=against,
        )

    def _takes_part(self, name: str, number: int, dropped: dict[str, int]) -> bool:
        """Whether a candidate is in round ``number``, from 1."""
        lora = self._lora.name if self._lora is not None else None
        return name not in (START, lora) and dropped.get(name, number) >= number

    def _told(
        self,
        one: Contender,
        found: dict[str, list[list[float]]],
        best_sums: list[float] | None,
        dropped: int = 0,
        best: str = "",
    ) -> TrialCandidate:
        rounds = [sums for sums in found[one.name]]
        mine = rounds[(dropped or len(self._rounds)) - 1]
        return TrialCandidate(
            name=one.name,
            also=list(one.also),
            modules=list(one.modules),
            rank=one.rank,
            trainable_parameters=one.trainable_parameters(self._candidates),
            losses=[mean_loss(sums, self._tokens) for sums in rounds if sums],
            dropped=dropped,
            diverged=self._memory.diverged().get(one.name, 0),
            difference=loss_difference(mine, best_sums, self._tokens)
            if best_sums and mine and best != one.name
            else None,
        )
