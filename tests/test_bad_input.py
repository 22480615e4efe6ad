"""What people bring and nobody can use: one line with field, value and way out, exit status 2, nothing written.

The cases are in ``tests/support/bad_input.py``, one table for all commands; those of a verl run are below.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from hybrid_lora_plugin.base_identity import weight_digests, weights_identity
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import TROUBLESHOOTING, ConfigurationError
from tests.support.bad_input import CASES, RUNS, Place, RunCase
from tests.support.hybrid_checkpoint import make_hybrid_checkpoint
from tests.support.tiny_models import make_tiny_qwen2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Good input of every kind."""
    folder = tmp_path_factory.mktemp("good")
    make_hybrid_checkpoint(make_tiny_qwen2(folder / "model"), folder)
    return folder


def content_of(folder):
    """Everything below a folder: names, and what is in files and links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@contextmanager
def files_end_at(limit):
    """Files cannot grow beyond that many bytes; the error is the one of a full disk under another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_table_is_long_enough():
    assert len(CASES) >= 120


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_changes_nothing(name, source, tmp_path, capsys, monkeypatch):
    case, place = CASES[name], Place(tmp_path, source)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = case.arguments(place)
    before = content_of(tmp_path)
    main = importlib.import_module(f"hybrid_lora_plugin.cli.{case.command}").main
    capsys.readouterr()
    with files_end_at(case.limit):
        status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 2, err
    line = err.splitlines()[-1]
    assert line.startswith(f"hybrid-lora-{case.command}: ") and "Traceback" not in err, err
    assert all(words in line for words in case.says), line
    assert "; " in line or " (--help" in line, f"no way out: {line}"
    assert line.count(TROUBLESHOOTING) <= 1 and len(line) < 1000
    after = content_of(tmp_path)
    if case.begun:
        after = {name: content for name, content in after.items() if not name.startswith("out.partial")}
    assert after == before
    assert "written to" not in out


@pytest.fixture(scope="module")
def preflight():
    """What Hydra calls before a run begins, on arguments as they are typed."""
    pytest.importorskip("verl", reason="verl is not installed")
    from hybrid_lora_plugin.verl_backend.preflight import Preflight
    from tests.support.hydra_bases import HydraBases

    bases = HydraBases()

    def start(arguments):
        config = bases.compose("verl.trainer.config", "ppo_trainer", arguments)
        with bases.files_looked_up_once():
            Preflight().on_run_start(config)
        return config

    return start


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_cannot_work_ends_before_it_begins(name, preflight, source, tmp_path, capsys):
    from hybrid_lora_plugin.verl_backend.preflight import RunRefused

    case, place = RUNS[name], Place(tmp_path, source)
    arguments = case.arguments(place)
    before = content_of(tmp_path)
    capsys.readouterr()
    with pytest.raises(RunRefused) as ended:
        preflight(arguments)
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and line == ended.value.line
    assert line.startswith("hybrid_lora: ") and all(words in line for words in case.says), line
    assert line.count(TROUBLESHOOTING) == 1 and "configuration-not-checked" not in line
    assert content_of(tmp_path) == before


def test_an_allocation_that_was_probed_on_other_weights_is_said(preflight, source, tmp_path, capsys):
    """And one of the same weights, elsewhere and in other shards, is not."""
    from tests.support.bad_input import inside, shards, weights_of

    place = Place(tmp_path, source)
    probed = weights_identity(place.model)
    inside(lambda content: content["probe"]["data"].update(weights=probed))(place)
    arguments = RunCase((), lambda place: [f"hybrid_lora.allocation={place.artifact}"]).arguments(place)
    for spoil, said in ((lambda place: None, False), (shards(), False), (None, True)):
        if spoil is None:
            shutil.rmtree(place.model)
            weights_of(lambda weights: {name: tensor * 1.01 for name, tensor in weights.items()})(place)
        else:
            spoil(place)
        preflight(arguments)
        assert ("probed on other weights than those of" in capsys.readouterr().out) is said


@pytest.mark.parametrize(
    "typed, wanted",
    [
        ("007", "007"),
        ("17", "17"),
        ("12:30", "12:30"),
        ('"true"', "true"),
        ('"a # b: c"', "a # b: c"),
        ('"~/x"', "~/x"),
    ],
)
def test_a_run_gets_texts_as_they_are_typed(preflight, source, tmp_path, monkeypatch, typed, wanted):
    """Unquoted as far as Hydra's own grammar takes them for texts, else quoted; what it has made into another value is
    refused (``RUNS``)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    arguments = RunCase((), lambda place: [f"hybrid_lora.output_dir={typed}"]).arguments(Place(tmp_path, source))
    folder = preflight(arguments).hybrid_lora.output_dir
    assert folder == str(tmp_path / wanted).replace("~", "home")


@pytest.mark.parametrize("spoil", ["a lost norm", "an adapter"])
def test_the_first_rank_looks_at_what_it_loads(source, tmp_path, spoil):
    """verl's engine loads it without looking at transformers' report."""
    pytest.importorskip("verl", reason="verl is not installed")
    from transformers import AutoConfig

    from hybrid_lora_plugin.verl_backend.engine import HybridLoraEngine
    from hybrid_lora_plugin.verl_backend.run_kinds import REINFORCEMENT_LEARNING

    place = Place(tmp_path, source)
    engine = HybridLoraEngine.__new__(HybridLoraEngine)
    engine.model_config = SimpleNamespace(
        local_path=str(place.model), hf_config=AutoConfig.from_pretrained(place.model), trust_remote_code=False
    )
    engine.engine_config, engine._kind = SimpleNamespace(ulysses_sequence_parallel_size=1), REINFORCEMENT_LEARNING
    engine.hybrid = HybridLoraConfig()
    engine._check_base()
    assert engine._base_weights == weight_digests(place.model)
    case = RUNS[{"a lost norm": "a run without a norm", "an adapter": "a run beside an adapter"}[spoil]]
    case.spoil(place)
    with pytest.raises(ConfigurationError) as refused:
        engine._check_base()
    assert all(words in str(refused.value) for words in case.says)
