"""From rows to batches: a fixed validation split and a data order that needs no memory.

Every batch is a function of the seed and its number alone, so a resumed run sees exactly the rows that an
uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from datetime import date
from typing import Any, NamedTuple

import torch

from hybrid_lora_plugin.config import AUTO, ProbeConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.findings import count_of
from hybrid_lora_plugin.probing.data.layout import Layout
from hybrid_lora_plugin.probing.data.rows import Rows, read_rows
from hybrid_lora_plugin.probing.data.selection import Selection
from hybrid_lora_plugin.probing.data.tokens import Example, RowTokenizer
from hybrid_lora_plugin.probing.forward import IGNORED, Batch
from hybrid_lora_plugin.probing.progress import Progress
from hybrid_lora_plugin.seeding import generator


class TrialRows(NamedTuple):
    """What a trial needs of the rows beside a probe."""

    #: held out behind those of the validation batches
    held_out: int
    #: trained on at most; those of the warm-up are among them
    training: int
    batch_size: int


class ProbeData:
    """The rows of a probe: whole batches of B held out for validation, the others for the warm-up.

    Rows are taken in a seeded random order and tokenised only as far as they are needed: first the
    validation rows, then one for each row of the warm-up, or as many as there are. Only their tokens are kept,
    so the object can be sent to other processes.

    Attributes:
        validation_batches: how many there are, enough for K partitions at ``partitions_per_batch`` each.
        record: what the artifact says about the data: files, split, counts and a digest of the tokens used.
        told: what a user should know about the rows, a sentence each.
        dropped: rows looked at whose response did not fit into ``max_length``.
        date: the day that the chat template prints; None if it prints none.
    """

    def __init__(
        self,
        config: ProbeConfig,
        tokenizer: Any,
        *,
        vocabulary: int | None = None,
        stops: Collection[int] = (),
        day: date | None = None,
        progress: Progress | None = None,
        trial: TrialRows | None = None,
    ) -> None:
        """Read, tokenise and split.

        Args:
            config: of the probe.
            tokenizer: a ``transformers`` tokenizer.
            vocabulary: rows of the model's embedding; by default not checked.
            stops: token ids at which a rollout ends, beside the tokenizer's end token.
            day: what a chat template takes for today; today by default.
            progress: where reading is reported.
            trial: what a trial needs besides.

        Raises:
            ProbeError: as ``read_rows`` and ``RowTokenizer``; too few rows; no response fits into ``max_length``.
        """
        progress = progress or Progress()
        rows, sources = read_rows(config.files, Layout.of(config), progress.reading)
        self._batch_size, self._seed = config.batch_size, config.seed
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # Padding is masked, but its embedding is looked up.
        self._pad = pad if pad is not None and (vocabulary is None or pad < vocabulary) else 0
        self.validation_batches = math.ceil(config.most_partitions / config.partitions_per_batch)
        self._trial = trial or TrialRows(0, 0, config.batch_size)
        held_out = self.validation_batches * config.batch_size + self._trial.held_out
        training = max(config.most_warmup_steps * config.batch_size, self._trial.training)
        tokens_of = RowTokenizer(tokenizer, train_on=config.train_on, day=day, vocabulary=vocabulary, stops=stops)
        order = torch.randperm(len(rows), generator=generator(config.seed, "split")).tolist()
        chosen = Selection(held_out, training, config.max_length)
        chosen.take(rows, order, tokens_of, progress)
        self.dropped = chosen.dropped
        self._refuse_too_few(config, rows, chosen, held_out)
        self._validation = [example for _, example in chosen.held_out]
        self._training = [example for _, example in chosen.training]
        self.date = tokens_of.printed_date
        usable = self._validation + self._training
        self.record = {
            "files": sources,
            "rows": len(rows),
            # Numbered from 0 over all files in their order.
            "validation_rows": [index for index, _ in chosen.held_out],
            "warmup_rows": len(self._training),
            "train_on": config.train_on,
            "date": self.date,
            "counts": {
                "looked_at": chosen.looked_at,
                "trained_tokens": sum(example.trained for example in usable),
                "without_response": chosen.dropped,
                "cut": sum(example.cut > 0 for example in usable),
                "cut_tokens": sum(example.cut for example in usable),
                "cut_response_tokens": sum(example.lost for example in usable),
                "left_out_as_held_out": chosen.repeats_of_held_out,
                "repeated_in_warmup": chosen.repeats_in_training,
            },
            "tokens_sha256": _digest(usable),
        }
        self.told = self._sentences(config, rows, tokens_of)
        self.record["told"] = self.told

    def _refuse_too_few(self, config: ProbeConfig, rows: Rows, chosen: Selection, held_out: int) -> None:
        usable = len(chosen.held_out) + len(chosen.training)
        if not usable:
            raise ProbeError(
                f"probe.max_length: {config.max_length} tokens cut away the response of all {len(rows)} rows; "
                f"raise it or give shorter prompts"
            )
        trial = f"{self._trial.held_out} rows of the trial and one of its batches, " if self._trial.held_out else ""
        needed = held_out + max(
            min(1, config.most_warmup_steps) * config.batch_size, min(1, self._trial.training) * self._trial.batch_size
        )
        if usable < needed:
            and_warmup = "and one warm-up batch " if config.most_warmup_steps else ""
            repeats = chosen.repeats_of_held_out
            and_repeats = f", {repeats} more have the tokens of a held-out row" if repeats else ""
            raise ProbeError(
                f"probe.files: {usable} usable rows ({self.dropped} more do not fit probe.max_length{and_repeats}), "
                f"but {needed} are needed: {trial}{self.validation_batches} validation batches {and_warmup}of "
                f"{config.batch_size}; give more rows or lower probe.batch_size or "
                f"{'probe.max_partitions' if config.partitions == AUTO else 'probe.partitions'}"
                f"{' or trial.held_out_rows' if trial else ''}"
            )

    def _sentences(self, config: ProbeConfig, rows: Rows, tokens_of: RowTokenizer) -> list[str]:
        counts = self.record["counts"]
        tokens = sum(len(example.input_ids) for example in self._validation + self._training)
        purpose = "warm-up and the trial" if self._trial.held_out else "warm-up"
        told = [
            f"{count_of(len(rows), 'row')}: {len(self._validation):,} held out, {len(self._training):,} for the "
            f"{purpose}; {counts['trained_tokens']:,} of their {count_of(tokens, 'token')} are trained"
        ]
        if self.dropped:
            told.append(
                f"{count_of(self.dropped, 'row')} left out: no response token within "
                f"probe.max_length={config.max_length}"
            )
        if counts["cut"]:
            told.append(
                f"{count_of(counts['cut'], 'row')} cut at probe.max_length={config.max_length}: "
                f"{count_of(counts['cut_tokens'], 'token')} lost, {counts['cut_response_tokens']:,} of them of "
                f"responses"
            )
        if counts["left_out_as_held_out"]:
            told.append(f"{count_of(counts['left_out_as_held_out'], 'row')} left out: the same tokens are held out")
        if counts["repeated_in_warmup"]:
            told.append(
                f"{count_of(counts['repeated_in_warmup'], 'row')} of the warm-up repeat the tokens of another: kept"
            )
        if self.date:
            told.append(
                f"the chat template prints the date: {self.date} in this probe, also if it is continued on another day "
                f"(probe.date={self.date} makes it again)"
            )
        elif config.date:
            told.append("probe.date has no effect: the chat template prints no date")
        if rows.unused:
            told.append(f"columns that nothing reads: {', '.join(rows.unused)}")
        return told + tokens_of.findings.lines()

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(example.input_ids) for example in self._validation + self._training)

    @property
    def first_held_out(self) -> Example:
        """The first row of the first validation batch."""
        return self._validation[0]

    def warmup_batch(self, step: int) -> Batch:
        """The batch of warm-up step ``step`` (from 0): ``[B, S]``; rows are shuffled anew in every epoch."""
        return self._training_batch(step, self._batch_size)

    def trial_batch(self, step: int) -> Batch:
        """The same of step ``step`` of a trial: ``[B, S]`` with B of the trial."""
        return self._training_batch(step, self._trial.batch_size)

    def trial_held_out(self) -> list[Batch]:
        """All rows that a trial compares on, in batches of its B; disjoint from all others."""
        rows = self._validation[self.validation_batches * self._batch_size :]
        size = self._trial.batch_size
        return [self._collate(rows[first : first + size]) for first in range(0, len(rows), size)]

    def _training_batch(self, step: int, rows: int) -> Batch:
        count = len(self._training)
        examples = []
        for position in range(step * rows, (step + 1) * rows):
            epoch, offset = divmod(position, count)
            order = torch.randperm(count, generator=generator(self._seed, "epoch", epoch))
            examples.append(self._training[int(order[offset])])
        return self._collate(examples)

    def validation_batch(self, index: int) -> Batch:
        """Validation batch ``index`` (from 0, below ``validation_batches``): ``[B, S]``, disjoint from all others and
        from the warm-up.
        """
        start = index * self._batch_size
        return self._collate(self._validation[start : start + self._batch_size])

    def _collate(self, examples: Sequence[Example]) -> Batch:
        shape = (len(examples), max(len(example.input_ids) for example in examples))
        batch = Batch(torch.full(shape, self._pad), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED))
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            ids = torch.frombuffer(example.input_ids, dtype=torch.int32)
            batch.input_ids[row, :length] = ids
            batch.attention_mask[row, :length] = 1
            for start, end in example.spans:
                batch.labels[row, start:end] = ids[start:end]
        return batch


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        ids, spans = example.input_ids.tolist(), [list(span) for span in example.spans]
        # A single response that ends the row is written as in the first release.
        plain = len(spans) == 1 and spans[0][1] == len(ids)
        digest.update(json.dumps([ids, example.response_start if plain else spans]).encode())
    return digest.hexdigest()
