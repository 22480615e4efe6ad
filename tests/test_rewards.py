"""Answers are found by form alone, and whole numbers and letters judged by them."""

from __future__ import annotations

import time

import pytest

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.rewards import expression_text
from hybrid_lora_plugin.rewards.code_gold import CodeGold
from hybrid_lora_plugin.rewards.scorer import Scorer, ScoringLimits
from hybrid_lora_plugin.rewards.terms import has_form
from hybrid_lora_plugin.tasks import answers
from hybrid_lora_plugin.tasks.problem import Problem
from hybrid_lora_plugin.tasks.prompts import user_turn


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{3}. No wait, \boxed{7}", "7"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed 5", "5"),
        (r"$\boxed 5$.", "5"),
        (r"the answer is \boxed 12.", "12"),
        (r"\boxed  {5}", "5"),
        (r"\fboxed{5}", "5"),
        ("\\boxed{\n5\n}", "5"),
        # Never closed, empty, or no box at all: nothing, and not the box before it.
        (r"\boxed{5", None),
        (r"\boxed{4} so \boxed{5", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed", None),
        (r"\boxedtwo{5}", None),
        ("The answer is 5.", None),
        ("", None),
        # Only what follows the reasoning is the answer.
        (r"<think>\boxed{4}</think>\boxed{5}", "5"),
        (r"<think>\boxed{4}</think> five", None),
        (r"\boxed{4}</think>\boxed{5}", "5"),
        (r"<think>maybe \boxed{4}", None),
        (r"<think>a</think>b</think>\boxed{5}", "5"),
    ],
)
def test_a_box_is_the_last_one_with_its_braces_balanced(response, answer):
    assert answers.boxed(response) == answer


@pytest.mark.parametrize(
    ("response", "options", "answer"),
    [
        ("The answer is (B).", 10, "B"),
        ("The answer is B", 10, "B"),
        ("The answer is **B**.", 10, "B"),
        ("the final answer is: (C)", 10, "C"),
        (r"The answer is $\boxed{\text{D}}$", 10, "D"),
        ("Answer: J", 10, "J"),
        ("**Answer:** C", 10, "C"),
        ("answer:\n(C)", 10, "C"),
        # The documented order: what "answer is" names goes before "Answer:", of each the last.
        ("Answer: A. So the answer is (B).", 10, "B"),
        ("The answer is A. No, the answer is (B).", 10, "B"),
        ("Answer: A\nAnswer: C", 10, "C"),
        # Then the last letter that stands alone.
        ("It is B or C, so C", 10, "C"),
        (r"\boxed{B}", 10, "B"),
        ("(E)", 10, "E"),
        # The first letter of a word is none.
        ("The answer is Apple", 10, None),
        ("Answer: Because of that", 10, None),
        ("I'm sure it's D's", 10, None),
        # Only letters of options that exist.
        ("Answer: E", 4, None),
        ("I think so", 4, None),
        ("Answer: D", 4, "D"),
        ("Answer: b", 4, None),
        ("none of these", 4, None),
        ("<think>Answer: A</think>Answer: B", 4, "B"),
        ("<think>Answer: A", 4, None),
    ],
)
def test_a_letter_is_found_by_the_documented_patterns(response, options, answer):
    assert answers.letter(response, options) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```", "x = 1"),
        ("```Python3\nx = 1\n```\nand\n```python\nlonger = 1\n```\nand\n```python\ny\n```", "longer = 1"),
        ("```\nx = 1\n```", None),
        ("```cpp\nint x;\n```", None),
        ("```python\nx = 1", None),
        ("```python\n```", None),
        ("x = 1", None),
        # A line of backticks inside a longer fence belongs to the program.
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("<think>```python\nx = 1\n```</think>", None),
        ("```text\nlong, and no Python\n```\n```python\nx\n```", "x"),
    ],
)
def test_a_program_is_the_longest_closed_block_of_python(response, answer):
    assert answers.program(response) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("033", 33),
        ("+33", 33),
        ("-33", -33),
        ("−33", -33),
        ("0", 0),
        ("1,080", 1080),
        ("1{,}080", 1080),
        (r"10,\!080", 10080),
        ("1 080", 1080),
        (r"\$72", 72),
        ("$72$", 72),
        ("72.00", 72),
        (r"\$1,234.00", 1234),
        (r"72\text{ dollars}", 72),
        ("72 dollars", 72),
        (r"72\%", 72),
        (r"72^\circ", 72),
        (r"\text{72}", 72),
        ("{72}", 72),
        (r"\,72\,", 72),
        ("72.", 72),
        ("n = 72", 72),
        ("7.5", None),
        ("1,08", None),
        ("1 or 2", None),
        ("72 or more", None),
        ("7 or eight", None),
        ("10 thousand", None),
        ("10k", None),
        ("5!", None),
        ("2^5", None),
        ("1=2=204", None),
        ("3=204", None),
        ("10/2", None),
        ("7, 8", None),
        ("seven", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_a_whole_number_is_one_and_nothing_else(text, number):
    assert answers.whole_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 5000,
        "\\boxed{" + "\\text{a} " * 200 + "x}",
        "\\boxed{" + "\\text{" + " " * 20000 + "}",
        "\\boxed{5" + " " * 20000 + "a" * 20000 + "!}",
        "answer is " + "*" * 50000 + " x",
        "answer: " * 5000 + "!",
        "```" + "a" * 50000 + "`",
        ("```" + " " * 100 + "\n") * 2000,
        "<think>" * 20000,
        "\\boxed{" + "{" * 20000 + "}" * 20000 + "}",
        "\\boxed{" + "1," * 900 + "x}",
        "\\boxed{" + "5 cm " * 390 + "!}",
    ],
    ids=range(12),
)
def test_no_response_takes_long_to_look_through(text):
    # It happens in the worker's own process, where nothing ends it.
    started = time.process_time()
    answers.letter(text), answers.program(text)
    for kind in ("math", "letter", "code"):
        has_form(kind, text, think=True)
    box = answers.boxed(text) or ""
    answers.whole_number(box)
    if len(box) <= expression_text.MOST_CHARACTERS:
        expression_text.words(box), expression_text.without_unit(box), expression_text.based(box)
        expression_text.misread(expression_text.plain(box), "(1,2)"), expression_text.without_percent(box)
    assert time.process_time() - started < 2


def test_what_is_no_answer_is_told_from_a_wrong_one():
    with Scorer() as scorer:
        right = scorer.score("integer", r"\boxed{033}", "33")
        wrong = scorer.score("integer", r"\boxed{34}", "33")
        none = scorer.score("integer", "33", "33")
        assert (right.correct, right.answer, right.note) == (True, "033", "")
        assert (wrong.correct, wrong.answer, wrong.note) == (False, "34", "another number")
        assert (none.correct, none.answer, none.note) == (False, None, "no box")
        assert scorer.score("letter", "Answer: B", "B", 4).correct
        assert not scorer.score("letter", "Answer: C", "B", 4).correct
        assert scorer.score("letter", "Answer: E", "B", 4).answer is None


@pytest.mark.parametrize("kind", ["integer", "letter", "code"])
def test_a_gold_that_no_answer_can_match_is_refused(kind):
    with Scorer() as scorer, pytest.raises(ConfigurationError, match="gold"):
        assert not scorer.is_checkable(kind, "twelve")
        scorer.score(kind, "\\boxed{1} Answer: A\n```python\nx\n```", "twelve")


def test_a_kind_or_a_limit_that_does_not_exist_is_refused():
    with Scorer() as scorer, pytest.raises(ConfigurationError, match="'essay'.*wanted one of math, integer"):
        scorer.score("essay", "", "x")
    with pytest.raises(ConfigurationError, match="math_seconds: 0"):
        ScoringLimits(math_seconds=0)


@pytest.mark.parametrize("style", ["io", "cot"])
@pytest.mark.parametrize(
    ("kind", "gold", "response"),
    [
        ("integer", "5", r"\boxed{5}"),
        ("letter", "B", "Answer: B"),
    ],
)
def test_what_a_prompt_asks_for_is_what_is_looked_for(style, kind, gold, response):
    problem = Problem("s", "1", kind, "Why?", gold, options=("x", "y") if kind == "letter" else ())
    assert {"integer": r"\boxed{}", "letter": '"Answer: X"'}[kind] in user_turn(problem, style)
    with Scorer() as scorer:
        assert scorer.score(kind, response, gold, len(problem.options) or None).correct


def test_the_gold_of_a_code_problem_survives_its_text():
    gold = CodeGold("import math\n", "def check(candidate):\n    assert candidate(1) == 1\n", "Solution().f")
    assert CodeGold.read(gold.text()) == gold


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "import (", "test": "def check(c): pass", "entry_point": "f"}, "gold.prompt"),
        ({"prompt": "", "test": "assert True", "entry_point": "f"}, "no check"),
        ({"prompt": "", "test": "def check(c): pass", "entry_point": "f("}, "gold.entry_point"),
    ],
)
def test_a_code_gold_that_python_does_not_read_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        CodeGold(**fields)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"prompt": 1, "test": "", "entry_point": ""}', "nonsense"])
def test_a_code_gold_of_another_form_is_refused(text):
    with pytest.raises(ConfigurationError, match="gold"):
        CodeGold.read(text)
