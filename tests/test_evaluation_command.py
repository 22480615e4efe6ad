"""What people give ``hybrid-lora-eval`` that cannot be used: one line, status 2, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from hybrid_lora_plugin.cli.eval import main
from hybrid_lora_plugin.cli.eval_progress import LineProgress
from hybrid_lora_plugin.config_evaluation import EVALUATIONS, EvaluationDataConfig
from hybrid_lora_plugin.evaluation.measures import MEASURES
from hybrid_lora_plugin.evaluation.problems import PromptTokens, published_rows, read_problems
from hybrid_lora_plugin.evaluation.served_model import served_model, write_with_full_weights
from hybrid_lora_plugin.tasks.benchmarks import BENCHMARKS
from hybrid_lora_plugin.training.export import load_tokenizer
from tests.support.benchmark_rows import ROWS
from tests.support.hybrid_checkpoint import make_hybrid_checkpoint
from tests.support.tiny_models import make_char_tokenizer, make_tiny_qwen2, write_jsonl


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model, a checkpoint and an adapter of it, and data."""
    from hybrid_lora_plugin.training.export import export_checkpoint

    root = tmp_path_factory.mktemp("source")
    actor = make_hybrid_checkpoint(make_tiny_qwen2(root / "model"), root)
    export_checkpoint(actor, root / "adapter", dtype="bfloat16", format="adapter")
    write_jsonl(root / "gsm8k.jsonl", [ROWS["gsm8k"]])
    return root


def arguments(place, **changes):
    options = {
        "model": place / "model", "output_dir": place / "out", "benchmarks": "gsm8k",
        "data.gsm8k": place / "gsm8k.jsonl", "max_prompt_length": 200, "max_response_length": 200,
    } | {name.replace("__", "."): value for name, value in changes.items()}  # fmt: skip
    return [f"{name}={value}" for name, value in options.items() if value is not None]


def spoil(place, name, change):
    file = place / name
    file.write_bytes(change(file.read_bytes()) if callable(change) else change)


OPTIONS = {
    "two modes": ({"rescore": "x"}, ("rescore: given together with model", "give one")),
    "no benchmark": ({"benchmarks": "[]"}, ("benchmarks: none", "give some of math500")),
    "an unknown benchmark": ({"benchmarks": "[gsm8k,math]"}, ("benchmarks: 'math' is none", "give some of")),
    "a benchmark twice": ({"benchmarks": "[gsm8k,gsm8k]"}, ("named twice", "once")),
    "data of nothing": ({"data__gpqa": "x"}, ("data.gpqa: has no effect", "leave it out")),
    "an unknown prompt": ({"prompt": "tot"}, ("prompt: 'tot'", "cot, io")),
    "a cold sampler": ({"sampling__temperature": -1}, ("sampling.temperature: -1", "0 or more")),
    "no nucleus": ({"sampling__top_p": 0}, ("sampling.top_p: 0", "above 0")),
    "top 0": ({"sampling__top_k": 0}, ("sampling.top_k: 0", "-1 or at least 1")),
    "no repeat": ({"repeats": 0}, ("repeats: 0", "at least 1")),
    "no problem": ({"limit": 0}, ("limit: 0", "at least 1")),
    "no time": ({"scoring__code_seconds": 0}, ("scoring.code_seconds: 0", "above 0")),
    "no workers": ({"scoring__workers": 0}, ("scoring.workers: 0", "at least 1")),
    "more than the model's positions": (
        {"max_response_length": 400}, ("max_response_length: 400", "the model has 512 positions", "give less"),
    ),
    "a model that is nowhere": ({"model": "/nowhere/model"}, ("model: there is no folder", "give a Hugging Face")),
    "a name that nobody has here": ({"model": "nobody/nothing"}, ("model: 'nobody/nothing' cannot be loaded", "give")),
    "data that are nowhere": ({"data__gsm8k": "/nowhere.jsonl"}, ("data.gsm8k: '/nowhere.jsonl'", "give a")),
    "a hub that is not there": ({"data__gsm8k": None}, ("data.gsm8k: openai/gsm8k cannot be read", "give a file")),
}  # fmt: skip
FILES = {
    "a row of another set": (
        "gsm8k.jsonl",
        b'{"text": "x"}\n',
        ("data.gsm8k: row 1 of", "wanted `question`", "as it is"),
    ),
    "no row": ("gsm8k.jsonl", b"", ("data.gsm8k", "; give")),
    "a row twice": ("gsm8k.jsonl", lambda rows: 2 * rows, ("data.gsm8k: row 2 of", "again", "give each problem once")),
    "half a row": ("gsm8k.jsonl", b'{"question": ', ("data.gsm8k", "line 1", ";")),
    "no configuration": ("model/config.json", b"{}", ("model: ", "cannot be loaded", "give")),
    "no tokenizer": ("model/tokenizer.json", b"{}", ("model: the tokenizer in", "put one there")),
    "an adapter of nothing": ("adapter/adapter_config.json", b"{}", ("is no adapter's configuration", "export it")),
    "a folder of something else": ("out/notes.txt", b"mine", ("output_dir: ", "not an empty folder", "give a new")),
}


@pytest.fixture
def place(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(source, tmp_path / "place")
    return tmp_path / "place"


def refused(argv, capsys):
    capsys.readouterr()
    status = main(argv)
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert status == 2 and "Traceback" not in err and "written to" not in out, err
    assert line.startswith("hybrid-lora-eval: ") and len(line) < 1000 and ("; " in line or " (--help" in line), line
    return line


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_work_are_one_line(name, place, capsys):
    changes, says = OPTIONS[name]
    before = contents(place)
    line = refused(arguments(place, **changes), capsys)
    assert all(words in line for words in says), line
    assert contents(place) == before


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_used_are_one_line(name, place, capsys):
    file, content, says = FILES[name]
    (place / file).parent.mkdir(exist_ok=True)
    (place / file).touch()
    spoil(place, file, content)
    before = contents(place)
    model = place / ("adapter" if file.startswith("adapter") else "model")
    line = refused(arguments(place, model=model), capsys)
    assert all(words in line for words in says), line
    assert contents(place) == before


def test_a_checkpoint_of_a_run_is_to_be_exported_first(place, capsys):
    for folder in (place, place / "actor"):
        assert "export it first with hybrid-lora-export" in refused(arguments(place, model=folder), capsys)


def test_a_tokenizer_without_a_chat_template_is_refused(place, capsys):
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = place / "model" / name
        if file.exists() and name.endswith(".json"):
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
        elif file.exists():
            file.unlink()
    assert "has no chat template" in refused(arguments(place), capsys)


def test_modes_without_a_model_take_their_own_options_only(place, capsys):
    assert "benchmarks: has no effect with rescore" in refused(["rescore=x", "benchmarks=gsm8k"], capsys)
    assert "label: has no effect with compare" in refused(["compare=[a,b]", "label=x"], capsys)
    assert "compare: 1 folders; give two" in refused(["compare=[a]"], capsys)
    assert "rescore: 'x' is no folder of an evaluation" in refused(["rescore=x"], capsys)
    assert "compare: 'a' is no folder of an evaluation" in refused(["compare=[a,b]"], capsys)


def test_options_registry_and_measures_name_the_same_benchmarks():
    assert {field.name for field in dataclasses.fields(EvaluationDataConfig)} == set(EVALUATIONS) == set(BENCHMARKS)
    assert tuple(MEASURES) == EVALUATIONS
    assert all(published_rows(name) > 0 for name in EVALUATIONS)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_set_becomes_problems_and_prompts(name, source, tmp_path):
    (problem,) = read_problems(name, [write_jsonl(tmp_path / "rows.jsonl", [ROWS[name]])])
    tokenizer = load_tokenizer(source / "model")
    tokens = {style: PromptTokens(tokenizer, style)(problem) for style in ("cot", "io")}
    # The character tokenizer has no text for white space.
    texts = {style: "".join(tokenizer.convert_ids_to_tokens(ids)) for style, ids in tokens.items()}
    assert all(
        text.startswith("<|im_start|>user") and text.endswith("<|im_start|>assistant") for text in texts.values()
    )
    assert "stepbystep" in texts["cot"] and "stepbystep" not in texts["io"]
    assert all("".join(problem.question.split())[:40] in text for text in texts.values())


# -- what is served ---------------------------------------------------------------------------------------------------


def test_a_model_is_known_again_by_its_weights(source, tmp_path):
    plain, adapted = served_model(str(source / "model")), served_model(str(source / "adapter"))
    assert plain.adapter is None and plain.path == str(source / "model") and plain.identity
    assert adapted.adapter == source / "adapter" and adapted.rank == 4 and adapted.path == str(source / "model")
    assert plain.identity in adapted.identity and adapted.identity != plain.identity
    assert "full_weights.safetensors put into a copy" in adapted.notes[0]
    shutil.copytree(source / "adapter", tmp_path / "alone")
    (tmp_path / "alone" / "full_weights.safetensors").unlink()
    alone = served_model(str(tmp_path / "alone"))
    assert "with the adapter alone" in alone.notes[0] and alone.identity not in (plain.identity, adapted.identity)
    alone.assemble(tmp_path / "model")
    assert not (tmp_path / "model").exists() and alone.path == str(source / "model")


def test_the_copy_has_the_full_weights_bit_for_bit_and_the_rest_of_the_base(source, tmp_path):
    import torch
    from safetensors.torch import load_file

    model = served_model(str(source / "adapter"))
    model.assemble(tmp_path / "model")
    full = load_file(source / "adapter" / "full_weights.safetensors")
    base, made = load_file(source / "model" / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert made.keys() == base.keys() and set(full) < set(made)
    for name, weight in made.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, full[name] if name in full else base[name].bfloat16()), name
    assert load_tokenizer(tmp_path / "model").chat_template == make_char_tokenizer().chat_template


def test_full_weights_of_another_model_are_refused(source, tmp_path):
    other = make_tiny_qwen2(tmp_path / "other", hidden=64)
    (tmp_path / "out").mkdir()
    full = source / "adapter" / "full_weights.safetensors"
    with pytest.raises(ValueError, match="is no weight of .* in that shape; export the adapter again"):
        write_with_full_weights(str(other), full, tmp_path / "out")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(full.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        write_with_full_weights(str(source / "model"), broken, tmp_path / "out")


def test_progress_leaves_the_start_of_the_engine_and_an_earlier_run_out_of_its_speed(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("hybrid_lora_plugin.cli.eval_progress.time.monotonic", lambda: now[0])
    progress = LineProgress("responses", interval=10.0)
    for second, done in ((0, 40), (500, 41), (505, 46), (511, 52)):
        now[0] = float(second)
        progress(done, 100)
    assert capsys.readouterr().err == "responses 52 of 100, 48 s left\n"
