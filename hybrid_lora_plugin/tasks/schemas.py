"""How a row of an evaluation set becomes a problem, in the very columns that its publishers chose.

A ``Schema`` names the columns that tell it from others and how to read them. A row that says no question or no answer,
or an answer of another kind, is a ``RowError`` with a reason that can be counted; it is never given an answer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_lora_plugin.errors import RowError
from hybrid_lora_plugin.tasks.answers import whole_number
from hybrid_lora_plugin.tasks.problem import LETTERS, Problem

Row = Mapping[str, Any]

#: What others put behind a question; ``prompts`` says it anew.
_INSTRUCTIONS = re.compile(
    r"\s*(?:let's think step by step and (?:output the final answer|put your final answer) within \\boxed\{\}"
    r"|please reason step by step,? and put your final answer within \\boxed\{\}"
    r"|(?:please )?put your final answer within \\boxed\{\}"
    r"|return your final response within \\boxed\{\})\.?\s*$",
    re.IGNORECASE,
)
_EMPTY_BOX = re.compile(r"\\boxed\{\s*\}")
_DECIMAL = re.compile(r"-?\d*\.\d+|-?\d+\.")
_OF_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
#: Of LeetCodeDataset before v0.3.0, between the question and the lines to go on from.
_ASKS_FOR_PYTHON = re.compile(
    r"\s*Please complete the following python code precisely:\s*```python\n(.*?)\n?```\s*$", re.S
)


@dataclass(frozen=True)
class Schema:
    """One way in which a set is published.

    Attributes:
        columns: those that tell it from the others; a row may have more.
        read: source and row and seed -> problem.
    """

    columns: tuple[str, ...]
    read: Callable[[str, Row, int], Problem]


def without_instruction(question: str) -> str:
    """A question without the sentence at its end that says where the answer has to stand.

    Raises:
        RowError: the question asks for a ``\\boxed{}`` in words that are not known here: with an instruction of our
            own behind it the model would be asked twice.
    """
    # Only in the end, as the pattern takes its time over long runs of spaces.
    place = max(0, len(question) - 300)
    bare = (question[:place] + _INSTRUCTIONS.sub("", question[place:])).strip()
    if _EMPTY_BOX.search(bare):
        raise RowError(
            "an instruction that is not known",
            f"the question {bare[-80:]!r} says in words of its own where the answer has to stand; give it without",
        )
    return bare


def identity_of(question: str) -> str:
    """16 hexadecimal digits for a question of a set that numbers none; white space does not count."""
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()[:16]


def gsm8k(source: str, row: Row, seed: int) -> Problem:
    """``question``, ``answer`` with the steps and ``#### N`` at the end."""
    return _after_hashes(source, text_in(row, "question"), text_in(row, "answer"))


def kept_gsm8k(source: str, row: Row, seed: int) -> Problem:
    """``prompt`` with an instruction at its end, ``answer`` as of ``gsm8k``."""
    return _after_hashes(source, without_instruction(text_in(row, "prompt")), text_in(row, "answer"))


def _after_hashes(source: str, question: str, answer: str) -> Problem:
    _, hashes, last = answer.rpartition("####")
    last = last.strip()
    if not hashes or not last:
        raise RowError("no answer", f"the answer {answer[-60:]!r} has no `#### N` at its end")
    whole = whole_number(last)
    decimal = last.replace(",", "")
    if whole is None and not _DECIMAL.fullmatch(decimal):
        raise RowError("an answer that is no number", f"the answer {last[:60]!r} behind #### is no number")
    kind, gold = ("math", decimal) if whole is None else ("integer", str(whole))
    return Problem(source, identity_of(question), kind, question, gold)


def expression(
    question: str = "problem", answer: str = "answer", identity: str | None = None, metadata: tuple[str, ...] = ()
) -> Callable[[str, Row, int], Problem]:
    """A question and an expression as its answer.

    Args:
        question: column of the question; an instruction at its end is taken off.
        answer: column of the answer.
        identity: column of an identity; None: of the question.
        metadata: columns that a report groups by.
    """

    def read(source: str, row: Row, seed: int) -> Problem:
        asked = without_instruction(text_in(row, question))
        return Problem(
            source,
            _identity(row, identity, asked),
            "math",
            asked,
            text_in(row, answer),
            metadata=_metadata(row, metadata),
        )

    return read


def contest_integer(
    question: str = "problem", answer: str = "answer", identity: str | None = None, metadata: tuple[str, ...] = ()
) -> Callable[[str, Row, int], Problem]:
    """A question of AIME and its answer, a whole number from 0 to 999; arguments as of ``expression``.

    An answer column that holds a solution with the number in a ``\\boxed{}`` and nothing else is read too.
    """

    def read(source: str, row: Row, seed: int) -> Problem:
        asked = without_instruction(text_in(row, question))
        given = text_in(row, answer)
        boxed = re.fullmatch(r"\\boxed\{(.*)\}", given.strip())
        whole = whole_number(boxed[1] if boxed else given)
        if whole is None or not 0 <= whole <= 999:
            raise RowError(
                "an answer that is no whole number",
                f"the answer {given[:60]!r} in `{answer}` is no whole number from 0 to 999",
            )
        return Problem(
            source, _identity(row, identity, asked), "integer", asked, str(whole), metadata=_metadata(row, metadata)
        )

    return read


def mmlu_pro(source: str, row: Row, seed: int) -> Problem:
    """``question``, ``options`` of which some may be ``N/A``, ``answer`` as a letter and ``answer_index``."""
    given, letter, index = row.get("options"), text_in(row, "answer").strip(), row.get("answer_index")
    if not isinstance(given, (list, tuple)) or not all(isinstance(option, str) for option in given):
        raise RowError("no options", f"`options` is {given!r:.60}; wanted a list of texts")
    if not isinstance(index, int) or not 0 <= index < len(given) or LETTERS[index : index + 1] != letter:
        raise RowError(
            "an answer that is no option",
            f"answer {letter!r} and answer_index {index!r} do not name one of the options",
        )
    refuse_half_characters("".join(given), "an option")
    kept = [place for place, option in enumerate(given) if option.strip() and option.strip() != "N/A"]
    if index not in kept or len(kept) < 2:
        raise RowError("an answer that is no option", f"the answer {letter!r} is {given[index]!r}, which is no option")
    question = text_in(row, "question")
    return Problem(
        source,
        _identity(row, "question_id", question),
        "letter",
        question,
        LETTERS[kept.index(index)],
        tuple(given[place] for place in kept),
        metadata=_metadata(row, ("category", "src")),
    )


def gpqa(source: str, row: Row, seed: int) -> Problem:
    """``Question``, ``Correct Answer`` and three ``Incorrect Answer``; the order of the options follows the seed.

    It follows the seed and the record alone, so that it is the same in whatever order rows come, on any Python.
    """
    question = text_in(row, "Question").strip()
    identity = _identity(row, "Record ID", question)
    texts = {column: text_in(row, column).strip() for column in _OF_GPQA}
    if texts["Correct Answer"] in [texts[column] for column in _OF_GPQA[1:]]:
        raise RowError("an option that is there twice", f"record {identity}: a wrong answer is also the right one")
    order = sorted(_OF_GPQA, key=lambda column: hashlib.sha256(f"{seed}/{identity}/{column}".encode()).digest())
    return Problem(
        source,
        identity,
        "letter",
        question,
        LETTERS[order.index("Correct Answer")],
        tuple(texts[column] for column in order),
        metadata=_metadata(row, ("High-level domain", "Subdomain")),
    )


def leetcode(source: str, row: Row, seed: int) -> Problem:
    """LeetCodeDataset from v0.3.0 on: ``problem_description``, ``starter_code``, and what its tests need."""
    return _program(source, row, text_in(row, "problem_description"), text_in(row, "starter_code"), row)


def early_leetcode(source: str, row: Row, seed: int) -> Problem:
    """LeetCodeDataset before v0.3.0: question and first lines both in ``query``."""
    query = text_in(row, "query")
    found = _ASKS_FOR_PYTHON.search(query)
    if found is None:
        raise RowError("no starter code", f"`query` {query[-60:]!r} does not end with the code to go on from")
    meta = row.get("meta")
    return _program(source, row, query[: found.start()], found[1], meta if isinstance(meta, Mapping) else {})


def _program(source: str, row: Row, question: str, starter: str, about: Row) -> Problem:
    tests = {name: text_in(row, name) for name in ("entry_point", "prompt", "test")}
    return Problem(
        source,
        _identity(row, "task_id", question),
        "code",
        question.strip(),
        json.dumps(tests, sort_keys=True, ensure_ascii=False),
        starter=starter.rstrip(),
        metadata=_metadata(about, ("difficulty", "estimated_date")),
    )


def text_in(row: Row, column: str) -> str:
    """The text of a column; a whole number counts as its digits.

    Raises:
        RowError: there is none. The reason tells a question from an answer.
    """
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        what = "no answer" if "answer" in column.lower() or column == "solution" else f"no text in `{column}`"
        raise RowError(what, f"`{column}` is {value!r:.60}; wanted a text")
    refuse_half_characters(value, f"`{column}`")
    return value


def refuse_half_characters(text: str, what: str) -> None:
    """Refuse a text with half of a surrogate pair, which JSON can hold and no file in UTF-8.

    Raises:
        RowError: naming ``what``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("half a character", f"{what} has half of a surrogate pair at {error.start}") from error


def _identity(row: Row, column: str | None, question: str) -> str:
    value = row.get(column) if column else None
    if value is None or value == "":
        return identity_of(question)
    refuse_half_characters(str(value), f"`{column}`")
    return str(value)


def _metadata(row: Row, columns: tuple[str, ...]) -> dict[str, str]:
    return {column: str(row[column]) for column in columns if row.get(column) is not None}
