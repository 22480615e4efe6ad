"""From rows to batches: tokens, a fixed validation split and a data order that needs no memory.

Every batch is a function of the seed and its number alone, so a resumed run sees exactly the rows that an
uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.rows import Row, Rows, read_rows
from hybrid_lora_plugin.probing.forward import IGNORED, Batch
from hybrid_lora_plugin.seeding import generator


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: prompt and response tokens, at most ``max_length``, as int32 because a run keeps thousands of rows.
        response_start: index of the first response token, at least 1.
    """

    input_ids: array[int]
    response_start: int


def tokenize(row: Row, tokenizer: Any, max_length: int) -> Example | None:
    """Tokens of one row as a rollout would produce them: the prompt, then the response and the end token.

    Chat turns go through the tokenizer's chat template with its generation prompt. A plain prompt is one
    user turn if there is a template (as in verl's SFT data), else verbatim text.

    Args:
        row: prompt and response.
        tokenizer: a ``transformers`` tokenizer.
        max_length: the end of a longer row is cut.

    Returns:
        The example, or None if no response token is left.

    Raises:
        ProbeError: chat turns without a chat template, or turns the template refuses.
    """
    if isinstance(row.prompt, str) and tokenizer.chat_template is None:
        prompt_ids = tokenizer(row.prompt)["input_ids"]
    else:
        turns = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        if tokenizer.chat_template is None:
            raise ProbeError(
                "probe.files: rows are chats but the tokenizer has no chat template; give `prompt` and `response` as "
                "texts, or the instruct version of the model"
            )
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever Jinja raises
            raise ProbeError(
                f"probe.files: the chat template refuses a row ({error}); give turns it accepts"
            ) from error
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(row.response, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    input_ids = (prompt_ids + response_ids + end)[:max_length]
    if not prompt_ids or len(prompt_ids) >= len(input_ids):
        return None
    return Example(array("i", input_ids), len(prompt_ids))


def _first_usable(
    rows: Rows, order: Sequence[int], wanted: int, tokens_of: Callable[[Row], Example | None]
) -> tuple[list[tuple[int, Example]], int]:
    """The first rows in an order that have response tokens.

    Args:
        rows: all rows.
        order: their indices, in the order to take them.
        wanted: how many examples to find, if there are as many.
        tokens_of: a row's example, None if it is of no use.

    Returns:
        Index and example of each, in that order, and how many rows before the last one were of no use.
    """
    usable: list[tuple[int, Example]] = []
    looked, request = 0, wanted
    while len(usable) < wanted and looked < len(order):
        asked = order[looked : looked + request]
        # Read in the order of the files, each row reduced to its tokens before the next is decoded.
        examples = {index: tokens_of(row) for index, row in rows.read(asked)}
        for index in asked:
            if len(usable) == wanted:
                break
            looked += 1
            if (example := examples[index]) is not None:
                usable.append((index, example))
        # Every request may cost a pass over the files: ask for twice what the rows so far suggest.
        request = 2 * math.ceil((wanted - len(usable)) * looked / max(1, len(usable)))
    return usable, looked - len(usable)


class ProbeData:
    """The rows of a probe: whole batches of B held out for validation, the others for the warm-up.

    Rows are taken in a seeded random order and tokenised only as far as they are needed: first the
    validation rows, then one for each row of the warm-up, or as many as there are. Only their tokens are kept,
    so the object can be sent to other processes.

    Attributes:
        validation_batches: how many there are, enough for K partitions at ``partitions_per_batch`` each.
        record: what the artifact says about the data: files, split and a digest of the tokens used.
        largest_id: the largest token id in them.
        dropped: rows looked at whose response did not fit into ``max_length``.
    """

    def __init__(self, config: ProbeConfig, tokenizer: Any) -> None:
        """Read, tokenise and split.

        Raises:
            ProbeError: as ``read_rows`` and ``tokenize``; too few rows; no response fits into ``max_length``.
        """
        rows, sources = read_rows(config.files)
        self._batch_size, self._seed = config.batch_size, config.seed
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = pad if pad is not None else 0
        self.validation_batches = math.ceil(config.partitions / config.partitions_per_batch)
        held_out = self.validation_batches * config.batch_size
        wanted = held_out + config.warmup_steps * config.batch_size
        order = torch.randperm(len(rows), generator=generator(config.seed, "split")).tolist()
        usable, self.dropped = _first_usable(
            rows, order, wanted, lambda row: tokenize(row, tokenizer, config.max_length)
        )
        if not usable:
            raise ProbeError(
                f"probe.max_length: {config.max_length} tokens cut away the response of all {len(rows)} rows; "
                f"raise it or give shorter prompts"
            )
        needed = held_out + min(1, config.warmup_steps) * config.batch_size
        if len(usable) < needed:
            and_warmup = "and one warm-up batch " if config.warmup_steps else ""
            raise ProbeError(
                f"probe.files: {len(usable)} usable rows ({self.dropped} more do not fit probe.max_length), but "
                f"{needed} are needed: {self.validation_batches} validation batches {and_warmup}of "
                f"{config.batch_size}; give more rows or lower probe.batch_size or probe.partitions"
            )
        self._validation = [example for _, example in usable[:held_out]]
        self._training = [example for _, example in usable[held_out:]]
        self.largest_id = max(max(example.input_ids) for _, example in usable)
        digest = hashlib.sha256()
        for _, example in usable:
            digest.update(json.dumps([example.input_ids.tolist(), example.response_start]).encode())
        self.record = {
            "files": sources,
            "rows": len(rows),
            # Numbered from 0 over all files in their order.
            "validation_rows": [index for index, _ in usable[:held_out]],
            "warmup_rows": len(self._training),
            "tokens_sha256": digest.hexdigest(),
        }

    def warmup_batch(self, step: int) -> Batch:
        """The batch of warm-up step ``step`` (from 0): ``[B, S]``; rows are shuffled anew in every epoch."""
        count = len(self._training)
        examples = []
        for position in range(step * self._batch_size, (step + 1) * self._batch_size):
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
            length, start = len(example.input_ids), example.response_start
            ids = torch.frombuffer(example.input_ids, dtype=torch.int32)
            batch.input_ids[row, :length] = ids
            batch.attention_mask[row, :length] = 1
            batch.labels[row, start:length] = ids[start:]
        return batch
