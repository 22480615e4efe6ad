"""Mixture-of-Thoughts (open-r1/Mixture-of-Thoughts): conversations, and the problems among them.

The set has no column of answers: what stands in the last box of a response is what DeepSeek-R1 concluded. Such an
answer is distilled, not verified, and a part of them is wrong. Here a row is only kept where that answer has a form
that can be checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hybrid_lora_plugin.errors import RowError
from hybrid_lora_plugin.preparation.code_tests import CodeTests
from hybrid_lora_plugin.preparation.questions import normalised
from hybrid_lora_plugin.tasks.answers import boxed
from hybrid_lora_plugin.tasks.problem import LETTERS, Problem
from hybrid_lora_plugin.tasks.schemas import identity_of, refuse_half_characters, without_instruction

SOURCE = "open-r1/Mixture-of-Thoughts"
#: Part -> rows on the hub; ``all`` there is these three together.
PARTS = {"math": 93_733, "code": 83_070, "science": 172_514}
#: Longest answers, characters: of longer ones two right ones are seldom written alike.
_LONGEST = {"math": 200, "science": 60}
#: Words of an answer, such as a name or "no solution"; more are prose.
_MOST_WORDS = 3
_WORD, _COMMAND = re.compile(r"[^\W\d_]{3,}"), re.compile(r"\\[a-zA-Z]+")
#: The mark of an option at the start of a line: ``A. ``, ``B) ``, ``(C) ``, ``D: ``.
_MARK = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.):])[ \t]+(?=\S)", re.M)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathbf|mathrm|rm|bf)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"\(?[A-J]\)?[.:]?")
_NAMED = re.compile(r"\(?([A-Z])\)?(?:[.:)]?\s*|[.:)]\s+.*|\s*[-–]\s+.*)", re.S)


def conversation(row: Any) -> list[dict[str, str]]:
    """The turns of a row, as they are.

    Raises:
        RowError: anything but texts that end with an answer of the assistant behind a question.
    """
    turns = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise RowError("no conversation", f"`messages` is {turns!r:.60}; wanted a list of turns with role and content")
    roles = [turn["role"] for turn in turns]
    if roles[-2:] != ["user", "assistant"] or not all(turn["content"].strip() for turn in turns[-2:]):
        raise RowError(
            "no question and answer", f"the turns are of {roles!r:.60}; wanted a user's, then an assistant's"
        )
    for turn in turns:
        refuse_half_characters(turn["role"] + turn["content"], "a turn")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def question_of(turns: list[dict[str, str]]) -> tuple[str, str]:
    """The one question of a conversation and its response.

    Raises:
        RowError: other turns beside these two, which a single prompt would lose.
    """
    if len(turns) != 2:
        raise RowError("more than one question", f"{len(turns)} turns; wanted a question and its answer")
    return turns[0]["content"], turns[1]["content"]


def problem_of(turns: list[dict[str, str]], part: str, tests: CodeTests | None) -> Problem:
    """The problem of a conversation, with the answer that it ends with.

    Args:
        turns: from ``conversation``.
        part: ``math``, ``code`` or ``science``.
        tests: for code.

    Raises:
        RowError: there is no answer of a form that can be checked.
    """
    question, response = question_of(turns)
    if part == "code":
        return _program(question, tests)
    question = without_instruction(question)
    answer = boxed(response)
    if answer is None:
        raise RowError("no boxed answer", f"the response ends with {response[-60:]!r}, without a box that is closed")
    stem, options = split_options(question)
    is_letter = _LETTER.fullmatch(_bare(answer)) is not None
    # In math a listed value may be given by itself: then it is compared as an expression.
    if options and (is_letter or part == "science"):
        gold = letter_of(answer, options)
        return Problem(SOURCE, identity_of(question), "letter", stem, gold, options)
    if is_letter:
        raise RowError("a letter without options", f"the answer is {answer!r}, and the question lists no options")
    if len(answer) > _LONGEST[part]:
        raise RowError("a long answer", f"the answer has {len(answer)} characters; at most {_LONGEST[part]} are kept")
    if len(_WORD.findall(_COMMAND.sub(" ", answer))) > _MOST_WORDS:
        raise RowError("an answer in words", f"the answer {answer[:60]!r} is prose, which is seldom written alike")
    return Problem(SOURCE, identity_of(question), "math", question, answer)


def _program(question: str, tests: CodeTests | None) -> Problem:
    found = None if tests is None else tests.find(question)
    if found is None:
        raise RowError("code without tests", "no set with tests has this question")
    return Problem(SOURCE, found.identity, "code", found.question, found.gold, starter=found.starter)


def split_options(question: str) -> tuple[str, tuple[str, ...]]:
    """A question without the options at its end, and these; all of it and none where there is no such list.

    Options are lines that begin with A, B, C … in this order, up to the end of the question. An option may have more
    lines than one.
    """
    marks = list(_MARK.finditer(question))
    for start in range(len(marks) - 1, max(-1, len(marks) - 1 - len(LETTERS)), -1):
        letters = [mark[1] or mark[2] for mark in marks[start:]]
        if letters[0] == "A" and letters == list(LETTERS[: len(letters)]) and len(letters) > 1:
            ends = [mark.start() for mark in marks[start + 1 :]] + [len(question)]
            texts = [question[mark.end() : end].strip() for mark, end in zip(marks[start:], ends, strict=True)]
            stem = question[: marks[start].start()].strip()
            return (stem, tuple(texts)) if stem else (question, ())
    return question, ()


def letter_of(answer: str, options: tuple[str, ...]) -> str:
    """The letter of the option that an answer names: by its letter, or by its whole text.

    Raises:
        RowError: it names none, or more than one.
    """
    bare = _bare(answer)
    named = _NAMED.fullmatch(bare)
    if named and named[1] in LETTERS[: len(options)]:
        return named[1]
    same = [place for place, option in enumerate(options) if normalised(option) == normalised(bare)]
    if len(same) != 1:
        raise RowError("an answer that is no option", f"the answer {answer[:60]!r} is none of {len(options)} options")
    return LETTERS[same[0]]


def _bare(answer: str) -> str:
    before = None
    while before != answer:
        before, answer = answer, _WRAPPED.sub(r"\1", answer).strip().strip("$").strip()
    return answer
