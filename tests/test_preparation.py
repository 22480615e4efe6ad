"""From rows in a set's own columns to files that verl and the probe read, and to counts that add up."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hybrid_lora_plugin.config import DATA_SETS, DataCommandConfig
from hybrid_lora_plugin.config_data import PROMPT_STYLES
from hybrid_lora_plugin.errors import ConfigurationError, RowError
from hybrid_lora_plugin.preparation import parts, runner
from hybrid_lora_plugin.preparation.contamination import EvaluationSet, EvaluationSets
from hybrid_lora_plugin.preparation.mixture import conversation, letter_of, problem_of, split_options
from hybrid_lora_plugin.preparation.questions import digest, is_held_out, normalised
from hybrid_lora_plugin.preparation.reading import open_rows
from hybrid_lora_plugin.preparation.runner import Watch, prepare
from hybrid_lora_plugin.preparation.sets import Benchmarks, Mixture
from hybrid_lora_plugin.preparation.table import schema
from hybrid_lora_plugin.rewards.scorer import Scorer
from hybrid_lora_plugin.tasks.benchmarks import BENCHMARKS
from hybrid_lora_plugin.tasks.problem import LETTERS, Problem
from hybrid_lora_plugin.tasks.prompts import STYLES
from tests.support.benchmark_rows import ROWS
from tests.support.mixture_rows import CASES, CHOICE, row, sums, write_lines, write_parquet
from tests.support.verl_processes import ROOT

MATH = {"set": "mixture_of_thoughts", "configs": ["math"], "decontaminate": []}


@pytest.fixture(scope="module")
def checkable():
    """Whether an answer can be checked, by the rewards' own process."""
    with Scorer() as scorer:
        yield scorer.is_checkable


def is_number(kind, gold, options_count):
    """What ``checkable`` says where every answer is a number, without a process."""
    return re.fullmatch(r"-?\d+", gold.strip()) is not None


def run(folder, source, check=is_number, watch=None, **options):
    return prepare(DataCommandConfig(**(MATH | options), source=str(source), output_dir=str(folder)), check, watch)


def rows_of(folder, *splits):
    return [row for split in splits for row in parquet.read_table(Path(folder) / f"{split}.parquet").to_pylist()]


def question_of(made):
    return made["prompt"][0]["content"].partition("\n\nPlease reason")[0]


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


# -- what a row becomes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, given, expected", CASES, ids=[f"{part}-{n}" for n, (part, _, _) in enumerate(CASES)])
def test_a_row_of_the_mixture_becomes_a_problem_or_says_why_not(part, given, expected, checkable):
    try:
        problem = problem_of(conversation(given), part, None)
        options = len(problem.options)
        made = (problem.kind, problem.gold, options)
        if not checkable(problem.kind, problem.gold, options or None):
            made = runner.UNCHECKABLE
    except RowError as error:
        made = error.reason
    assert made == expected


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "\\boxed{", "A. x\nB. y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_a_row_holds_it_is_written_or_dropped_for_a_reason(data):
    """A row in a million must not end a preparation of hours."""
    import pyarrow

    name = data.draw(st.sampled_from(DATA_SETS))
    if name == "mixture_of_thoughts":
        good, part = sums(1)[0], data.draw(st.sampled_from(["math", "science"]))
        if data.draw(st.booleans()):
            good["messages"][data.draw(st.integers(0, 1))]["content"] = data.draw(JSON)
    else:
        good, part = dict(ROWS[name]), ""
    changed = good | data.draw(st.dictionaries(st.sampled_from(sorted(good)), JSON, max_size=2))
    for form in ("rl", "sft") if name in ("mixture_of_thoughts", "gsm8k") else ("rl",):
        made = data_set_of(name, form)
        try:
            item = made.item(changed, part, 0)
        except RowError as error:
            assert error.reason and "\n" not in error.reason
        else:
            digest(item.question)
            pyarrow.Table.from_pylist([item.row("train")], schema(form))


def data_set_of(name, form):
    """A set without its rows, which are not looked at."""
    kind = Mixture if name == "mixture_of_thoughts" else Benchmarks
    made = kind.__new__(kind)
    made._rl, made._style, made._seed, made._tests = form == "rl", "cot", 0, None
    if kind is Benchmarks:
        made._set, made.source = BENCHMARKS[name], BENCHMARKS[name].source
    return made


@given(st.lists(st.text("abc XY,.\n", min_size=1).filter(str.strip), min_size=2, max_size=10), st.sampled_from("().:"))
def test_options_are_found_as_they_were_listed(options, sign):
    options = [" ".join(option.split()) for option in options]
    marks = [f"({letter})" if sign in "()" else f"{letter}{sign}" for letter in LETTERS]
    listed = "\n".join(f"{mark} {option}" for mark, option in zip(marks, options, strict=False))
    assert split_options(f"Which is it?\n{listed}") == ("Which is it?", tuple(options))


def test_a_question_with_one_option_or_in_another_order_has_none():
    for question in ("A. Einstein was who?", "Which?\nA. one", "Which?\nB. one\nA. two", "A. one\nB. two"):
        assert split_options(question) == (question, ())
    assert split_options(CHOICE)[1][2] == "Carbon dioxide,\nas all know"


@pytest.mark.parametrize("answer", ["B", "(B)", "B.", "\\text{B}", "\\mathbf{(B)}", "B. Nitrogen", "nitrogen", "$B$"])
def test_an_answer_names_an_option_by_its_letter_or_its_text(answer):
    assert letter_of(answer, ("Oxygen", "Nitrogen")) == "B"


@pytest.mark.parametrize("answer", ["C", "b oth", "Oxygen and Nitrogen", "42", "AB", "A and B"])
def test_an_answer_that_names_no_option_is_not_guessed(answer):
    with pytest.raises(RowError, match="is none of 2 options"):
        letter_of(answer, ("Oxygen", "Nitrogen"))


def test_code_is_kept_where_a_set_with_tests_has_its_statement(tmp_path, checkable):
    tests = write_lines(tmp_path / "leetcode.jsonl", [ROWS["leetcode"]])
    statement = ROWS["leetcode"]["problem_description"]
    asked = f"You will be given a problem.\n\n# Problem\n\n{statement}\n\nWrite C++."
    rows = [row(asked, "```cpp\n```", "code"), row("Another one.", "```cpp\n```", "code")]
    source = write_lines(tmp_path / "code.jsonl", rows)
    done = run(tmp_path / "out", source, checkable, configs=["code"], code_tests=str(tests), validation=0.0)
    (made,) = rows_of(done.folder, "train")
    assert json.loads(made["reward_model"]["ground_truth"])["entry_point"] == "Solution().twoSum"
    assert made["extra_info"]["kind"] == made["ability"] == "code" and statement in made["prompt"][0]["content"]
    assert done.sheet["total"]["dropped"] == {"code without tests": 1}


# -- the files --------------------------------------------------------------------------------------------------------


def test_a_row_is_what_verl_reads(tmp_path, checkable):
    source = write_lines(tmp_path / "rows.jsonl", [sums(1)[0]])
    done = run(tmp_path / "out", source, checkable, validation=0.0)
    (made,) = rows_of(done.folder, "train")
    assert list(made) == ["prompt", "data_source", "ability", "reward_model", "extra_info"]
    assert made["prompt"][0]["role"] == "user" and made["prompt"][0]["content"].endswith("within \\boxed{}.")
    assert made["reward_model"] == {"style": "rule", "ground_truth": "6"}
    assert made["data_source"] == "open-r1/Mixture-of-Thoughts" and made["ability"] == "math"
    about = made["extra_info"]
    assert (about["split"], about["index"], about["kind"], about["options_count"]) == ("train", 0, "math", 0)
    assert about["origin"] == "open-r1/OpenR1-Math-220k" and about["part"] == "math"


def test_conversations_stay_as_they_are_and_the_probe_reads_them(tmp_path):
    from hybrid_lora_plugin.probing.data.rows import read_rows

    source = write_lines(tmp_path / "rows.jsonl", sums(20))
    done = run(tmp_path / "out", source, format="sft", validation=0.2)
    made = rows_of(done.folder, "train", "validation")
    given = [each["messages"] for each in sums(20)]
    assert sorted(map(repr, given)) == sorted(repr(each["messages"]) for each in made)
    rows, _ = read_rows([str(done.folder / "train.parquet")])
    ((_, first),) = rows.read([0])
    assert first.response.startswith("<think>") and len(rows) + len(rows_of(done.folder, "validation")) == 20


def test_gsm8k_as_the_on_ramp_has_it(tmp_path, checkable):
    names = [f"A mill grinds {n} sacks a day. How many in 30 days?" for n in range(40)]
    train = [
        {"question": name, "answer": f"So <<{n}*30={n * 30}>>{n * 30}.\n#### {n * 30:,}"}
        for n, name in enumerate(names)
    ]
    source, test = write_lines(tmp_path / "train.jsonl", train), write_lines(tmp_path / "test.jsonl", [ROWS["gsm8k"]])
    options = {"set": "gsm8k", "configs": ["all"], "decontaminate": [f"gsm8k={test}"], "validation": 0.0}
    done = run(tmp_path / "rl", source, checkable, **options, evaluation=[f"gsm8k={test}"])
    assert [file["name"] for file in done.sheet["files"]] == ["test_gsm8k.parquet", "train.parquet"]
    # The row of the test is one of the 40.
    assert [made["reward_model"]["ground_truth"] for made in rows_of(done.folder, "train")][-1] == "1170"
    assert done.sheet["total"] | {"kept": {}} == {"read": 40, "kept": {}, "dropped": {}}
    (asked,) = rows_of(done.folder, "test_gsm8k")
    assert asked["extra_info"]["split"] == "test" and asked["reward_model"]["ground_truth"] == "1200"
    done = run(tmp_path / "sft", source, checkable, **options, format="sft")
    last = rows_of(done.folder, "train")[-1]["messages"][1]["content"]
    assert last == "So 1170.\n\nThe answer is $\\boxed{1170}$."


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if not BENCHMARKS[name].train])
def test_a_set_for_evaluation_is_one_file_and_nothing_is_held_out(tmp_path, name, checkable):
    source = write_parquet(tmp_path / "rows.parquet", [ROWS[name]])
    done = run(tmp_path / "out", source, checkable, set=name, decontaminate=["auto"], configs=["all"])
    assert [file["name"] for file in done.sheet["files"]] == ["test.parquet"]
    (made,) = rows_of(done.folder, "test")
    assert made["data_source"] == BENCHMARKS[name].source
    assert made["extra_info"]["options_count"] == (4 if name == "gpqa" else 3 if name == "mmlu_pro" else 0)


def test_the_sets_of_the_configuration_are_those_that_there_are():
    assert list(DATA_SETS) == ["mixture_of_thoughts", *BENCHMARKS]
    assert set(PROMPT_STYLES) == set(STYLES)


def test_the_reward_of_a_run_knows_the_rows(tmp_path, checkable):
    """Right and wrong responses to rows of every kind that needs no sandbox, as verl hands them over."""
    from hybrid_lora_plugin.rewards.verl_reward import compute_score

    folder = tmp_path / "mixture"
    for part in ("math", "science"):
        write_lines(folder / part / "train.jsonl", [given for name, given, _ in CASES if name == part])
    write_lines(tmp_path / "gsm8k.jsonl", [ROWS["gsm8k"]])
    options = {"configs": ["math", "science"], "validation": 0.0, "evaluation": [f"gsm8k={tmp_path / 'gsm8k.jsonl'}"]}
    done = run(tmp_path / "out", folder, checkable, **options)
    made = rows_of(done.folder, "train", "test_gsm8k")
    assert {each["extra_info"]["kind"] for each in made} == {"math", "letter", "integer"}
    for each in made:
        gold = each["reward_model"]["ground_truth"]
        form = "Answer: {}" if each["extra_info"]["kind"] == "letter" else "It is \\boxed{{{}}}."
        for answer, right in ((gold, 1.0), ("A" if form[0] == "A" else "1234567", 0.0)):
            said = form.format(answer)
            assert compute_score(each["data_source"], said, gold, each["extra_info"])["score"] == right, (said, gold)


# -- what is left out -------------------------------------------------------------------------------------------------


def test_no_answer_that_cannot_be_checked_gets_a_reward_and_all_counts_add_up(tmp_path, checkable):
    folder = tmp_path / "mixture"
    for part in ("math", "science", "code"):
        write_lines(folder / part / "train.jsonl", [given for name, given, _ in CASES if name == part])
    done = run(tmp_path / "out", folder, checkable, configs=["all"], code_tests=None, validation=0.0)
    expected = [outcome for _, _, outcome in CASES]
    total = done.sheet["total"]
    assert total["read"] == len(CASES)
    assert total["dropped"] == {reason: expected.count(reason) for reason in set(expected) if isinstance(reason, str)}
    kept = {
        (made["extra_info"]["kind"], made["reward_model"]["ground_truth"]) for made in rows_of(done.folder, "train")
    }
    assert kept == {outcome[:2] for outcome in expected if not isinstance(outcome, str)}
    for account in (*done.sheet["rows"].values(), total):
        assert account["read"] == sum(account["kept"].values()) + sum(account["dropped"].values())
    page = (done.folder / "README.md").read_text()
    assert "distilled" in page and "dropped: a letter without options" in page
    assert set(done.sheet["rows"]["math"]["first_dropped"]) == set(done.sheet["rows"]["math"]["dropped"])


def test_the_first_of_equal_questions_is_kept_and_a_contradiction_is_told_apart(tmp_path):
    rows = [
        row("What is $x$?", "\\boxed{1}"),
        row("what is  x ?", "\\boxed{ 1}"),
        row("What is \\(x\\)", "\\boxed{2}"),
        row("What is $-x$?", "\\boxed{-1}"),
    ]
    done = run(tmp_path / "out", write_lines(tmp_path / "rows.jsonl", rows), validation=0.0)
    assert [made["reward_model"]["ground_truth"] for made in rows_of(done.folder, "train")] == ["1", "-1"]
    assert done.sheet["total"]["dropped"] == {runner.REPEATED: 1, runner.CONTRADICTED: 1}


def test_a_row_that_is_dropped_does_not_hide_a_good_one_with_its_question(tmp_path):
    rows = [row("What is x?", "One."), row("What is x?", "\\boxed{1}")]
    done = run(tmp_path / "out", write_lines(tmp_path / "rows.jsonl", rows), validation=0.0)
    assert done.sheet["total"] | {"dropped": {}} == {"read": 2, "kept": {"train": 1}, "dropped": {}}


def test_preparing_what_was_prepared_drops_nothing(tmp_path):
    rows = [*sums(30), *sums(30), *sums(10)]
    random.Random(0).shuffle(rows)
    first = run(tmp_path / "first", write_lines(tmp_path / "rows.jsonl", rows), format="sft", validation=0.0)
    assert first.sheet["total"]["dropped"] == {runner.REPEATED: 40}
    second = run(tmp_path / "second", first.folder / "train.parquet", format="sft", validation=0.0)
    assert second.sheet["total"]["dropped"] == {} and second.sheet["total"]["kept"] == {"train": 30}


def test_questions_of_an_evaluation_set_are_left_out_and_reported(tmp_path):
    problem = (
        "A tree of 31 nodes is coloured red and blue so that no two red nodes touch. Find the number of colourings."
    )
    test = write_lines(
        tmp_path / "math500.jsonl", [ROWS["math500"], ROWS["math500"] | {"problem": problem, "unique_id": "t"}]
    )
    short = write_lines(tmp_path / "aime.jsonl", [ROWS["aime24"]])
    rows = [
        row("Today: " + problem.upper().replace(".", " ,") + " Show all steps.", "\\boxed{1}"),
        row("How many such pairs are there", "\\boxed{33}"),
        row("A tree of 31 nodes is coloured red and blue so that all is well.", "\\boxed{3}"),
    ]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    against = [f"math500={test}", f"aime24={short}"]
    done = run(tmp_path / "out", source, decontaminate=against, validation=0.0)
    assert done.sheet["total"] | {"dropped": done.sheet["total"]["dropped"]} == {
        "read": 3, "kept": {"train": 1}, "dropped": {runner.CONTAMINATED: 2},
    }  # fmt: skip
    first, second = done.sheet["contamination"]["sets"]
    assert (first["name"], first["rows"], first["rows_with_the_same_question"], first["problems"]) == (
        "math500",
        1,
        0,
        2,
    )
    assert (second["rows"], second["rows_with_the_same_question"], second["problems_found"]) == (1, 1, 1)
    assert first["examples"][0]["text"].startswith("a tree of 31 nodes") and first["examples"][0]["identity"] == "t"
    told = [json.loads(line) for line in (done.folder / "contaminated.jsonl").read_text().splitlines()]
    assert [each["row"] for each in told] == [0, 1] and told[1]["hits"][0]["text"] == ""
    # It shares twelve words with the third.
    with pytest.raises(ConfigurationError, match=r"no row is left \(in an evaluation set\)"):
        run(tmp_path / "again", source, decontaminate=against, ngram=12, validation=0.0)


def test_words_that_many_problems_share_are_no_evidence():
    wording = "Since the answer may be very large, return it modulo 10^9 + 7."
    problems = [Problem("s", str(n), "math", f"Count the trees of kind {n}. {wording}", "1") for n in range(5)]
    found = EvaluationSets([EvaluationSet("s", problems, 13)], 13)
    assert found.find(f"How many ways are there? {wording}") == []
    assert found.find(problems[2].question.lower())[0].identity == "2"
    few = EvaluationSets([EvaluationSet("s", problems[:3], 13)], 13)
    assert few.find(f"How many ways are there? {wording}")[0].text.startswith("since the answer")


# -- what is held out -------------------------------------------------------------------------------------------------


def validation_questions(folder):
    file = Path(folder) / "validation.parquet"
    return {question_of(made) for made in rows_of(folder, "validation")} if file.exists() else set()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 5), order=st.randoms(use_true_random=False), limit=st.integers(20, 60))
def test_what_is_held_out_depends_on_the_question_alone(tmp_path, seed, order, limit):
    shutil.rmtree(tmp_path)
    rows = sums(60)
    all_of_them = run(tmp_path / "a", write_lines(tmp_path / "a.jsonl", rows), validation=0.3, seed=seed)
    shuffled = list(rows)
    order.shuffle(shuffled)
    again = run(tmp_path / "b", write_lines(tmp_path / "b.jsonl", shuffled), validation=0.3, seed=seed)
    held_out = validation_questions(all_of_them.folder)
    assert held_out == validation_questions(again.folder) and 3 < len(held_out) < 35
    some = run(tmp_path / "c", tmp_path / "b.jsonl", validation=0.3, seed=seed, limit=limit)
    read = {each["messages"][0]["content"] for each in shuffled[:limit]}
    assert validation_questions(some.folder) == held_out & read
    assert not validation_questions(some.folder) & {question_of(made) for made in rows_of(some.folder, "train")}


@given(st.text(max_size=30), st.floats(0, 0.99), st.integers())
def test_a_larger_share_holds_out_all_of_a_smaller_one(question, share, seed):
    assert is_held_out(digest(question), share, seed) <= is_held_out(digest(question), share + 0.01, seed)
    assert not is_held_out(digest(question), 0.0, seed)


@given(st.text())
def test_a_normalised_question_is_its_own_and_spaces_and_case_change_none(text):
    assert normalised(f"  {text}\n ") == normalised(text)
    assert normalised("Find $x$ now.") == normalised("find  x now") != normalised("find -x now")


# -- reading ----------------------------------------------------------------------------------------------------------


def written(folder, form, rows):
    file = folder / f"rows{form}"
    if form == ".parquet":
        return write_parquet(file, rows, group=7)
    text = json.dumps(rows) if form == ".json" else "".join(json.dumps(each) + "\n" for each in rows)
    file.write_bytes(gzip.compress(text.encode()) if form.endswith(".gz") else text.encode())
    return file


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
@pytest.mark.parametrize("start", [0, 1, 7, 8, 20, 29, 30, 31])
def test_rows_are_read_from_any_row_on(tmp_path, form, start):
    rows = [{"n": n} for n in range(20)]
    written(tmp_path, form, rows)
    more = tmp_path / "more.jsonl"
    write_lines(more, [{"n": n} for n in range(20, 30)])
    entry = str(tmp_path / "*")
    read = open_rows(entry, "source")
    files = sorted(tmp_path.iterdir(), key=str)
    expected = [*range(20, 30), *range(20)] if files[0] == more else [*range(20), *range(20, 30)]
    assert [each["n"] for _, each in read.read(start)] == expected[start:]
    assert read.share == 1.0 and [len(each["sha256"]) for each in read.origin()] == [64, 64]


def test_a_folder_that_datasets_saved_and_a_csv_file_are_read_too(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"n": n} for n in range(9)]).save_to_disk(tmp_path / "saved")
    assert [each["n"] for _, each in open_rows(str(tmp_path / "saved"), "source").read(4)] == [4, 5, 6, 7, 8]
    (tmp_path / "gpqa.csv").write_text('Question,Record ID\n"a, b",rec1\nc,rec2\n')
    rows = [each for _, each in open_rows(str(tmp_path / "gpqa.csv"), "source").read()]
    assert rows == [{"Question": "a, b", "Record ID": "rec1"}, {"Question": "c", "Record ID": "rec2"}]


@pytest.mark.parametrize(
    "source, message",
    [
        ("{broken\n", r"^source: row 1 of .*rows.jsonl is not JSON \(.*\); correct it$"),
        ('{"a": 1}\n\xff\n', r"is not JSON"),
        (None, r"^source: '.*rows.jsonl' is not a file or folder"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_the_option(tmp_path, source, message):
    file = tmp_path / "rows.jsonl"
    if source is not None:
        file.write_text(source)
    with pytest.raises(ConfigurationError, match=message):
        run(tmp_path / "out", file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_a_hub_that_does_not_answer_is_one_line_with_a_way_out(tmp_path, offline):
    # In a process of its own: the library reads these once.
    code = (
        "from hybrid_lora_plugin.cli.data import main\n"
        f"raise SystemExit(main(['set=gsm8k', 'output_dir={tmp_path / 'out'}']))"
    )
    chosen = (
        {"HF_HUB_OFFLINE": "1"}
        if offline == "HF_HUB_OFFLINE"
        else {"HF_HUB_OFFLINE": "0", offline: "http://127.0.0.1:9"}
    )
    environment = os.environ | chosen
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("hybrid-lora-data: source: openai/gsm8k cannot be read from the hub (")
    assert "or give a file or folder on this machine" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_an_evaluation_set_without_an_answer_is_refused_not_left_out(tmp_path):
    test = write_lines(tmp_path / "test.jsonl", [ROWS["math500"], ROWS["math500"] | {"answer": None}])
    source = write_lines(tmp_path / "rows.jsonl", sums(2))
    for option in ("decontaminate", "evaluation"):
        with pytest.raises(ConfigurationError, match=rf"^{option}: row 2 of .*test.jsonl: `answer` is None"):
            run(tmp_path / "out", source, lambda *_: True, **{option: [f"math500={test}"]})
    with pytest.raises(ConfigurationError, match="^evaluation: math500 is given twice; give it once"):
        run(tmp_path / "out", source, evaluation=[f"math500={test}", f"math500={test}"])


def test_parts_that_are_not_there_are_named(tmp_path):
    write_lines(tmp_path / "mixture" / "math" / "train.jsonl", sums(2))
    with pytest.raises(
        ConfigurationError, match="mixture' has no folder code; give the folder with math, code, science"
    ):
        run(tmp_path / "out", tmp_path / "mixture", configs=["all"])
    with pytest.raises(ConfigurationError, match="^format: MATH-500 has no responses to learn from"):
        run(tmp_path / "out", write_lines(tmp_path / "m.jsonl", [ROWS["math500"]]), set="math500", format="sft")


def test_what_is_there_is_never_overwritten(tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", sums(3))
    done = run(tmp_path / "out", source)
    before = contents(done.folder)
    with pytest.raises(ConfigurationError, match="^output_dir: .*out is there already; give a new folder"):
        run(tmp_path / "out", source)
    assert contents(done.folder) == before
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="mine.partial is no preparation that can go on; remove it"):
        run(tmp_path / "mine", source)


# -- interruptions ----------------------------------------------------------------------------------------------------


class Dies(Watch):
    """Ends the process in the middle: at a row, or when a stage begins."""

    def __init__(self, at):
        self._at = at

    def stage(self, text):
        if text == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def rows(self, read, kept, share):
        if read == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(*arguments, at, **options):
    """The same in a process of its own that is killed."""
    child = os.fork()
    if not child:
        try:
            run(*arguments, watch=Dies(at), **options)
        finally:
            os._exit(7)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("form", ["rl", "sft"])
@pytest.mark.parametrize("kills", [[1], [10], [11, 12], [35, 36, 58], ["writing"], [25, "writing", "writing"]])
def test_a_preparation_that_was_killed_ends_with_the_same_bytes(tmp_path, monkeypatch, form, kills):
    monkeypatch.setattr(parts, "PART_ROWS", 10)
    monkeypatch.setattr(runner, "PART_ROWS", 10)
    rows = [*sums(30), *sums(12, 8), *sums(18, 30)]
    for part, some in (("math", rows[:37]), ("science", rows[37:])):
        write_parquet(tmp_path / "rows" / part / "train.parquet", some, group=6)
    test = write_lines(tmp_path / "test.jsonl", [{"problem": rows[3]["messages"][0]["content"], "answer": "1"}])
    options = {
        "configs": ["math", "science"], "decontaminate": [f"math500={test}"], "validation": 0.3, "format": form,
    }  # fmt: skip
    whole = run(tmp_path / "whole", tmp_path / "rows", **options)
    for at in kills:
        killed(tmp_path / "killed", tmp_path / "rows", at=at, **options)
        assert not (tmp_path / "killed").exists()
    again = run(tmp_path / "killed", tmp_path / "rows", **options)
    assert again.resumed == (kills[-1] == "writing" or kills[-1] > 10)
    assert contents(again.folder) == contents(whole.folder)
    assert not (tmp_path / "killed.partial").exists()
    assert whole.sheet["total"]["read"] == 60 and set(whole.sheet["total"]["dropped"]) == {
        runner.REPEATED, runner.CONTAMINATED,
    }  # fmt: skip


def test_another_preparation_is_not_mixed_into_an_unfinished_one(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 10)
    monkeypatch.setattr(runner, "PART_ROWS", 10)
    source = write_lines(tmp_path / "rows.jsonl", sums(30))
    killed(tmp_path / "out", source, at=25)
    with pytest.raises(
        ConfigurationError, match="unfinished preparation with another prompt and seed; give what it was"
    ):
        run(tmp_path / "out", source, seed=1, prompt="io")
    write_lines(source, sums(31))
    with pytest.raises(ConfigurationError, match="unfinished preparation with another source"):
        run(tmp_path / "out", source)
    write_lines(source, sums(30))
    (tmp_path / "out.partial" / "00001.json").write_text("{")
    with pytest.raises(ConfigurationError, match="00001.json is damaged .*; remove .*out.partial"):
        run(tmp_path / "out", source)
    shutil.rmtree(tmp_path / "out.partial")
    killed(tmp_path / "out", source, at=5)
    assert run(tmp_path / "out", source, seed=1).sheet["options"]["seed"] == 1


def test_the_page_beside_the_data_has_the_digest_of_each_file(tmp_path):
    from hybrid_lora_plugin.files import file_sha256

    done = run(tmp_path / "out", write_lines(tmp_path / "rows.jsonl", sums(9)), validation=0.3)
    page = (done.folder / "README.md").read_text()
    assert "NOT decontaminated" in page and re.search(r"\| \*\*read\*\* \| 9 \| 9 \|", page)
    for file in ("train.parquet", "validation.parquet"):
        assert file_sha256(done.folder / file) in page
    assert f"rows.jsonl, SHA-256 `{file_sha256(tmp_path / 'rows.jsonl')}`" in page
