r"""What can be said of two mathematical answers from their LaTeX alone, before anything parses them.

Three things are decided here. Answers that are words (``\text{east}``) are compared as words, since a parser reads them
as products of letters. Numbers of a base (``2516_8``), percentages and units are compared by their notation, which a
parser drops. And what a parser takes for more than it says, such as ``1=2=204`` for 204, is refused.
"""

from __future__ import annotations

import re

#: The most characters of an answer or a gold that is parsed at all.
MOST_CHARACTERS = 2000
#: Braces around a whole answer that are taken off; more are a parser's business.
_MOST_BRACES = 2

_SPACES = re.compile(r"\\[,;:! >]|\\q?quad(?![A-Za-z])|~|\\displaystyle(?![A-Za-z])")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?")
_WORDS = r"\\(?:text|mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
# Spaces belong to one place only: with two, a long answer could be taken apart in exponentially many ways.
_WHOLE_WORDS = re.compile(rf"\s*(?:{_WORDS}[\s.,]*)+")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z])|°")
_PERCENT = re.compile(r"\\?%|\s*\\text\{\s*(?:%|percent)\s*\}|\s*percent\b")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\s*\d{3})+(?:\.\d+)?")
_BASED = re.compile(r"([+-]?[0-9A-Z]*\d[0-9A-Z]*)_\{?(\d+)\}?")
_POWER = r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
_UNIT_WORDS = (
    "cents?|dollars?|degrees?|inch(?:es)?|foot|feet|yards?|miles?|mph|cm|mm|km|meters?|metres?|centimeters?|kilometers?"
    "|seconds?|minutes?|hours?|days?|weeks?|months?|years?|units?|square|cubic|grams?|kg|kilograms?|pounds?|ounces?"
    "|liters?|gallons?|people|students|ways|points?|times|radians?|per|sq|in|ft|m|g|s"
)
_UNIT = re.compile(
    rf"(?<=[\d}})\]a-zA-Z])\s*"
    rf"({_WORDS}|(?<=[\d}})\]\s])\s*\b(?:{_UNIT_WORDS})\b(?:[ /.]+(?:{_UNIT_WORDS})\b)*){_POWER}\.?$"
)
_JOINING = re.compile(r"\b(?:or|and|not|to|than|if|where)\b|\d")
_OPERATORS = ("\\int", "\\sum", "\\prod", "\\lim")
_EQUALS = re.compile(r"(?<![<>!:\\])=(?!=)")
_NAMES = re.compile(r"\\(?:frac|sqrt|cdot|times|div|pm|mp|pi|circ|log|ln|sin|cos|tan|binom)(?![A-Za-z])")


def plain(text: str) -> str:
    """LaTeX without what changes only its looks: dollars around it, sizes, spaces, kinds of fraction, a full stop."""
    text = text.strip()
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if text.startswith("\\(") and text.endswith("\\)"):
        text = text[2:-2]
    text = _SPACES.sub(" ", text)
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text = _SIZES.sub("", text).replace("{,}", ",").replace("−", "-")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\s+", " ", text).strip()
    for _ in range(_MOST_BRACES):
        text = text[1:-1].strip() if _in_braces(text) else text
    text = re.sub(r"(^|[-=]\s*)\\\$\s*", r"\1", text) if text.count("$") == 1 else text
    text = text[:-1].rstrip() if text.endswith(".") else text
    # Of "x = 1,080" the number alone.
    name, equals, value = text.rpartition("=")
    return name + equals + re.sub(r"[ ,]", "", value) if _GROUPED.fullmatch(value.strip()) else text


def _in_braces(text: str) -> bool:
    """Whether one pair of braces encloses all."""
    if text[:1] != "{":
        return False
    depth, escaped = 0, False
    for position, character in enumerate(text):
        if escaped or character == "\\":
            escaped = not escaped
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth <= 0:
            return depth == 0 and position > 0 and position == len(text) - 1
    return False


def words(text: str) -> str | None:
    r"""The words of an answer that is nothing else, in one form: of ``\text{(C)}`` it is ``c``; None for others."""
    text = plain(text)
    if _WHOLE_WORDS.fullmatch(text):
        text = re.sub(_WORDS, r"\1", text)
    elif "\\" in text or not re.search(r"[A-Za-z]{4}", text) or re.search(r"[=^_<>{}$+*/]", text):
        return None
    text = re.sub(r"\s+", " ", text).strip().rstrip(".").strip().casefold()
    if len(text) > 1 and text[0] == "(" and text[-1] == ")":
        text = text[1:-1].strip()
    return text or None


def without_unit(text: str) -> tuple[str, str | None]:
    r"""``5.4 \text{ cents}`` as ``("5.4", "cent")``; degrees, and what has no unit, with None."""
    text = _DEGREES.sub("", plain(text)).strip()
    match = _UNIT.search(text)
    if match is None or not match.start():
        return text, None
    unit = re.sub(_WORDS, r"\1", match[0])
    if _JOINING.search(re.sub(r"\^\s*\{?\s*[23]\s*\}?", "", unit)):
        return text, None
    unit = re.sub(r"[\s{}^.]+", "", unit).casefold()
    for long, short in (("feet", "foot"), ("inches", "inch"), ("centimeter", "cm"), ("kilometer", "km")):
        unit = unit.replace(long, short)
    if unit.startswith("degree"):
        return text[: match.start()].strip(), None
    return text[: match.start()].strip(), re.sub(r"s(?=\d?$)", "", unit) or None


def without_percent(text: str) -> tuple[str, bool]:
    r"""``10\%`` as ``("10", True)``."""
    return (_PERCENT.sub("", text).strip(), True) if _PERCENT.search(text) else (text, False)


def based(text: str) -> tuple[str, str] | None:
    """Digits and base of a number of a base: ``4210_{5}`` as ``("4210", "5")``; None for others."""
    match = _BASED.fullmatch(re.sub(_WORDS, r"\1", plain(text)).replace(" ", ""))
    return (match[1].lstrip("+"), match[2]) if match else None


def misread(answer: str, gold: str) -> str | None:
    """Why an answer must not be parsed against this gold: a parser would find in it what it does not say. Else None.

    Args:
        answer, gold: as ``plain`` gives them.
    """
    if any(operator in answer and operator not in gold for operator in _OPERATORS):
        return "not worked out"
    listed = re.search(r"[,;]|\b(?:or|and)\b", answer)
    sides = _EQUALS.split(answer)
    if len(sides) > 2 and not listed:
        return "several equations"
    if len(sides) == 2 and not _EQUALS.search(gold) and not re.search(r"[A-Za-z]", _NAMES.sub("", sides[0])):
        return "an equation between numbers"
    if (_brackets(gold) or _listed(gold)) and not re.search(
        r"\\in(?![A-Za-z])|[<>]|\\[lg]eq?(?![A-Za-z])|\\[lg]e(?![A-Za-z])", answer
    ):
        found = _brackets(re.sub(r"^.{0,40}?(?<![<>])=\s*", "", answer))
        if found != _brackets(gold):
            return "other brackets"
    return None


def _listed(text: str) -> bool:
    """Whether several values stand side by side with no brackets around them."""
    bare = re.sub(r"\\?[({\[][^(){}\[\]]*\\?[)}\]]", "", text)
    return "," in bare and not re.search(r"[(){}\[\]]", bare)


def _brackets(text: str) -> tuple[str, str] | None:
    r"""The brackets around a pair, a tuple or an interval; None around anything else."""
    text = re.sub(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", text.replace("\\{", "{{").replace("\\}", "}}"))
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]":
        return None
    depth, comma = 0, False
    for position, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        comma = comma or (character == "," and depth == 1)
        if not depth and position < len(text) - 1:
            return None
    return (text[0], text[-1]) if comma else None
