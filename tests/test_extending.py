"""``docs/extending.md`` leads somewhere: files, tests and types it names exist, and its mistakes are caught."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re

import pytest

from hybrid_lora_plugin.allocation.budget import allocate
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import CRITERIA, SYNC_MODES, BudgetConfig
from hybrid_lora_plugin.sync.modes import sync_mode
from tests.support.verl_processes import ROOT

PACKAGE = ROOT / "hybrid_lora_plugin"
TEXT = (ROOT / "docs/extending.md").read_text()
#: written by a run, not part of the package
WRITTEN = {"allocation.json", "settings.json", "hybrid_lora/trainables.safetensors"}
CODE = sorted(set(re.findall(r"`([^`\n]+)`", TEXT)) - WRITTEN)
TESTS = [code for code in CODE if "::" in code]
FILES = [code for code in CODE if re.fullmatch(r"[\w./-]+(\.(py|md|yaml|json|safetensors)|/)", code)]
GLOSSARY = re.findall(r"^\| `(\w+)` \| .* \| `([\w/]+\.py)` \|$", TEXT, re.M)
FUNCTIONS = re.findall(r"\| `(\w+)\.(?!py`|json`)(\w+)` \|", TEXT)


@pytest.mark.parametrize("file", FILES)
def test_file_exists(file):
    # A folder ends with a slash and must be one.
    places = [place for place in (ROOT / file, PACKAGE / file) if place.exists()]
    assert places and all(place.is_dir() == file.endswith("/") for place in places)


@pytest.mark.parametrize("named", TESTS)
def test_test_exists(named):
    file, _, function = named.partition("::")
    assert re.search(rf"^(async )?def {function}\(", (ROOT / file).read_text(), re.M)


@pytest.mark.parametrize(("name", "file"), GLOSSARY)
def test_type_of_the_glossary_is_defined_there(name, file):
    assert re.search(rf"^class {name}\b", (PACKAGE / file).read_text(), re.M)


@pytest.mark.parametrize(("owner", "name"), FUNCTIONS)
def test_comparison_exists(owner, name):
    """``file.function``, or ``Class.method``."""
    defined = rf"^\s*(def|class) {name}\b"
    if owner[0].isupper():
        texts = [text for text in sources() if re.search(rf"^class {owner}\b", text, re.M)]
    else:
        texts = [file.read_text() for file in PACKAGE.rglob(f"{owner}.py")]
    assert texts and any(re.search(defined, text, re.M) for text in texts)


def sources() -> list[str]:
    return [file.read_text() for file in PACKAGE.rglob("*.py")]


def test_page_has_the_ten_tasks_each_with_a_test_that_fails_first():
    tasks = re.split(r"^### ", TEXT.partition("\n## Glossary")[0], flags=re.M)[1:]
    assert len(tasks) == 10
    for task in tasks:
        _, found, last = task.partition("\nFails first: ")
        assert found and "`tests/test_" in last, task[:40]
    assert len(FILES) > 30 and len(TESTS) > 10 and len(GLOSSARY) > 30 and len(FUNCTIONS) > 10


def test_registered_criteria_are_those_of_the_configuration():
    """A criterion without its name there could not be chosen, and nothing else would say so."""
    registered = [
        node.args[0].value
        for file in (PACKAGE / "scoring").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "register_criterion"
    ]
    assert sorted(registered) == sorted(CRITERIA)


BUDGET_MODES = next(field for field in dataclasses.fields(BudgetConfig) if field.name == "mode").metadata["choices"]


@pytest.mark.parametrize("mode", BUDGET_MODES)
def test_every_budget_mode_of_the_configuration_selects(mode):
    """Of four modules with 16 parameters each, 8 as an adapter of rank 1, half may be fully tuned."""
    name = "model.layers.{}.mlp.up_proj"
    candidates = [Candidate(name.format(layer), layer, "up_proj", "mlp", 16, 4, 4) for layer in range(4)]
    assignment = allocate(candidates, [1, 2, 3, 4], BudgetConfig(mode=mode, ratio=0.5, total=48), rank=1)
    assert assignment.budget.mode == mode and assignment.full_names == [name.format(0), name.format(1)]


@pytest.mark.parametrize("name", SYNC_MODES)
def test_every_sync_mode_of_the_configuration_is_there(name):
    assert sync_mode(name).name == name


def test_every_sync_mode_that_is_there_can_be_chosen():
    for file in (PACKAGE / "sync").glob("*.py"):
        importlib.import_module(f"hybrid_lora_plugin.sync.{file.stem}")
    (base,) = [kind for kind in type(sync_mode("merge")).__mro__ if kind.__name__ == "SyncMode"]
    there = [kind.name for kind in base.__subclasses__() if kind.__module__.startswith("hybrid_lora_plugin.")]
    assert sorted(there) == sorted(SYNC_MODES)
