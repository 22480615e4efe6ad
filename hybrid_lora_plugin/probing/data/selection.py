"""Which rows are held out and which are trained on: the first usable ones of an order, none of them on both sides."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

from hybrid_lora_plugin.probing.data.rows import Row, Rows
from hybrid_lora_plugin.probing.data.tokens import Example
from hybrid_lora_plugin.probing.progress import Progress


class Selection:
    """The rows held out for validation, all different, and the rows of the warm-up, none of which is held out.

    Equal rows are those with equal tokens, of which the same are trained.

    Attributes:
        held_out: index and example of each, in the order in which they were met.
        training: the same of the warm-up, where a row may be there twice: that is how data sets weight rows.
        looked_at: rows that were tokenised until there were enough.
        dropped: of these, rows without a trained token within the longest length.
        repeats_of_held_out: of these, rows left out because they are held out already.
        repeats_in_training: rows of the warm-up that are there already; kept.
    """

    def __init__(self, held_out: int, training: int, max_length: int) -> None:
        """Nothing chosen yet.

        Args:
            held_out: how many to hold out.
            training: how many to train on, if there are as many.
            max_length: where rows are cut, in tokens.
        """
        self.held_out: list[tuple[int, Example]] = []
        self.training: list[tuple[int, Example]] = []
        self.looked_at = self.dropped = self.repeats_of_held_out = self.repeats_in_training = 0
        self._wanted = (held_out, training)
        self._max_length = max_length
        self._seen: dict[bytes, bool] = {}  # digest of the tokens -> whether they are held out

    @property
    def missing(self) -> int:
        """How many rows are still wanted."""
        return sum(self._wanted) - len(self.held_out) - len(self.training)

    def take(
        self, rows: Rows, order: Sequence[int], tokens_of: Callable[[Row], Example | None], progress: Progress
    ) -> None:
        """Choose rows.

        Args:
            rows: all rows.
            order: their indices, in the order to take them.
            tokens_of: a row's example, None if it is of no use.
            progress: where to report.
        """
        wanted, request = self.missing, self.missing
        while self.missing and self.looked_at < len(order):
            asked = order[self.looked_at : self.looked_at + request]
            # Read in the order of the files, each row reduced to its tokens before the next is decoded.
            examples = {}
            for index, row in rows.read(asked):
                examples[index] = tokens_of(row)
                progress.tokenising(len(examples), len(asked))
            for index in asked:
                if not self.missing:
                    break
                self.looked_at += 1
                self._offer(index, examples[index])
            # Every request may cost a pass over the files: ask for twice what the rows so far suggest.
            request = 2 * math.ceil(self.missing * self.looked_at / max(1, wanted - self.missing))

    def _offer(self, index: int, example: Example | None) -> None:
        example = example and example.cut_at(self._max_length)
        if example is None:
            self.dropped += 1
            return
        key = hashlib.blake2b(example.input_ids.tobytes() + repr(example.spans).encode(), digest_size=16).digest()
        if self._seen.get(key):
            self.repeats_of_held_out += 1
        elif len(self.held_out) < self._wanted[0]:
            self._seen[key] = True
            self.held_out.append((index, example))
        else:
            self.repeats_in_training += key in self._seen
            self._seen[key] = False
            self.training.append((index, example))
