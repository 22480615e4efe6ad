"""Where the responses lie in a rendered conversation.

The template's rendering of the whole conversation is the witness: what a rollout would be given (the turns before a
response, with the generation prompt), then the response and its end, must be its beginning. What is trained is that
text. Where a template renders a response otherwise than it is written, the user is told, or the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.findings import Findings, end_of, start_of
from hybrid_lora_plugin.probing.data.rows import Row
from hybrid_lora_plugin.probing.data.template import ChatTemplate
from hybrid_lora_plugin.probing.data.turns import SPEECH


@dataclass(frozen=True)
class Text:
    """A conversation as text.

    Attributes:
        text: up to the end of the last response.
        spans: ``(start, end)`` in characters of each response with its end, ascending.
        ended: whether the template ended the last response; if not, the tokenizer's end token is to follow.
    """

    text: str
    spans: list[tuple[int, int]]
    ended: bool


class Conversations:
    """Finds the responses in conversations of one tokenizer."""

    def __init__(
        self, tokenizer: Any, template: ChatTemplate, findings: Findings, train_on: str, stops: Collection[int] = ()
    ) -> None:
        """For a tokenizer and its template.

        Args:
            tokenizer: tells special tokens and the end token.
            template: renders.
            findings: where to note what is rendered otherwise than written.
            train_on: ``last`` or ``all`` assistant turns.
            stops: more token ids at which a rollout ends.
        """
        self._template, self._findings, self._all = template, findings, train_on == "all"
        self._end = tokenizer.eos_token
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        # Longer ones first, as one may begin with another.
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._stops = {tokenizer.convert_ids_to_tokens(stop) for stop in stops} | {self._end}

    def of(self, row: Row) -> Text:
        """The text of a row and where its responses are.

        Raises:
            ProbeError: the template refuses the turns, drops a field, or does not render what a rollout would see.
        """
        if isinstance(row.prompt, str):
            turns = [{"role": "user", "content": row.prompt}]
        else:
            turns = row.prompt
        turns = [*turns, {"role": "assistant", "content": row.response} | row.fields]
        self._template.check_fields(turns, row.options, row.where)
        self._tell_of_turns(row, turns)
        prompt, response, ended = self._turn(turns, row)
        text, spans = prompt + response, [(len(prompt), len(prompt) + len(response))]
        if self._all:
            earlier = [place for place, turn in enumerate(turns[:-1]) if turn["role"] == "assistant" and place]
            spans = [self._earlier_span(turns[: place + 1], row, text) for place in earlier] + spans
        return Text(text, spans, ended)

    def _tell_of_turns(self, row: Row, turns: list[dict]) -> None:
        if not self._all and any(turn["role"] == "assistant" for turn in turns[:-1]):
            self._findings.add(
                "earlier turns",
                "assistant turns before the last are context and are not trained; probe.train_on=all trains them too",
            )
        if row.turns_after:
            self._findings.add("turns after", "turns behind the last assistant turn are not used")
        for turn in turns:
            found = self._special.search(turn["content"] or "")
            if found:
                self._findings.add(
                    "special",
                    f"the text of a turn holds {found[0]!r}, which becomes that special token; if rows were "
                    f"rendered by a template before, give them as turns",
                )
                break

    def _earlier_span(self, turns: list[dict], row: Row, text: str) -> tuple[int, int]:
        prompt, response, _ = self._turn(turns, row)
        if not text.startswith(prompt + response):
            raise ProbeError(
                f"{row.where}: assistant turn {len(turns)} is rendered otherwise once turns follow it (as its own "
                f"response {start_of(response)}, later {start_of(_after(prompt, text))}), so one text cannot train "
                f"both; give probe.train_on=last",
                see="conversation-rendered-otherwise",
            )
        return len(prompt), len(prompt) + len(response)

    def _turn(self, turns: list[dict], row: Row) -> tuple[str, str, bool]:
        """What a rollout is given before the last turn, what it is to say, and whether the template ended it."""
        prompt = self._template.render(turns[:-1], row.options, row.where, generation_prompt=True)
        whole = self._template.render(turns, row.options, row.where)
        content = turns[-1]["content"] or ""
        self._check_speech(turns, row, whole)
        if not whole.startswith(prompt):
            return prompt, *self._behind_an_opening(prompt, whole, content, row)
        rendered = whole[len(prompt) :]
        start, end = self._content_in(rendered, content, turns[-1], row)
        before = rendered[:start]
        # A template that marks no place where the model speaks would make it write the header of its turn.
        if self._special.search(before) and prompt == self._template.render(turns[:-1], row.options, row.where):
            raise ProbeError(
                f"{row.where}: the chat template has no generation prompt: a rollout would be given {end_of(prompt)}, "
                f"and the conversation goes on with {start_of(rendered)}; give a tokenizer whose template has one",
                see="conversation-rendered-otherwise",
            )
        if before.strip() and content.strip():
            self._findings.add(
                "before",
                f"the chat template puts {start_of(before)} before the response {start_of(content)}: trained as it is "
                f"rendered, {start_of(rendered)}",
            )
        if end is None:
            # Its reasoning is cut out of the rendering; a rollout writes it all the same.
            tail, ended = self._ending(rendered, _last_special(self._special, rendered), row)
            return prompt, content + tail, ended
        tail, ended = self._ending(rendered, end, row)
        return prompt, rendered[:end] + tail, ended

    def _check_speech(self, turns: list[dict], row: Row, whole: str) -> None:
        """Refuse a response whose other fields the template leaves out."""
        for name in SPEECH:
            if not turns[-1].get(name):
                continue
            without = [*turns[:-1], {key: value for key, value in turns[-1].items() if key != name}]
            if self._template.render(without, row.options, row.where) == whole:
                raise ProbeError(
                    f"{row.where}: the chat template leaves `{name}` of the response out, so it would not be trained; "
                    f"write it into `content` as the model is to say it, or give a tokenizer whose template shows it",
                    see="conversation-rendered-otherwise",
                )

    def _content_in(self, rendered: str, content: str, turn: dict, row: Row) -> tuple[int, int | None]:
        """Where a rendered response begins and ends; its end is None where the rendering lacks its reasoning."""
        if any(turn.get(name) for name in SPEECH):
            # Calls and reasoning stand before and behind the content, in forms of the template's own.
            return 0, _last_special(self._special, rendered)
        start = rendered.find(content)
        if start >= 0:
            return start, start + len(content)
        bare = content.strip()
        start = rendered.find(bare)
        if start < 0 and "".join(bare.split()) in "".join(rendered.split()):
            start, end = 0, _last_special(self._special, rendered)
        elif start >= 0:
            end = start + len(bare)
        else:
            return 0, self._without_reasoning(rendered, content, row)
        self._findings.add(
            "whitespace",
            f"the chat template changes white space of the response {start_of(content)}: trained as it is rendered, "
            f"{start_of(rendered)}",
        )
        return start, end

    def _without_reasoning(self, rendered: str, content: str, row: Row) -> None:
        _, closed, answer = content.rpartition("</think>")
        if closed and answer.strip() and answer.strip() in rendered:
            self._findings.add(
                "reasoning",
                f"the chat template cuts the reasoning out of the response {start_of(content)} and renders "
                f"{start_of(rendered)}: trained as it is written, as a rollout would write it",
            )
            return
        raise ProbeError(
            f"{row.where}: the chat template does not render the response {start_of(content)} but "
            f"{start_of(rendered)}; give rows in the form the template expects, or another tokenizer",
            see="conversation-rendered-otherwise",
        )

    def _behind_an_opening(self, prompt: str, whole: str, content: str, row: Row) -> tuple[str, bool]:
        """The response where the generation prompt opens it, as by ``<think>``, and the rendering lacks that."""
        common = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        opened = prompt[common:]
        texts = f"a rollout would be given {end_of(prompt)}, but the conversation is {start_of(_after(prompt, whole))}"
        for opening in (opened, opened.strip()):
            if opening.strip() and content.startswith(opening):
                tail, ended = self._ending(whole, _last_special(self._special, whole), row)
                self._findings.add(
                    "opening",
                    f"the generation prompt opens the response with {start_of(opened)}, which the chat template does "
                    f"not render ({texts}): the response is trained behind it, as a rollout would write it",
                )
                return content[len(opening) :] + tail, ended
        raise ProbeError(
            f"{row.where}: prompt and response do not begin the conversation as the chat template renders it: {texts}; "
            f"give a response that begins with {start_of(opened.strip())}, or a tokenizer whose template renders what "
            f"its generation prompt opens",
            see="conversation-rendered-otherwise",
        )

    def _ending(self, rendered: str, end: int, row: Row) -> tuple[str, bool]:
        """What ends the turn, from the end of its response to its first special token; and whether there is one."""
        found = self._special.search(rendered, end)
        if found is None:
            self._findings.add(
                "no end",
                f"the chat template ends the response with {start_of(rendered[end:])} and no special token: "
                + (
                    f"trained with the tokenizer's end token {self._end!r} behind it"
                    if self._end
                    else "trained without an end, as the tokenizer has no end token either"
                ),
            )
            return "", False
        if found[0] not in self._stops:
            self._findings.add(
                "end",
                f"the chat template ends a turn with {found[0]!r}, and the tokenizer's end token is {self._end!r}: the "
                f"end of the template is trained; a rollout stops there only if its stop tokens have it",
            )
        between = rendered[end : found.start()]
        if between.strip():
            self._findings.add("behind", f"the chat template puts {start_of(between)} behind the response: trained too")
        return rendered[end : found.end()], True


def _after(prompt: str, text: str) -> str:
    """A text from shortly before the place where it and a prompt part."""
    common = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
    return text[max(0, common - 20) :]


def _last_special(special: re.Pattern, text: str) -> int:
    """Where the last special token of a text begins; its end if there is none."""
    return max((match.start() for match in special.finditer(text)), default=len(text.rstrip()))
