"""Contracts looked up in sources that are not imported: the reader, and that it says what an import says."""

from __future__ import annotations

import dataclasses
import importlib.util
import zipfile
from pathlib import Path

import pytest

from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS, Contract
from hybrid_lora_plugin.verl_backend.contracts.by_source import Sources, check_source
from tests.support.source_contracts import main, pinned

LIBRARY = {
    "__init__.py": (
        "from .base import *\nfrom . import inner\nif TYPE_CHECKING:\n    from .inner.late import Late as Late\n"
    ),
    "base.py": (
        "import dataclasses\nclass Base(Generic[T]):\n    shared: int\n    def set(self, x):\n        self.made = x\n"
        "@dataclasses.dataclass\nclass Row:\n    first: int\n    second: int = 0\n"
        "try:\n    def either(a, *, b): ...\nexcept ImportError:\n    pass\n"
    ),
    "inner/__init__.py": "from pkg.base import Base as _Base\nclass Own(_Base):\n    def __init__(self, y, z=1): ...\n",
    "inner/late.py": "from ..base import Row\nfrom . import Own\nclass Late(Own, Row): ...\nLate = changed(Late)\n",
}


@pytest.fixture
def sources(tmp_path):
    for name, text in LIBRARY.items():
        file = tmp_path / "pkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Sources(tmp_path)


def contract(symbol: str, *arguments: str) -> Contract:
    module, _, name = symbol.partition(":")
    return Contract(("engine",), module, name, ("training/apply.py",), "a symbol", arguments)


@pytest.mark.parametrize(
    ("symbol", "arguments"),
    [
        ("pkg", ()),
        ("pkg.inner.late", ()),
        ("pkg:Base.set", ("x",)),
        ("pkg:Base.made", ()),
        ("pkg:Row", ("first", "second")),
        ("pkg:either", ("a", "b")),
        ("pkg:inner.Own", ("y", "z")),
        ("pkg:inner.Own.shared", ()),
        ("pkg:Late.made", ()),
        ("pkg.inner.late:Late", ("y",)),
    ],
)
def test_a_symbol_is_found_through_imports_branches_and_bases(sources, symbol, arguments):
    assert check_source(contract(symbol, *arguments), sources) is None


@pytest.mark.parametrize(
    ("symbol", "arguments", "said"),
    [
        ("pkg.outer", (), "pkg.outer: there is no module pkg.outer"),
        ("pkg:Nothing", (), "pkg.Nothing: pkg has no 'Nothing'"),
        ("pkg:Base.lost", (), "pkg.Base.lost: pkg.Base has no 'lost'"),
        ("pkg:Base.set.inside", (), "pkg.Base.set.inside: pkg.Base.set has no 'inside'"),
        ("pkg:Base.set", ("y",), "pkg.Base.set: no argument 'y' among (self, x)"),
        ("pkg:Row", ("second", "first"), "pkg.Row: arguments second, first have other places in (first, second)"),
        ("pkg:Base.made", ("x",), "pkg.Base.made: its signature cannot be read"),
    ],
)
def test_what_is_missing_is_said_in_one_line(sources, symbol, arguments, said):
    assert check_source(contract(symbol, *arguments), sources) == said


def test_the_command_reads_a_wheel_and_fails_where_a_symbol_is_gone(tmp_path, capsys):
    """A wheel of a vLLM that has one module of those in the table, whose class lacks one attribute."""
    module = "vllm.lora.model_manager"
    with zipfile.ZipFile(tmp_path / "vllm-0.0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm/lora/model_manager.py", "class LoRAModelManager:\n    modules: dict\n")
        wheel.writestr("vllm/_C.so", b"")
    assert main(["vllm==0.0.1", "--wheels", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    # Without those that an old version is not asked for.
    total = sum(contract.library == "vllm" and not contract.since for contract in CONTRACTS)
    assert f"vllm==0.0.1: 1 of {total} symbols are in its 1 Python files" in said
    assert f"{module}.LoRAModelManager has no 'lora_index_to_id'" in said and f"{module}.modules" not in said


def test_what_users_run_on_a_gpu_is_read_by_default():
    assert {"vllm==0.24.0", "transformers==5.9.0"} <= set(pinned())


@pytest.mark.parametrize("library", ["vllm", "peft"])
def test_the_reader_says_of_the_installed_library_what_an_import_says(library):
    """``tests/test_contracts.py`` imports it and finds every symbol; a name that is not there neither of them finds."""
    found = importlib.util.find_spec(library)
    if found is None:
        pytest.skip(f"{library} is not installed")
    sources = Sources(Path(found.origin).parents[1])
    contracts = [c for c in CONTRACTS if c.module.partition(".")[0] == library]
    assert contracts and [text for c in contracts if (text := check_source(c, sources)) is not None] == []
    for known in contracts:
        changed = dataclasses.replace(known, name=f"{known.name}_gone", also=(), constant=known.constant and "gone")
        assert check_source(changed, sources) is not None
