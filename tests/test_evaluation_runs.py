"""Asking, keeping, judging and summing up: in every order of interruptions, and with what models write."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.errors import ConfigurationError, RewardError
from hybrid_lora_plugin.evaluation.comparison import compare_runs
from hybrid_lora_plugin.evaluation.estimators import unbiased_pass_at_k
from hybrid_lora_plugin.evaluation.folder import EvaluationFolder, digest
from hybrid_lora_plugin.evaluation.measures import MEASURES
from hybrid_lora_plugin.evaluation.paper import COLUMNS, TABLE_1, size_in_paper
from hybrid_lora_plugin.evaluation.records import CUT, NOT_ASKED, Judgement, RecordFile, Response
from hybrid_lora_plugin.evaluation.report import RunReport
from hybrid_lora_plugin.evaluation.run import (
    Answer,
    Task,
    ask,
    judge,
    missing_responses,
    recorded_tasks,
    response_seed,
    results,
)
from hybrid_lora_plugin.rewards.scorer import Scorer
from hybrid_lora_plugin.tasks.benchmarks import BENCHMARKS
from hybrid_lora_plugin.tasks.problem import Problem

SETTINGS = {
    "model": "models/tiny",
    "prompt": "cot",
    "sampling": {"temperature": 1.0, "top_p": 1.0},
    "max_response_length": 64,
    "engine": {"vllm": "0.28.0", "dtype": "auto"},
    "paper_rows": None,
}


def contest(count=6, first=0):
    return [
        Problem("math-ai/aime25", f"{number}", "integer", f"What is {number} + 1?", str(number + 1))
        for number in range(first, first + count)
    ]


def choices(count=3):
    return [
        Problem("TIGER-Lab/MMLU-Pro", f"q{n}", "letter", "Which one?", "B", ("one", "two", "three"))
        for n in range(count)
    ]


def tasks_of(repeats=2, problems=None):
    return [
        Task("aime25", problems or contest(), 30, 4, repeats),
        Task("mmlu_pro", choices(), 3, 1, 1),
    ]


def opened(path, tasks, **changes):
    folder = EvaluationFolder(path)
    recorded = {
        task.name: {
            "problems": digest(task.problems), "asked": len(task.problems), "of": task.of, "k": task.k,
            "repeats": task.repeats,
        }
        for task in tasks
    }  # fmt: skip
    folder.open(SETTINGS | changes, recorded)
    for task in tasks:
        folder.write_problems(task.name, task.problems)
    return folder


def tokens_of(problem):
    return [ord(letter) % 50 for letter in problem.question]


def written(question):
    """What the model writes: decided by the seed alone, as with an engine that draws by it."""
    draw = random.Random(question.seed)
    if question.benchmark == "mmlu_pro":
        return Answer(draw.choice(["Answer: B", "Answer: C", "It is the second."]), 3, "stop")
    right = draw.random() < 0.4
    text = f"So \\boxed{{{int(question.identity) + 1 if right else 7000}}}"
    return Answer(text if draw.random() < 0.8 else "so on and so on", 9, draw.choice(["stop", "length"]))


def engine(order=None, stop_after=None, started=None):
    """An engine that answers in some order and may be interrupted."""

    def start():
        if started is not None:
            started.append(True)

        def generate(questions):
            questions = list(questions)
            random.Random(order).shuffle(questions)
            for number, question in enumerate(questions):
                if number == stop_after:
                    raise KeyboardInterrupt
                yield question, written(question)

        return generate

    return start


def whole(path, repeats=2, order=None):
    tasks = tasks_of(repeats)
    folder = opened(path, tasks)
    ask(folder, tasks, tokens_of, 100, 0, engine(order))
    with Scorer() as scorer:
        judge(folder, tasks, scorer, 2)
    return folder, tasks


def content(folder, tasks):
    return {task.name: (folder.responses(task.name).records, folder.judgements(task.name).records) for task in tasks}


# -- asking -----------------------------------------------------------------------------------------------------------


def test_every_response_is_kept_with_a_seed_of_its_own(tmp_path):
    folder, tasks = whole(tmp_path / "run")
    responses = folder.responses("aime25").records
    assert set(responses) == {(str(n), sample) for n in range(6) for sample in range(8)}
    assert len({one.seed for one in responses.values()}) == 48
    one = responses["3", 5]
    assert one.seed == response_seed(0, "aime25", "3", 5) and one.prompt_tokens == len("What is 3 + 1?")
    assert response_seed(1, "aime25", "3", 5) != one.seed and 0 <= one.seed < 1 << 31


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60), st.integers(0, 40)), max_size=5), st.integers(0, 9))
def test_interrupted_anywhere_and_in_any_order_it_ends_with_the_same(tmp_path_factory, stops, order):
    path = tmp_path_factory.mktemp("runs")
    expected = content(*whole(path / "whole"))
    tasks = tasks_of()
    for seed, stop, torn in stops:
        folder = opened(path / "run", tasks)
        try:
            ask(folder, tasks, tokens_of, 100, 0, engine(seed, stop))
        except KeyboardInterrupt:
            pass
        file = path / "run" / "responses" / "aime25.jsonl"
        if file.exists() and torn:
            # A process that was killed had begun a line.
            with file.open("ab") as stream:
                stream.write(b'{"identity": "0", "sample": 0, "text": "\\u00e4 and so on and so on"'[:torn])
    folder = opened(path / "run", tasks)
    ask(folder, tasks, tokens_of, 100, 0, engine(order))
    with Scorer() as scorer:
        judge(folder, tasks, scorer, 1)
    assert content(folder, tasks) == expected


def test_nothing_is_started_where_nothing_is_missing(tmp_path):
    folder, tasks = whole(tmp_path / "run")
    started = []
    ask(folder, tasks, tokens_of, 100, 0, engine(started=started))
    assert started == [] and [missing_responses(folder, task) for task in tasks] == [0, 0]


def test_a_prompt_that_is_too_long_is_not_asked_and_counts_as_wrong(tmp_path):
    problems = [*contest(3), Problem("math-ai/aime25", "long", "integer", "why " * 30, "1")]
    tasks = [Task("aime25", problems, 4, 4, 1)]
    folder = opened(tmp_path / "run", tasks)
    ask(folder, tasks, tokens_of, 100, 0, engine())
    assert {one.finish for key, one in folder.responses("aime25").records.items() if key[0] == "long"} == {NOT_ASKED}
    with Scorer() as scorer:
        judge(folder, tasks, scorer, 1)
    (result,) = results(folder, tasks)
    assert result.counts.not_asked == 4 and result.counts.responses == 16 and result.problems == 4
    assert not any(one.correct for key, one in folder.judgements("aime25").records.items() if key[0] == "long")


def test_progress_begins_where_the_last_run_ended(tmp_path):
    tasks = tasks_of()
    folder, told = opened(tmp_path / "run", tasks), []
    with pytest.raises(KeyboardInterrupt):
        ask(folder, tasks, tokens_of, 100, 0, engine(0, 10))
    ask(folder, tasks, tokens_of, 100, 0, engine(0), lambda done, total: told.append((done, total)))
    assert told[0] == (10, 51) and told[-1] == (51, 51)


# -- settings of a folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": "io"}, 'prompt: "io", and the responses'),
        ({"sampling": {"temperature": 0.6, "top_p": 1.0}}, 'sampling: {"temperature": 0.6'),
        ({"engine": {"vllm": "0.29.0", "dtype": "auto"}}, "engine: "),
        ({"weights": "ab"}, 'weights: "ab"'),
    ],
)
def test_another_setting_in_the_same_folder_is_refused_by_name(tmp_path, change, says):
    tasks = tasks_of()
    opened(tmp_path / "run", tasks)
    with pytest.raises(ConfigurationError) as caught:
        opened(tmp_path / "run", tasks, **change)
    assert says in str(caught.value) and "another output_dir" in str(caught.value)


def test_other_problems_or_repeats_are_refused_by_name_and_another_benchmark_is_added(tmp_path):
    tasks = tasks_of()
    opened(tmp_path / "run", tasks[:1])
    opened(tmp_path / "run", tasks[1:])
    assert [task.name for task in recorded_tasks(EvaluationFolder(tmp_path / "run"))] == ["aime25", "mmlu_pro"]
    with pytest.raises(ConfigurationError, match="repeats of aime25: 3"):
        opened(tmp_path / "run", tasks_of(repeats=3))
    with pytest.raises(ConfigurationError, match="problems of aime25"):
        opened(tmp_path / "run", tasks_of(problems=contest(first=1)))


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        opened(tmp_path, tasks_of())
    with pytest.raises(ConfigurationError, match="no folder of an evaluation"):
        EvaluationFolder(tmp_path, "rescore").settings()
    opened(tmp_path / "run", tasks_of())
    file = tmp_path / "run" / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 9}))
    with pytest.raises(ConfigurationError, match="use the version that wrote it"):
        EvaluationFolder(tmp_path / "run").settings()


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    folder = opened(tmp_path / "run", tasks_of())
    with folder.locked():
        with pytest.raises(ConfigurationError, match="another process is writing"):
            with EvaluationFolder(tmp_path / "run").locked():
                pass
    with folder.locked():
        pass


def test_changed_problems_beside_the_responses_are_refused(tmp_path):
    folder, _ = whole(tmp_path / "run")
    assert folder.problems("mmlu_pro") == choices()
    file = tmp_path / "run" / "problems" / "aime25.jsonl"
    file.write_text(file.read_text().replace('"gold": "1"', '"gold": "2"'))
    with pytest.raises(ConfigurationError, match="not what the responses beside it answer"):
        folder.problems("aime25")


# -- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ('{"identity": "1"}', "line 2"),
        ('{"identity": "1", "sample": "0", "correct": true, "answer": null}', "sample is '0'"),
        ('{"identity": "1", "sample": true, "correct": true, "answer": null}', "sample is True"),
        ('{"identity": "1", "sample": 0, "correct": 1, "answer": null}', "correct is 1"),
        ('{"identity": "0", "sample": 0, "correct": true, "answer": null}', "repeats sample 0 of 0"),
        ("[]", "line 2"),
    ],
)
def test_a_line_that_cannot_be_read_is_said_and_not_left_out(tmp_path, line, says):
    file = tmp_path / "lines.jsonl"
    good = json.dumps({"identity": "0", "sample": 0, "correct": True, "answer": None})
    file.write_text(f"{good}\n{line}\n{good.replace('0', '5')}\n")
    with pytest.raises(ConfigurationError) as caught:
        RecordFile(file, Judgement)
    assert says in str(caught.value) and "; " in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters()), st.text(st.characters(), min_size=1))
def test_whatever_a_model_writes_is_read_back_as_it_was(tmp_path_factory, text, identity):
    file = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    record = Response(identity, 0, text, len(text), 3, CUT, 1)
    with RecordFile(file, Response) as stream:
        stream.add(record)
        stream.add(replace(record, sample=1))
    assert RecordFile(file, Response).records == {(identity, 0): record, (identity, 1): replace(record, sample=1)}


def test_line_breaks_of_every_kind_in_a_response_do_not_break_lines(tmp_path):
    record = Response("a", 0, "1\r2\n3\x0b4\x0c5\x1c6\x856\u2028\u2029\ud800", 8, 3, CUT, 1)
    with RecordFile(tmp_path / "lines.jsonl", Response) as stream:
        stream.add(record)
    assert RecordFile(tmp_path / "lines.jsonl", Response).records == {("a", 0): record}


# -- judging ----------------------------------------------------------------------------------------------------------


class FailingScorer(Scorer):
    """The real one, until a response that its sandbox cannot run."""

    def score(self, kind, response, gold, options_count=None):
        if response.endswith("7000}"):
            raise RewardError("sandbox: it cannot start; install bubblewrap")
        return super().score(kind, response, gold, options_count)


def test_what_cannot_be_judged_ends_the_evaluation_and_is_never_scored(tmp_path):
    tasks = tasks_of()
    folder = opened(tmp_path / "run", tasks)
    ask(folder, tasks, tokens_of, 100, 0, engine())
    for workers in (1, 3):
        with FailingScorer() as scorer, pytest.raises(RewardError):
            judge(folder, tasks, scorer, workers)
        assert not any("7000" in str(one.answer) for one in folder.judgements("aime25").records.values())
    with Scorer() as scorer:
        judge(folder, tasks, scorer, 2)
    assert content(folder, tasks) == content(*whole(tmp_path / "whole"))


def test_rescoring_replaces_every_judgement_at_once(tmp_path):
    folder, tasks = whole(tmp_path / "run")
    before = content(folder, tasks)
    wrong = [replace(one, correct=not one.correct) for one in folder.judgements("aime25").records.values()]
    folder.judgements("aime25").replace(wrong)
    with FailingScorer() as scorer, pytest.raises(RewardError):
        judge(folder, tasks, scorer, 1, again=True)
    assert [one.correct for one in folder.judgements("aime25").records.values()] == [one.correct for one in wrong]
    with Scorer() as scorer:
        judge(folder, tasks, scorer, 2, again=True)
    assert content(folder, tasks) == before


def test_several_are_judged_at_once(tmp_path):
    barrier = threading.Barrier(3, timeout=20)

    class Waiting(Scorer):
        def score(self, *arguments):
            barrier.wait()
            return super().score(*arguments)

    tasks = [Task("mmlu_pro", choices(), 3, 1, 1)]
    folder = opened(tmp_path / "run", tasks)
    ask(folder, tasks, tokens_of, 100, 0, engine())
    with Waiting() as scorer:
        judge(folder, tasks, scorer, 3)


#: what a model may write to be taken for right, or to spoil the count; none is right
ADVERSARIAL = {
    "integer": [
        "", " ", "4", "The answer is 4", "\\boxed{}", "\\boxed{4", "\\boxed{four}", "\\boxed{4 or 5}", "\\boxed{4, 5}",
        "\\boxed{4} No: \\boxed{5}", "\\boxed{3=4}", "\\boxed{-4}", "\\boxed{4.5}", "\\boxed{44}", "boxed{4}",
        "\\boxed{\\boxed{}}", "\\boxed{x}" * 2000, "{" * 5000, "\\boxed{" * 3000 + "4", "#### 4", "\\boxed{4\\%5}",
        "\ud800", "\0", "\\boxed{1e999}", "\\boxed{" + "9" * 10000 + "}",
    ],
    "letter": [
        "", "B", "(B)?", "Answer: A\nAnswer: C", "Answer: BB", "Answer: Z", "Answer:", "answer is (X)",
        "Either A or B. Answer: A", "Answer: D", "Answer: " + "A" * 5000, "Αnswer: Β", "Answer: [A, B, C]",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in ADVERSARIAL.items() for text in texts])
def test_adversarial_responses_are_wrong_through_the_whole_evaluation(tmp_path, kind, text):
    problem = {"integer": contest(1, first=3)[0], "letter": choices(1)[0]}[kind]
    name = {"integer": "aime25", "letter": "mmlu_pro"}[kind]
    tasks = [Task(name, [problem], 1, 1, 1)]
    folder = opened(tmp_path / "run", tasks)
    ask(folder, tasks, tokens_of, 100, 0, lambda: lambda asked: ((one, Answer(text, 5, "stop")) for one in asked))
    with Scorer() as scorer:
        judge(folder, tasks, scorer, 1)
    (result,) = results(folder, tasks)
    if not (kind == "letter" and text in ("B", "(B)?", "Answer: BB")):
        # The documented extraction takes the last lone letter for an answer.
        assert result.value == 0.0
    assert result.counts.responses == 1 and result.counts.unparsed in (0, 1)


def test_unparsed_answers_are_wrong_and_counted(tmp_path):
    folder, tasks = whole(tmp_path / "run")
    contest_result, choice_result = results(folder, tasks)
    responses, judgements = folder.responses("aime25").records, folder.judgements("aime25").records
    assert contest_result.counts.unparsed == sum("boxed" not in one.text for one in responses.values()) > 0
    assert contest_result.counts.cut == sum(one.finish == CUT for one in responses.values()) > 0
    assert not any(judgements[key].correct for key, one in responses.items() if "boxed" not in one.text)


# -- results ----------------------------------------------------------------------------------------------------------


def test_a_result_is_what_a_count_by_hand_gives(tmp_path):
    folder, tasks = whole(tmp_path / "run")
    result, _ = results(folder, tasks)
    judgements = folder.judgements("aime25").records
    correct = [[judgements[str(n), sample].correct for sample in range(8)] for n in range(6)]
    solved = [[any(row[:4]), any(row[4:])] for row in correct]
    assert result.value == pytest.approx(sum(map(sum, solved)) / 12)
    assert result.per_repeat == [sum(row[0] for row in solved) / 6, sum(row[1] for row in solved) / 6]
    assert result.unbiased == pytest.approx(sum(unbiased_pass_at_k(8, sum(row), 4) for row in correct) / 6)
    assert result.per_response == sum(map(sum, correct)) / 48 and result.counts.correct == sum(map(sum, correct))
    assert result.low <= result.value <= result.high and (result.problems, result.of) == (6, 30)
    assert result.fewest_points == 50.0


def report_of(folder, tasks, size=None):
    return RunReport("our | run", SETTINGS, results(folder, tasks), size, {"hybrid-lora-plugin": "0"})


def test_the_report_says_all_that_was_counted(tmp_path):
    folder, tasks = whole(tmp_path / "run")
    report = report_of(folder, tasks, "Qwen2.5 1.5B Instruct")
    said, markdown = report.as_json(), report.as_markdown()
    assert json.loads(json.dumps(said)) == said
    assert said["results"]["aime25"]["counts"]["responses"] == 48 and said["results"]["mmlu_pro"]["k"] == 1
    assert said["results"]["aime25"]["measure"] == "pass@4"
    assert "of the first 6" in markdown and "6 problems, 50.0 points" in markdown
    assert "nothing: 3 problems are too few" in markdown
    assert "| paper: GSPO | Hybrid-LoRA (ours) | 105M | 81.6 | 42.0 | 36.7 | 56.9 | 38.5 | 47.6 |" in markdown
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("| paper")}
    assert widths == {10} and "our \\| run" in markdown
    assert "The paper has no row for a model of this size" in report_of(folder, tasks).as_markdown()


def test_the_papers_table_is_whole_and_its_aime_figures_are_of_five_runs():
    assert COLUMNS == tuple(MEASURES)[:6] and set(MEASURES) == set(BENCHMARKS)
    assert {size: len(rows) for size, rows in TABLE_1.items()} == {
        "Qwen2.5 1.5B Instruct": 14, "Qwen2.5 3B Instruct": 7, "Qwen2.5 7B Instruct": 4,
    }  # fmt: skip
    for rows in TABLE_1.values():
        for row in rows:
            assert len(row.figures) == 6
            # But for one that is printed as 20.6, where 20.7 is meant.
            assert all(abs(1.5 * value - round(1.5 * value)) < 0.076 or value == 20.6 for value in row.figures[1:3])


def test_the_papers_rows_are_found_by_the_size_of_a_model():
    config = {"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28}
    assert size_in_paper(config) == "Qwen2.5 1.5B Instruct"
    assert size_in_paper(config | {"num_hidden_layers": 2}) is None
    assert size_in_paper(config | {"model_type": "llama"}) is None


def test_pictures_are_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    from hybrid_lora_plugin.evaluation.picture import draw_comparison, draw_results

    folder, tasks = whole(tmp_path / "run")
    report = report_of(folder, tasks, "Qwen2.5 7B Instruct")
    compared = compare_runs([folder, folder], ("A", "B" * 100))
    for number in "12":
        draw_results(report, tmp_path / f"results{number}.png")
        draw_comparison(compared, tmp_path / f"comparison{number}.png")
    for name in ("results", "comparison"):
        assert (tmp_path / f"{name}1.png").read_bytes() == (tmp_path / f"{name}2.png").read_bytes()


# -- two runs ---------------------------------------------------------------------------------------------------------


def run_with(path, correct, k=1, name="gsm8k", **changes):
    """An evaluation whose judgements are these, [P][n]."""
    problems = contest(len(correct))
    tasks = [Task(name, problems, len(problems), k, len(correct[0]) // k)]
    folder = opened(path, tasks, **changes)
    folder.responses(name).replace(
        Response(problem.identity, n, "", 1, 1, "stop", 0)
        for problem, row in zip(problems, correct, strict=True)
        for n in range(len(row))
    )
    folder.judgements(name).replace(
        Judgement(problem.identity, n, right, None)
        for problem, row in zip(problems, correct, strict=True)
        for n, right in enumerate(row)
    )
    return folder


def test_two_runs_are_compared_problem_by_problem(tmp_path):
    first = run_with(tmp_path / "a", [[n < 40] for n in range(100)])
    second = run_with(tmp_path / "b", [[n < 50 and n != 0] for n in range(100)], weights="other")
    (one,) = compare_runs([first, second], ("base", "trained")).benchmarks
    assert (one.first, one.second, one.difference.better, one.difference.worse) == (0.4, 0.49, 10, 1)
    assert one.verdict == "trained is better by 9.0 points" and one.difference.low > 0
    # The same two figures with other problems behind them say nothing.
    third = run_with(tmp_path / "c", [[n >= 51] for n in range(100)])
    (one,) = compare_runs([first, third], ("base", "other")).benchmarks
    assert one.second == 0.49 and one.verdict.startswith("not distinguished")
    same = compare_runs([first, first], ("a", "a"))
    assert same.benchmarks[0].verdict == "the same on every problem" and same.notes == []


def test_repeats_are_compared_by_their_shares(tmp_path):
    first = run_with(tmp_path / "a", [[False] * 4 + [n == 0] * 4 for n in range(8)], k=4, name="aime24")
    second = run_with(tmp_path / "b", [[True] * 4 for n in range(8)], k=4, name="aime24")
    compared = compare_runs([first, second], ("a", "b"))
    (one,) = compared.benchmarks
    assert one.difference.mean == float((7 + Fraction(1, 2)) / 8) and one.difference.p == pytest.approx(2 / 2**8)
    assert compared.notes == ["aime24: 2 repeats in A and 1 in B."]


def test_what_else_differs_between_two_runs_is_said_or_refused(tmp_path):
    first = run_with(tmp_path / "a", [[True]] * 4)
    other = run_with(tmp_path / "b", [[True]] * 4, prompt="io")
    assert compare_runs([first, other], ("a", "b")).notes == [
        "The runs differ in more than the model: `prompt` (cot and io)."
    ]
    with pytest.raises(ConfigurationError, match="other problems; evaluate both on the same"):
        compare_runs([first, run_with(tmp_path / "c", [[True]] * 5)], ("a", "b"))
    with pytest.raises(ConfigurationError, match="give two evaluations of the same benchmarks"):
        compare_runs([first, run_with(tmp_path / "d", [[True]] * 4, name="math500")], ("a", "b"))
    unfinished = run_with(tmp_path / "e", [[True]] * 4)
    unfinished.judgements("gsm8k").replace([Judgement("0", 0, True, None)])
    with pytest.raises(ConfigurationError, match="gsm8k of .* is not finished"):
        compare_runs([first, unfinished], ("a", "b"))
