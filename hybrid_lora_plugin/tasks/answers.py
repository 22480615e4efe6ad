"""What a response gives as its answer: found by form alone, never by knowing what would be right.

Each function looks behind the reasoning, if the response marks it with ``<think>``, and returns None where nothing
stands where an answer has to stand. Nothing is guessed: a response without an answer is wrong, and counted as that.
"""

from __future__ import annotations

import re

from hybrid_lora_plugin.tasks.problem import LETTERS

#: Letters that an answer may name where the number of options is not known: MMLU-Pro has up to ten.
_MOST_OPTIONS = 10
_BOX = re.compile(r"\\f?boxed(?![A-Za-z])\s*")
#: What may stand between the words before a letter and the letter itself.
_MARKUP = r"(?:[\s*_$:(\[]|\\[(\[]|\\f?boxed\{|\\text(?:bf)?\{|\\mathbf\{|\\mathrm\{)*"
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})([^`]*)")
_PYTHON = ("python", "python3", "py")
#: Words behind a number that change it, or name another one.
_NO_UNIT = re.compile(
    r"(?<![a-z])(?:or|and|to|k|hundred|thousands?|millions?|billions?|trillions?|dozens?|squared|cubed|factorial)(?![a-z])"
)
#: The most characters of a whole number; Python itself refuses to read more than 4,300 digits.
_MOST_CHARACTERS = 200


def final_part(response: str) -> str:
    """The text behind the last ``</think>``; nothing where a ``<think>`` was never closed, all where there is none."""
    before, closed, after = response.rpartition("</think>")
    if closed:
        return after
    return "" if "<think>" in response else response


def boxed(response: str) -> str | None:
    r"""What the last ``\boxed{}`` or ``\fbox{}``-like box encloses, stripped; also of ``\boxed 5``.

    Braces are counted, escaped ones not. A last box that is never closed, or is empty, gives None: an earlier one is
    not what the response ended with.
    """
    text = final_part(response)
    found = list(_BOX.finditer(text))
    if not found:
        return None
    start = found[-1].end()
    if not text.startswith("{", start):
        word = re.match(r"[^\s$\\{}]+", text[start:])
        # The full stop that ends the sentence is not part of a bare word.
        return (word[0].rstrip(".,;:!") or None) if word else None
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[start + 1 : position].strip() or None
        position += 1
    return None


def letter(response: str, options_count: int | None = None) -> str | None:
    """The letter of the option that a response names.

    Three patterns, in this order, of each its last match: ``answer is (B)``; ``Answer: B``; a letter that stands alone.
    Markup between the words and the letter (``**``, ``$``, a box) does not matter.

    Args:
        response: the whole response.
        options_count: how many options there are; only their letters count. Ten where it is not known.
    """
    text = final_part(response)
    one = f"[{LETTERS[0]}-{LETTERS[(options_count or _MOST_OPTIONS) - 1]}]"
    # Of "I'm" and "Answer: Because" the first letter is no answer.
    ended = r"(?![\w'’])"
    for pattern in (
        rf"answer is{_MARKUP}({one}){ended}",
        rf"[aA]nswer:{_MARKUP}({one}){ended}",
        rf"(?<![\w'’\\])({one}){ended}",
    ):
        if found := re.findall(pattern, text):
            return found[-1]
    return None


def program(response: str) -> str | None:
    """The longest closed block that is marked as Python; None where there is none.

    A block that is still open at the end was cut off, and is no answer.
    """
    longest, fence, lines = None, None, []
    for line in final_part(response).splitlines():
        mark = _FENCE.fullmatch(line)
        if fence is None:
            if mark:
                fence, language, lines = mark[1], (mark[2].split() or [""])[0].lower(), []
        elif mark and not mark[2].strip() and mark[1].startswith(fence):
            text = "\n".join(lines)
            if language in _PYTHON and text.strip() and (longest is None or len(text) > len(longest)):
                longest = text
            fence = None
        else:
            lines.append(line)
    return longest


def whole_number(text: str) -> int | None:
    r"""The one whole number that a box may mean.

    ``033``, ``1,080``, ``1{,}080``, ``\$72.00``, ``72\text{ km}`` and ``n = 5`` mean one. None where it is no whole
    number, or more than one thing: ``7.5``, ``1 or 2``, ``1=2=204``.
    """
    if len(text) > _MOST_CHARACTERS:
        return None
    text = text.strip().strip("$").strip()
    while text[:1] == "{" and text[-1:] == "}" and "{" not in text[1:] and "}" not in text[:-1]:
        text = text[1:-1].strip()
    text = re.sub(r"^[A-Za-z]\w*\s*=(?!=)\s*", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\{\s*([^{}]*)\}", r" \1 ", text)
    text = text.replace("\\$", "").replace("−", "-").replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"\\[,;: ]", " ", text).replace("\\%", "%").strip()
    match = re.fullmatch(
        r"([+-]?\s?[$€£]?)\s*(\d{1,3}(?:[ ,]\d{3})+|\d+)(?:\.0*)?\s*(?:%|°|\^\s*\{?\\circ\}?|[A-Za-z][A-Za-z ./]*)?",
        text,
    )
    if match is None or _NO_UNIT.search(match[0].casefold()):
        return None
    digits = ("-" if "-" in match[1] else "") + re.sub(r"\D", "", match[2])
    return int(digits)
