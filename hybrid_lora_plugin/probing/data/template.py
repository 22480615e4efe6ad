"""The tokenizer's chat template, given turns as an inference server would give them, on one fixed day."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from typing import Any

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.findings import Findings

# Fields whose loss changes what a conversation says; of the others the user is told.
_ESSENTIAL = ("tool_calls", "function_call")


class ChatTemplate:
    """Renders conversations.

    Attributes:
        day: what the template takes for today.
        prints_date: whether a conversation so far shows the date, which is then always the one that was given.
    """

    def __init__(self, tokenizer: Any, day: date, findings: Findings) -> None:
        """Of a ``transformers`` tokenizer that has a template.

        Args:
            tokenizer: with ``chat_template``.
            day: what the template takes for today.
            findings: where to note fields that the template leaves out.
        """
        self._tokenizer, self._findings = tokenizer, findings
        self.day, self._now = day, datetime.combine(day, time())
        self.prints_date = False
        template = tokenizer.chat_template
        self._source = template if isinstance(template, str) else json.dumps(template)
        self._checked: set[str] = set()
        # How this template wants what servers and data sets write differently; learnt when it first matters.
        self._null_is_text: bool | None = None
        self._arguments_are_text = False

    def render(
        self, turns: Sequence[dict], options: dict[str, Any], where: str, *, generation_prompt: bool = False
    ) -> str:
        """A conversation as text.

        Args:
            turns: with all their fields.
            options: what else the template is given.
            where: how to name the row in an error.
            generation_prompt: whether the text ends where the model is to speak.

        Raises:
            ProbeError: the template refuses the turns.
        """
        adapted = [self._adapted(turn, where) for turn in turns]
        if self._null_is_text is None and any(turn["content"] is None for turn in turns):
            self._null_is_text = self._null_becomes_text(adapted, options)
            adapted = [self._adapted(turn, where) for turn in turns]
        try:
            return self._rendered(adapted, options, generation_prompt)
        except Exception as error:  # templates raise whatever Jinja raises
            if not self._arguments_are_text and any("tool_calls" in turn for turn in turns):
                self._arguments_are_text = True
                try:
                    return self.render(turns, options, where, generation_prompt=generation_prompt)
                except ProbeError:
                    self._arguments_are_text = False
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ProbeError(
                f"{where}: the chat template refuses it, so it cannot be a row ({reason}); give turns it accepts"
            ) from error

    def check_fields(self, turns: Sequence[dict], options: dict[str, Any], where: str) -> None:
        """Refuse a row with a field that the template leaves out although the conversation needs it; tell of others.

        Each field is looked at once: in the first row that has it.

        Raises:
            ProbeError: naming the field.
        """
        for name in options:
            if name not in self._checked and not self._mentions(name):
                without = {key: value for key, value in options.items() if key != name}
                same = self.render(turns, options, where) == self.render(turns, without, where)
                if same and name == "tools":
                    raise ProbeError(
                        f"{where}: the chat template has no place for `tools`, so a rollout would not see them; drop "
                        f"the column, or give a tokenizer whose template shows tools"
                    )
                if same:
                    self._findings.add(f"option {name}", f"the chat template does not use the column `{name}`")
            self._checked.add(name)
        for name in {name for turn in turns for name in turn} - {"role", "content"} - self._checked:
            if not self._mentions(name):
                without = [{key: value for key, value in turn.items() if key != name} for turn in turns]
                if self.render(turns, options, where) == self.render(without, options, where):
                    if name in _ESSENTIAL:
                        raise ProbeError(
                            f"{where}: the chat template has no place for `{name}` of a turn, so that turn would be "
                            f"empty; write it into `content`, or give a tokenizer whose template shows it"
                        )
                    self._findings.add(f"field {name}", f"the chat template does not use `{name}` of a turn")
            self._checked.add(name)

    def _mentions(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    def _rendered(self, turns: Sequence[dict], options: dict[str, Any], generation_prompt: bool) -> str:
        if "strftime_now" in self._source:
            # What is given to a template comes before the function that transformers puts there.
            options = {"strftime_now": self._strftime} | options
        return self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation_prompt, **options
        )

    def _strftime(self, form: str) -> str:
        self.prints_date = True
        return self._now.strftime(form)

    def _null_becomes_text(self, turns: Sequence[dict], options: dict[str, Any]) -> bool:
        """Whether the template prints ``None`` where a turn has no content, or fails there."""
        empty = [turn | {"content": ""} if turn["content"] is None else turn for turn in turns]
        words = []
        for form in (turns, empty):
            try:
                words.append(self._rendered(form, options, False).count("None"))
            except Exception:  # templates raise whatever Jinja raises; one that takes neither is refused by `render`
                words.append(len(self._source))
        return words[0] > words[1]

    def _adapted(self, turn: dict, where: str) -> dict:
        adapted = dict(turn)
        if adapted["content"] is None and self._null_is_text:
            adapted["content"] = ""
        if "tool_calls" in adapted:
            adapted["tool_calls"] = [self._call(call, where) for call in _calls(adapted["tool_calls"], where)]
        return adapted

    def _call(self, call: Any, where: str) -> Any:
        """A tool call whose arguments are an object: servers parse them before they render a conversation."""
        if not isinstance(call, dict):
            raise ProbeError(f"{where}: `tool_calls` has {call!r:.40}; give objects with a function")
        if isinstance(call.get("function"), dict):
            return call | {"function": self._call(call["function"], where)}
        arguments = call.get("arguments")
        if isinstance(arguments, str) and not self._arguments_are_text:
            parsed = _json(arguments)
            return call | {"arguments": parsed} if isinstance(parsed, dict) else call
        return call


def _calls(value: Any, where: str) -> list:
    calls = _json(value) if isinstance(value, str) else value
    if not isinstance(calls, list):
        raise ProbeError(f"{where}: `tool_calls` is {value!r:.40}; give a list of calls")
    return calls


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
