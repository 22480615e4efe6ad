"""The three things that ``hybrid-lora-eval`` does; apart, as they import what takes time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybrid_lora_plugin import __version__
from hybrid_lora_plugin.cli.eval_progress import progress_for
from hybrid_lora_plugin.config import EvaluateCommandConfig
from hybrid_lora_plugin.config_evaluation import ScoringConfig
from hybrid_lora_plugin.errors import ConfigurationError, reason_of
from hybrid_lora_plugin.evaluation import comparison as comparing
from hybrid_lora_plugin.evaluation import run as running
from hybrid_lora_plugin.evaluation.folder import EvaluationFolder, digest
from hybrid_lora_plugin.evaluation.measures import MEASURES
from hybrid_lora_plugin.evaluation.paper import size_in_paper
from hybrid_lora_plugin.evaluation.report import RunReport, as_text
from hybrid_lora_plugin.evaluation.run import Answer, Question, Task
from hybrid_lora_plugin.files import complete_file, complete_folder
from hybrid_lora_plugin.rewards.scorer import Scorer, ScoringLimits

RESULTS = "results"
#: where the copy of a base model with an adapter's full weights stands while it is needed
_ASSEMBLED = ".model"


def evaluate(config: EvaluateCommandConfig) -> int:
    """Ask what is missing, judge what is not judged, write the results."""
    from hybrid_lora_plugin.evaluation.served_model import remove, served_model
    from hybrid_lora_plugin.verl_backend.generation import engine_version

    tasks = _tasks(config)
    engine = engine_version()
    model = served_model(config.model, config.trust_remote_code)
    tokens_of, stops = _prompts(config, model)
    _require_room(config, model)
    settings = {
        "model": os.path.abspath(config.model) if os.path.isdir(config.model) else config.model,
        "weights": model.identity,
        "prompt": config.prompt,
        "chat_template": tokens_of.template,
        "sampling": asdict(config.sampling),
        "stop_token_ids": stops,
        "max_prompt_length": config.max_prompt_length,
        "max_response_length": config.max_response_length,
        "engine": {"vllm": engine, "dtype": config.engine.dtype},
        "paper_rows": size_in_paper(model.config),
    }
    with _scorer(config.scoring) as scorer:
        # Before a GPU works for hours on what nobody can judge.
        scorer.prepare({problem.kind for task in tasks for problem in task.problems})
        folder = EvaluationFolder(config.output_dir)
        folder.open(settings, {task.name: _recorded(task) for task in tasks})
        with folder.locked():
            for task in tasks:
                folder.write_problems(task.name, task.problems)
            for note in model.notes:
                print(note)
            progress = progress_for("responses")
            try:
                running.ask(
                    folder,
                    tasks,
                    tokens_of,
                    config.max_prompt_length,
                    config.sampling.seed,
                    lambda: _generator(config, model, folder, stops),
                    progress,
                )
            finally:
                progress.close()
                remove(folder.path / _ASSEMBLED)
            _judge(folder, tasks, scorer, config.scoring)
            label = config.label or f"{Path(config.model).name}, {config.prompt}"
            _write_results(folder, label, config.scoring)
    return 0


def rescore(config: EvaluateCommandConfig) -> int:
    """Judge the responses of a folder again and write the results anew."""
    folder = EvaluationFolder(config.rescore, "rescore")
    folder.settings()
    with folder.locked(), _scorer(config.scoring) as scorer:
        tasks = _finished(folder)
        scorer.prepare({problem.kind for task in tasks for problem in task.problems})
        before = {task.name: folder.judgements(task.name).records for task in tasks}
        _judge(folder, tasks, scorer, config.scoring, again=True)
        for task in tasks:
            after = folder.judgements(task.name).records
            known = [key for key in after if key in before[task.name]]
            right = sum(after[key].correct and not before[task.name][key].correct for key in known)
            wrong = sum(before[task.name][key].correct and not after[key].correct for key in known)
            title = MEASURES[task.name].title
            print(f"{title}: {len(after):,} responses judged; {right:,} are right now and {wrong:,} no longer")
        _write_results(folder, config.label or _label(folder), config.scoring)
    return 0


def compare(config: EvaluateCommandConfig) -> int:
    """Say whether two runs differ."""
    folders = [EvaluationFolder(path, "compare") for path in config.compare]
    labels = tuple(_label(folder) for folder in folders)
    if labels[0] == labels[1]:
        labels = tuple(f"{label} ({folder.path})" for label, folder in zip(labels, folders, strict=True))
    compared = comparing.compare_runs(folders, labels)
    print(comparing.as_text(compared))
    if config.output_dir:
        from hybrid_lora_plugin.evaluation.picture import draw_comparison

        target = Path(config.output_dir)
        try:
            with complete_folder(target) as unfinished:
                _write(unfinished / "comparison.json", json.dumps(compared.as_json(), indent=2) + "\n")
                _write(unfinished / "comparison.md", comparing.as_markdown(compared))
                draw_comparison(compared, unfinished / "comparison.png")
        except OSError as error:
            raise ConfigurationError(
                f"output_dir: {config.output_dir!r} cannot be written ({error.strerror or error}); give a new folder"
            ) from error
        print(f"\ncomparison.json, comparison.md and comparison.png written to {target}")
    return 0


# -- what is asked ----------------------------------------------------------------------------------------------------


def _tasks(config: EvaluateCommandConfig) -> list[Task]:
    from hybrid_lora_plugin.evaluation.problems import published_rows, read_problems

    tasks = []
    for name in config.benchmarks:
        problems = read_problems(name, getattr(config.data, name))
        if len(problems) != published_rows(name):
            print(f"{name}: {len(problems):,} problems, where the published set has {published_rows(name):,}")
        measure = MEASURES[name]
        asked = problems[: config.limit]
        tasks.append(Task(name, asked, len(problems), measure.k, config.repeats or measure.repeats))
    return tasks


def _recorded(task: Task) -> dict[str, Any]:
    return {
        "problems": digest(task.problems),
        "asked": len(task.problems),
        "of": task.of,
        "k": task.k,
        "repeats": task.repeats,
    }


def _prompts(config: EvaluateCommandConfig, model):
    """What makes tokens of a problem, and the tokens that end a response."""
    from hybrid_lora_plugin.evaluation.problems import PromptTokens
    from hybrid_lora_plugin.training.base_model import UNLOADABLE
    from hybrid_lora_plugin.training.export import load_tokenizer

    try:
        tokenizer = load_tokenizer(model.tokenizer, config.trust_remote_code)
    except UNLOADABLE as error:
        raise ConfigurationError(
            f"model: the tokenizer in {model.tokenizer!r} cannot be loaded ({reason_of(error)}); put one there"
        ) from error
    return PromptTokens(tokenizer, config.prompt), model.end_tokens(tokenizer.eos_token_id)


def _require_room(config: EvaluateCommandConfig, model) -> None:
    room = model.config.get("max_position_embeddings")
    wanted = config.max_prompt_length + config.max_response_length
    if isinstance(room, int) and wanted > room and not model.config.get("rope_scaling"):
        raise ConfigurationError(
            f"max_response_length: {config.max_response_length} with max_prompt_length {config.max_prompt_length} is "
            f"{wanted}, and the model has {room} positions; give less of one"
        )


def _generator(config: EvaluateCommandConfig, model, folder: EvaluationFolder, stops: Sequence[int]):
    from hybrid_lora_plugin.verl_backend import generation

    generation.prepare_environment()
    tokenizer = model.tokenizer
    model.assemble(folder.path / _ASSEMBLED)
    generator = generation.Generator(
        model=model.path,
        tokenizer=tokenizer,
        sampling=config.sampling,
        engine=config.engine,
        longest=config.max_prompt_length + config.max_response_length,
        longest_response=config.max_response_length,
        stop_token_ids=tuple(stops),
        adapter=model.adapter,
        rank=model.rank,
        trust_remote_code=config.trust_remote_code,
    )

    def generate(questions: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        requests = ((question, question.prompt, question.seed) for question in questions)
        for question, generated in generator.generate(requests):
            yield question, Answer(*generated)

    return generate


# -- judging and results ----------------------------------------------------------------------------------------------


def _scorer(config: ScoringConfig) -> Scorer:
    workers = _workers(config)
    limits = ScoringLimits(code_seconds=config.code_seconds, math_processes=workers, code_at_a_time=workers)
    return Scorer(limits, unsandboxed_code=config.unsandboxed_code)


def _workers(config: ScoringConfig) -> int:
    return config.workers or len(os.sched_getaffinity(0))


def _judge(
    folder: EvaluationFolder, tasks: Sequence[Task], scorer: Scorer, config: ScoringConfig, again: bool = False
) -> None:
    progress = progress_for("judged")
    try:
        running.judge(folder, tasks, scorer, _workers(config), again, progress)
    finally:
        progress.close()


def _finished(folder: EvaluationFolder) -> list[Task]:
    """The benchmarks whose responses are all there; says which others are left out."""
    finished = []
    for task in running.recorded_tasks(folder):
        if missing := running.missing_responses(folder, task):
            print(f"{task.name}: left out, as {missing:,} responses are missing; the command that began it goes on")
        else:
            finished.append(task)
    if not finished:
        raise ConfigurationError(
            f"rescore: no benchmark in {folder.path} has all its responses; give the command that began it again"
        )
    return finished


def _label(folder: EvaluationFolder) -> str:
    """What the results in a folder call the run."""
    settings = folder.settings()["settings"]
    try:
        return str(json.loads((folder.path / f"{RESULTS}.json").read_text(encoding="utf-8"))["label"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{Path(str(settings['model'])).name}, {settings['prompt']}"


def _write_results(folder: EvaluationFolder, label: str, config: ScoringConfig) -> None:
    from hybrid_lora_plugin.evaluation.picture import draw_results

    # A benchmark that another command asked in this folder belongs to the same run.
    tasks = [task for task in _finished(folder) if _is_judged(folder, task)]
    settings = folder.settings()["settings"]
    scored_by = {"hybrid-lora-plugin": __version__, "math-verify": _version("math-verify")}
    scored_by["code_seconds"] = f"{config.code_seconds:g}"
    report = RunReport(label, settings, running.results(folder, tasks), settings["paper_rows"], scored_by)
    _write(folder.path / f"{RESULTS}.json", json.dumps(report.as_json(), indent=2) + "\n")
    _write(folder.path / f"{RESULTS}.md", report.as_markdown())
    with complete_file(folder.path / f"{RESULTS}.png") as unfinished:
        with unfinished.open("wb") as stream:
            draw_results(report, stream)
    print(as_text(report))
    print(f"results.json, results.md and results.png written to {folder.path}")


def _is_judged(folder: EvaluationFolder, task: Task) -> bool:
    judged = folder.judgements(task.name).records
    return all((problem.identity, n) in judged for problem in task.problems for n in range(task.samples))


def _write(file: Path, text: str) -> None:
    with complete_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
