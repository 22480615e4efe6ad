"""The turns of a chat as a file holds them: checked, with every field that says something."""

from __future__ import annotations

from typing import Any

from hybrid_lora_plugin.errors import ProbeError

#: Fields in which an assistant turn can speak beside or instead of ``content``.
SPEECH = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
#: Who speaks in a turn of ShareGPT, ``{from, value}``; any other name is taken as the role.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def turns_of(value: Any, where: str) -> list[dict]:
    """Checked turns, each with ``role``, ``content`` and its other fields.

    A field that is null is none: Arrow gives every turn the fields of all others. ``content`` alone may be null, in an
    assistant turn that calls tools or reasons.

    Args:
        value: a list of ``{role, content, ...}``, or of ShareGPT's ``{from, value}``.
        where: how to name the list in an error.

    Raises:
        ProbeError: no list, or a turn whose role or content is no text.
    """
    if not isinstance(value, list):
        raise ProbeError(f"{where} is {type(value).__name__}; give a list of {{role, content}}")
    return [_turn(turn, f"{where}[{place}]") for place, turn in enumerate(value)]


def _turn(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise ProbeError(f"{where} is {type(value).__name__}, a turn without text; give {{role, content}}")
    turn = {name: field for name, field in value.items() if field is not None}
    if "role" not in turn and isinstance(turn.get("from"), str) and "value" in turn:
        turn = {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} | {
            name: field for name, field in turn.items() if name not in ("from", "value")
        }
    if not isinstance(turn.get("role"), str):
        raise ProbeError(f"{where}.role is {turn.get('role')!r:.40}, a turn without text in `role`; give a text")
    content = turn.get("content")
    if isinstance(content, list):
        raise ProbeError(
            f"{where}.content is a list of parts, and a text is needed; give the text of the turn (images cannot be "
            f"probed)"
        )
    if not isinstance(content, str) and (content is not None or not speaks(turn)):
        raise ProbeError(
            f"{where}.content is {_named(content)}, a turn without text in `content`; give a text (null only beside "
            f"tool_calls)"
        )
    return {"role": turn.pop("role"), "content": content} | {
        name: field for name, field in turn.items() if name != "content"
    }


def speaks(turn: dict) -> bool:
    """Whether an assistant turn says something outside its content."""
    return turn["role"] == "assistant" and any(turn.get(name) for name in SPEECH)


def _named(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def refuse_lone_surrogates(value: Any, where: str) -> None:
    """Refuse texts that no UTF-8 file and no tokenizer can hold; JSON can write them as ``\\\\ud83d``.

    Args:
        value: texts, nested in lists and dicts.
        where: how to name the value in an error.

    Raises:
        ProbeError: naming the field and the code point.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ProbeError(
                    f"{where} has half a surrogate pair, U+{ord(value[error.start]):04X}, which is no character; write "
                    f"the file again from its source, or remove the row"
                ) from error
    elif isinstance(value, dict):
        for name, inner in value.items():
            refuse_lone_surrogates(name, where)
            refuse_lone_surrogates(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            refuse_lone_surrogates(inner, f"{where}[{place}]")
