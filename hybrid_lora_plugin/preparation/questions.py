"""When two questions are the same, and which are held out: by the text alone, not by the order or number of rows."""

from __future__ import annotations

import hashlib
import re
import unicodedata

#: Ways of writing that change no question. Operators stay: 3 - 2 is not 3 + 2.
_SPELLINGS = (
    (re.compile(r"\\(?:left|right|displaystyle|,|;|!|:|quad|qquad)(?![a-z])"), ""),
    (re.compile(r"\\[dt]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\[()\[\]]|\$"), ""),
    (re.compile(r"\s+"), ""),
    (re.compile(r"[.?!:]+$"), ""),
)
_WORD = re.compile(r"\w+")


def normalised(question: str) -> str:
    """A question without what does not make it another one: case, white space, dollars, full stops at its end."""
    text = unicodedata.normalize("NFKC", question).casefold()
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def words(question: str) -> list[str]:
    """Its words and numbers in lower case, without any sign between them, as n-grams are made of."""
    return _WORD.findall(unicodedata.normalize("NFKC", question).casefold())


def digest(question: str) -> bytes:
    """16 bytes, the same for questions that are the same."""
    return hashlib.sha256(normalised(question).encode()).digest()[:16]


def is_held_out(question: bytes, share: float, seed: int) -> bool:
    """Whether a question is one to validate on.

    Args:
        question: its ``digest``.
        share: of all questions, in [0, 1).
        seed: another one holds out others.
    """
    drawn = hashlib.sha256(f"{seed}/".encode() + question).digest()[:8]
    return int.from_bytes(drawn, "big") < share * 2**64
