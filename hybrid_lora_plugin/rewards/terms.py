"""What may be added to the reward beside right and wrong: form and length of a response, both off by default."""

from __future__ import annotations

import re

from hybrid_lora_plugin.tasks import answers

_LETTER_LINE = re.compile(r"[*_\s]*Answer:[*_\s]*\(?[A-Z]\)?[*_.\s]*")


def has_form(kind: str, response: str, think: bool = False) -> bool:
    """Whether a response has the form that ``tasks.prompts`` asks for.

    Expressions and whole numbers: exactly one box, which is closed. Letters: the last line is ``Answer: X`` and nothing
    else. Programs: exactly one closed block of Python. Reasoning does not count.

    Args:
        kind: one of ``tasks.problem.KINDS``.
        response: the whole response.
        think: whether it must also begin with one ``<think>…</think>``.
    """
    if think and not re.match(r"\s*<think>(?:(?!</?think>).)*</think>(?!.*</?think>)", response, re.DOTALL):
        return False
    text = answers.final_part(response)
    if kind == "letter":
        lines = text.strip().splitlines()
        return bool(lines) and _LETTER_LINE.fullmatch(lines[-1]) is not None
    if kind == "code":
        return answers.program(response) is not None and len(re.findall(r"^[ \t]*```", text, re.MULTILINE)) == 2
    return answers.boxed(response) is not None and len(re.findall(r"\\f?boxed(?![A-Za-z])", text)) == 1


def excess_length(characters: int, free: int, most: int) -> float:
    """0 up to ``free`` characters, 1 from ``most`` on, on a line between.

    In characters, since a reward function of verl gets the text; verl's reward manager ``dapo`` has a term in tokens.
    """
    return min(max((characters - free) / max(most - free, 1), 0.0), 1.0)
