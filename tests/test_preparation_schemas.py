"""Every evaluation set in the columns that its publishers chose becomes problems, or says why a row does not."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_lora_plugin.errors import ConfigurationError, RowError
from hybrid_lora_plugin.tasks.benchmarks import BENCHMARKS, benchmark
from hybrid_lora_plugin.tasks.problem import LETTERS
from hybrid_lora_plugin.tasks.prompts import user_turn
from hybrid_lora_plugin.tasks.schemas import without_instruction
from tests.support.benchmark_rows import EARLY_LEETCODE, ROWS

ASKS = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def problem_of(name, **changes):
    return BENCHMARKS[name].problem(ROWS[name] | changes)


def test_every_set_has_a_row_here():
    assert set(ROWS) == set(BENCHMARKS)
    with pytest.raises(ConfigurationError, match="tests: 'gsm8' is no evaluation set; give one of gsm8k, math500"):
        benchmark("gsm8", "tests")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_row_becomes_a_problem_of_the_kinds_that_the_set_declares(name):
    problem = problem_of(name)
    assert problem.source == BENCHMARKS[name].source and problem.kind in BENCHMARKS[name].kinds
    assert problem.question and problem.identity and problem.gold
    assert user_turn(problem, "cot").startswith(problem.question)


def test_gold_answers_are_what_the_rows_say():
    golds = {name: problem_of(name).gold for name in BENCHMARKS if name not in ("gpqa", "leetcode")}
    assert golds == {"gsm8k": "1200", "math500": "\\frac{14}{3}", "aime24": "33", "aime25": "336", "mmlu_pro": "B"}
    assert problem_of("gsm8k", answer="so\n#### 2.50").kind == "math"
    code = json.loads(problem_of("leetcode").gold)
    assert sorted(code) == ["entry_point", "prompt", "test"] and code["entry_point"] == "Solution().twoSum"


@pytest.mark.parametrize("name", ["gsm8k", "math500", "aime24", "aime25"])
def test_the_plain_form_gives_the_problem_of_the_published_one_without_its_instruction(name):
    published = problem_of(name)
    row = {"prompt": published.question + ASKS, "answer": ROWS[name].get("answer")}
    plain = BENCHMARKS[name].problem(row)
    assert (plain.question, plain.gold, plain.kind) == (published.question, published.gold, published.kind)


@pytest.mark.parametrize(
    "row",
    [
        {"ID": "2024-I-4", "Problem": "How many?", "Solution": "…", "Answer": 33},
        {"id": 60, "problem": "How many?", "solution": "\\boxed{033}", "url": "…"},
        {"id": "60", "problem": "How many?", "solution": "…", "answer": "033", "url": "…", "year": "2024"},
    ],
)
def test_other_columns_of_the_same_contest(row):
    problem = BENCHMARKS["aime24"].problem(row)
    assert (problem.question, problem.gold) == ("How many?", "33")
    assert problem.identity in ("2024-I-4", "60")


def test_a_program_of_an_earlier_version_is_the_same_problem():
    early, late = BENCHMARKS["leetcode"].problem(EARLY_LEETCODE), problem_of("leetcode")
    assert (early.identity, early.starter, early.gold) == (late.identity, late.starter, late.gold)
    assert "```" not in early.question


def test_options_that_are_none_are_left_out_and_the_letter_moves_with_them():
    row = {"options": ["N/A", "four", "N/A", "five"], "answer": "D", "answer_index": 3}
    problem = problem_of("mmlu_pro", **row)
    assert (problem.options, problem.gold) == (("four", "five"), "B")


@given(seed=st.integers(0, 99), record=st.text(min_size=1, max_size=8))
def test_the_order_of_options_follows_the_seed_and_the_record_and_the_letter_follows_it(seed, record):
    row = ROWS["gpqa"] | {"Record ID": record}
    first, again = (BENCHMARKS["gpqa"].problem(row, seed=seed) for _ in range(2))
    assert first == again and sorted(first.options) == ["five", "four", "seven", "six"]
    assert first.options[LETTERS.index(first.gold)] == "four"


def test_the_right_option_stands_at_every_place():
    letters = {BENCHMARKS["gpqa"].problem(ROWS["gpqa"] | {"Record ID": f"rec{n}"}).gold for n in range(40)}
    assert letters == set("ABCD")


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("gsm8k", {"answer": "eighteen"}, "no answer"),
        ("gsm8k", {"answer": "#### "}, "no answer"),
        ("gsm8k", {"answer": "#### eighteen"}, "an answer that is no number"),
        ("gsm8k", {"question": None}, "no text in `question`"),
        ("math500", {"answer": None}, "no answer"),
        ("math500", {"answer": " "}, "no answer"),
        ("math500", {"problem": "Give it as \\boxed{} please, now."}, "an instruction that is not known"),
        ("aime24", {"answer": "x + 1"}, "an answer that is no whole number"),
        ("aime24", {"answer": "1000"}, "an answer that is no whole number"),
        ("aime25", {"answer": "-1"}, "an answer that is no whole number"),
        ("mmlu_pro", {"answer": "C"}, "an answer that is no option"),
        ("mmlu_pro", {"options": ["four", "N/A"], "answer_index": 1}, "an answer that is no option"),
        ("mmlu_pro", {"options": None}, "no options"),
        ("gpqa", {"Correct Answer": ""}, "no answer"),
        ("gpqa", {"Incorrect Answer 2": "four"}, "an option that is there twice"),
        ("leetcode", {"test": ""}, "no text in `test`"),
    ],
)
def test_a_row_without_a_usable_answer_is_refused_with_a_reason(name, changes, reason):
    with pytest.raises(RowError) as refused:
        problem_of(name, **changes)
    assert refused.value.reason == reason
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.reason, str(again)) == (reason, str(refused.value))


def test_other_columns_are_named_with_what_is_wanted():
    with pytest.raises(RowError, match=r"MATH-500: a row with the columns \['text'\]; wanted `problem` \+ `answer` or"):
        BENCHMARKS["math500"].problem({"text": "x"})


@pytest.mark.parametrize(
    "asked",
    [
        ASKS,
        " Let's think step by step and output the final answer within \\boxed{}.",
        "\nReturn your final response within \\boxed{}.",
    ],
)
def test_an_instruction_is_taken_off_once(asked):
    assert without_instruction("How many?" + asked) == "How many?"
    assert without_instruction("What is \\boxed{?} + 1?") == "What is \\boxed{?} + 1?"
