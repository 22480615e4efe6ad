"""An evaluation: what is still to be asked, what is still to be judged, and the results of both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from hybrid_lora_plugin.evaluation.folder import EvaluationFolder
from hybrid_lora_plugin.evaluation.records import NOT_ASKED, Judgement, Response
from hybrid_lora_plugin.evaluation.summary import BenchmarkResult, summarise
from hybrid_lora_plugin.rewards.scorer import Scorer
from hybrid_lora_plugin.tasks.problem import Problem

#: is told (done, in all), responses
Progress = Callable[[int, int], None]


class Question(NamedTuple):
    """One response that is wanted.

    ``benchmark``, ``identity`` and ``sample`` say which; ``seed`` is that of its draws, ``prompt`` its tokens.
    """

    benchmark: str
    identity: str
    sample: int
    seed: int
    prompt: tuple[int, ...]


class Answer(NamedTuple):
    """A text, its length in tokens, and why it ended: ``stop`` or ``length``."""

    text: str
    tokens: int
    finish: str


#: questions -> each with its answer, in any order
Generate = Callable[[Iterable[Question]], Iterator[tuple[Question, Answer]]]


@dataclass(frozen=True)
class Task:
    """One benchmark of an evaluation.

    Attributes:
        name: of the benchmark.
        problems: [P] that are asked.
        of: problems that the benchmark has.
        k, repeats: k · r responses each.
    """

    name: str
    problems: Sequence[Problem]
    of: int
    k: int
    repeats: int

    @property
    def samples(self) -> int:
        return self.k * self.repeats


def response_seed(seed: int, benchmark: str, identity: str, sample: int) -> int:
    """Seed of one response, in [0, 2^31): the same whatever else is asked, in whatever order."""
    digest = hashlib.sha256(f"{seed}/{benchmark}/{identity}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def ask(
    folder: EvaluationFolder,
    tasks: Sequence[Task],
    tokens_of: Callable[[Problem], Sequence[int]],
    longest_prompt: int,
    seed: int,
    generate: Callable[[], Generate],
    progress: Progress = lambda done, total: None,
) -> None:
    """Get every response that the folder has not; each is kept when it comes.

    Args:
        folder: open.
        tasks: what is asked.
        tokens_of: problem -> tokens of its prompt.
        longest_prompt: tokens; a longer one is not asked, and its responses are kept as such.
        seed: of the run.
        generate: starts the engine; called where there is something to generate, and not otherwise.
        progress: is told about responses.
    """
    with ExitStack() as files:
        kept = {task.name: files.enter_context(folder.responses(task.name)) for task in tasks}
        wanted = sum(len(task.problems) * task.samples for task in tasks)
        done = 0
        questions: list[Question] = []
        for task in tasks:
            for problem in task.problems:
                missing = [n for n in range(task.samples) if (problem.identity, n) not in kept[task.name].records]
                done += task.samples - len(missing)
                tokens = tuple(tokens_of(problem)) if missing else ()
                for sample in missing:
                    drawn = response_seed(seed, task.name, problem.identity, sample)
                    if len(tokens) > longest_prompt:
                        kept[task.name].add(Response(problem.identity, sample, "", 0, len(tokens), NOT_ASKED, drawn))
                        done += 1
                    else:
                        questions.append(Question(task.name, problem.identity, sample, drawn, tokens))
        progress(done, wanted)
        if not questions:
            return
        for question, answer in generate()(questions):
            kept[question.benchmark].add(
                Response(
                    question.identity,
                    question.sample,
                    answer.text,
                    answer.tokens,
                    len(question.prompt),
                    answer.finish,
                    question.seed,
                )
            )
            done += 1
            progress(done, wanted)


def judge(
    folder: EvaluationFolder,
    tasks: Sequence[Task],
    scorer: Scorer,
    workers: int,
    again: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Judge every response that is not judged; the responses must all be there.

    Args:
        folder: with the responses.
        tasks: as for ``ask``.
        scorer: the rewards of training.
        workers: responses judged at once.
        again: judge all of them anew; the earlier judgements give way together, once a benchmark is through.
        progress: is told about judgements.

    Raises:
        RewardError: a response could not be judged; nothing is scored in its place, and what was judged is kept.
    """
    responses = {task.name: folder.responses(task.name).records for task in tasks}
    wanted, done = sum(map(len, responses.values())), 0
    for task in tasks:
        file = folder.judgements(task.name)
        kinds = {problem.identity: problem for problem in task.problems}
        pending = [one for one in responses[task.name].values() if again or one.key not in file.records]
        done += len(responses[task.name]) - len(pending)
        judged = _judged(pending, kinds, scorer, workers)
        if again:
            anew = []
            for judgement in judged:
                anew.append(judgement)
                done += 1
                progress(done, wanted)
            file.replace(sorted(anew, key=lambda one: one.key))
            continue
        with file:
            for judgement in judged:
                file.add(judgement)
                done += 1
                progress(done, wanted)


def _judged(
    responses: Sequence[Response], problems: Mapping[str, Problem], scorer: Scorer, workers: int
) -> Iterator[Judgement]:
    """Judgements as they come; one that fails ends all."""

    def judged(response: Response) -> Judgement:
        problem = problems[response.identity]
        if response.finish == NOT_ASKED:
            return Judgement(*response.key, correct=False, answer=None, note="the prompt was too long")
        verdict = scorer.score(problem.kind, response.text, problem.gold, len(problem.options) or None)
        return Judgement(*response.key, verdict.correct, verdict.answer, verdict.timed_out, verdict.note)

    if workers == 1:
        yield from map(judged, responses)
        return
    left = iter(responses)
    with ThreadPoolExecutor(workers) as pool:
        # Few ahead of those that are read, so that an error ends it soon.
        running = {pool.submit(judged, response) for response in islice(left, 2 * workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(judged, response) for response in islice(left, len(done))}
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()


def results(folder: EvaluationFolder, tasks: Sequence[Task]) -> list[BenchmarkResult]:
    """The result of each benchmark, from responses and judgements that are all there."""
    return [
        summarise(
            task.name,
            task.k,
            task.repeats,
            [problem.identity for problem in task.problems],
            task.of,
            folder.responses(task.name).records,
            folder.judgements(task.name).records,
        )
        for task in tasks
    ]


def recorded_tasks(folder: EvaluationFolder) -> list[Task]:
    """The benchmarks of a folder as they were asked.

    Raises:
        ConfigurationError: something in it cannot be read, or responses are missing.
    """
    tasks = []
    for name, recorded in folder.settings()["benchmarks"].items():
        task = Task(name, folder.problems(name), recorded["of"], recorded["k"], recorded["repeats"])
        tasks.append(task)
    return tasks


def missing_responses(folder: EvaluationFolder, task: Task) -> int:
    """How many responses a benchmark still lacks."""
    return len(task.problems) * task.samples - len(folder.responses(task.name).records)
