"""From a row to its tokens, and which of them are trained."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from typing import Any

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.conversation import Conversations, Text
from hybrid_lora_plugin.probing.data.findings import Findings, end_of, start_of
from hybrid_lora_plugin.probing.data.rows import Row
from hybrid_lora_plugin.probing.data.template import ChatTemplate


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: prompts and responses, as int32 because a run keeps thousands of rows.
        spans: ``(start, end)`` of each trained response with its end token, ascending and not empty.
        lost: trained tokens that were cut away.
        cut: all tokens that were cut away.
    """

    input_ids: array[int]
    spans: tuple[tuple[int, int], ...]
    lost: int = 0
    cut: int = 0

    @property
    def response_start(self) -> int:
        """Index of the first trained token, at least 1."""
        return self.spans[0][0]

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(end - start for start, end in self.spans)

    def cut_at(self, max_length: int) -> Example | None:
        """The first ``max_length`` tokens; None if none of them is trained."""
        if len(self.input_ids) <= max_length:
            return self
        spans = tuple((start, min(end, max_length)) for start, end in self.spans if start < max_length)
        if not spans:
            return None
        kept = Example(self.input_ids[:max_length], spans)
        return Example(kept.input_ids, spans, self.trained - kept.trained, len(self.input_ids) - max_length)


class RowTokenizer:
    """Tokens of rows as a rollout would produce them: the prompt, then the response and its end.

    Chat turns go through the tokenizer's chat template. A plain prompt is one user turn if there is a template (as in
    verl's SFT data), else verbatim text.

    Attributes:
        findings: what was met so far that a user should know.
        template: the chat template; None if the tokenizer has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        train_on: str = "last",
        day: date | None = None,
        vocabulary: int | None = None,
        stops: Collection[int] = (),
    ) -> None:
        """For a ``transformers`` tokenizer.

        Args:
            tokenizer: with or without a chat template.
            train_on: the ``last`` assistant turn, or ``all``.
            day: what the template takes for today; today by default.
            vocabulary: rows of the model's embedding.
            stops: token ids at which a rollout ends, beside the tokenizer's end token.
        """
        self._tokenizer, self._vocabulary, self.findings = tokenizer, vocabulary, Findings()
        self.template, self._conversations = None, None
        if tokenizer.chat_template is not None:
            self.template = ChatTemplate(tokenizer, day or date.today(), self.findings)
            self._conversations = Conversations(tokenizer, self.template, self.findings, train_on, stops)

    @property
    def printed_date(self) -> str | None:
        """The day that the chat template printed so far, as YYYY-MM-DD; None if it printed none."""
        return str(self.template.day) if self.template is not None and self.template.prints_date else None

    def __call__(self, row: Row) -> Example | None:
        """Tokens of one row, uncut; None if its response has none.

        Raises:
            ProbeError: chat turns without a chat template, turns or fields that the template does not render as a
                rollout would see them, or a token that the model has no embedding for.
        """
        if self._conversations is not None:
            text = self._conversations.of(row)
            ids, spans = self._of_text(text, [], row)
        else:
            text = self._plain_text(row)
            ids, spans = self._of_text(text, self._tokens_before(text.text[: text.spans[0][0]]), row)
        if not text.ended and self._tokenizer.eos_token_id is not None:
            ids, spans = [*ids, self._tokenizer.eos_token_id], [*spans[:-1], (spans[-1][0], len(ids) + 1)]
        spans = [(start, end) for start, end in spans if start < end]
        if not spans or spans[0][0] == 0:
            return None
        self._check(ids, spans, row)
        return Example(array("i", ids), tuple(spans))

    def _plain_text(self, row: Row) -> Text:
        if not isinstance(row.prompt, str):
            raise ProbeError(
                f"{row.where}: rows are chats but the tokenizer has no chat template; give `prompt` and `response` as "
                f"texts, or the instruct version of the model"
            )
        if row.fields or row.response is None:
            raise ProbeError(
                f"{row.where}: the response has {sorted(row.fields)} but the tokenizer has no chat template to render "
                f"them; give it as a text, or the instruct version of the model"
            )
        return Text(row.prompt + row.response, [(len(row.prompt), len(row.prompt) + len(row.response))], ended=False)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _tokens_before(self, prompt: str) -> list[int]:
        """The special tokens that the tokenizer puts before a plain prompt; those it puts behind are left out."""
        ids, bare = self._tokenizer(prompt)["input_ids"], self._ids(prompt)
        places = range(len(ids) - len(bare) + 1)
        start = next((place for place in places if ids[place : place + len(bare)] == bare), 0)
        before, behind = ids[:start], ids[start + len(bare) :]
        if behind:
            self.findings.add(
                "appended",
                f"the tokenizer appends {self._tokenizer.decode(behind)!r} to a prompt: left out before a response",
            )
        if before and bare[: len(before)] == before:
            self.findings.add(
                "doubled",
                f"the prompt begins with {self._tokenizer.decode(before)!r} already: the tokenizer's own is left out",
            )
            return []
        return before

    def _of_text(self, text: Text, before: list[int], row: Row) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text and where its spans are among them.

        The tokens of the whole text where they part between prompt and response, as they nearly always do. Else each
        part by itself, as a rollout would have it: its prompt is tokenised before there is a response.
        """
        ids = self._ids(text.text)
        places = []
        for place in (place for span in text.spans for place in span):
            if place == len(text.text):
                places.append(len(ids))
                continue
            start = self._ids(text.text[:place])
            if ids[: len(start)] != start:
                return self._by_parts(text, before)
            places.append(len(start))
        places = [len(before) + place for place in places]
        return before + ids, list(zip(places[::2], places[1::2], strict=True))

    def _by_parts(self, text: Text, before: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        start, end = text.spans[-1]
        self.findings.add(
            "boundary",
            f"a token of the whole text would reach from the prompt's end {end_of(text.text[:start])} into the "
            f"response {start_of(text.text[start:end])}: tokenised apart, as in a rollout",
        )
        ids, spans, last = list(before), [], 0
        for start, end in text.spans:
            ids += self._ids(text.text[last:start])
            spans.append((len(ids), len(ids) + len(response := self._ids(text.text[start:end]))))
            ids, last = ids + response, end
        return ids, spans

    def _check(self, ids: list[int], spans: list[tuple[int, int]], row: Row) -> None:
        if None in ids:
            raise ProbeError(
                f"{row.where}: the tokenizer has no token for a part of it and no unknown token; remove the row"
            )
        if self._vocabulary is not None and max(ids) >= self._vocabulary:
            token = self._tokenizer.convert_ids_to_tokens(max(ids))
            raise ProbeError(
                f"{row.where}: its token {token!r} has id {max(ids)}, and the model's embedding has {self._vocabulary} "
                f"rows; give the tokenizer that belongs to the model, or a model whose embedding was resized for it"
            )
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and unknown not in (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id):
            if any(unknown in ids[start:end] for start, end in spans):
                self.findings.add(
                    "unknown", f"the response holds text that the tokenizer only knows as {self._tokenizer.unk_token!r}"
                )
