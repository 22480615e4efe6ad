"""The table of contracts against the sources of a library that cannot be imported here.

    python -m tests.support.source_contracts [vllm==0.24.0 ...] [--wheels FOLDER]

What users run on a GPU, vLLM 0.24 among it, does not import on a machine without one. Its wheel can still be read: the
command has pip fetch each one (by default what the extra ``gpu`` of ``pyproject.toml`` pins, as far as the table names
it), unpacks its Python files, and looks every symbol of the table up in their syntax trees, with its arguments.
Nothing of a wheel is imported or run. Exit status 1 if a symbol is missing.

Symbols that a library makes in C are not in its Python files; those are listed apart, and fail nothing.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tomllib

from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS, Contract

ROOT = Path(__file__).parents[2]
#: libraries whose symbols are made in C in part
COMPILED = ("torch._foreach_norm", "torch.Tensor._version")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Found:
    """A definition: the module that has it, and its node; None for a module itself."""

    module: str
    node: ast.AST | None


class Sources:
    """Python files of libraries below one folder, as on ``sys.path``."""

    def __init__(self, folder: Path):
        self._folder = folder

    def file(self, module: str) -> Path | None:
        """Where ``module`` is written; None where it is not."""
        path = self._folder.joinpath(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    @functools.cache  # noqa: B019  lives as long as the command
    def _names(self, module: str) -> tuple[dict[str, ast.AST], tuple[str, ...]]:
        """What a module binds at its top level, and the modules whose names it takes over."""
        names: dict[str, ast.AST] = {}
        stars: list[str] = []
        for node in _statements(ast.parse(self.file(module).read_text("utf-8")).body):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(self._absolute(module, node))
                    else:
                        names[alias.asname or alias.name] = node
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    names[alias.asname or alias.name.partition(".")[0]] = node
            else:
                for name in _bound(node):
                    # ``Name = made_from(Name)`` is still the class that the lines before define.
                    if not (isinstance(node, ast.Assign) and name in names and _reads(node.value, name)):
                        names[name] = node
        return names, tuple(stars)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module
        package = module.split(".")
        if self.file(module).name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *filter(None, [node.module])])

    def look_up(self, module: str, name: str, seen: frozenset = frozenset()) -> Found | None:
        """The definition of ``name`` in ``module``, followed through imports."""
        if (module, name) in seen or self.file(module) is None:
            return None
        seen |= {(module, name)}
        names, stars = self._names(module)
        node = names.get(name)
        if isinstance(node, ast.ImportFrom):
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            source = self._absolute(module, node)
            found = self.look_up(source, alias.name, seen)
            if found is None and self.file(f"{source}.{alias.name}"):
                return Found(f"{source}.{alias.name}", None)
            return found
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == name)
            return Found(alias.name if alias.asname else name, None)
        if node is not None:
            return Found(module, node)
        for star in stars:
            if (found := self.look_up(star, name, seen)) is not None:
                return found
        return Found(f"{module}.{name}", None) if self.file(f"{module}.{name}") else None

    def classes(self, found: Found) -> list[Found]:
        """A class and its bases as far as these sources have them, nearest first."""
        line = [found]
        for base in found.node.bases:
            # Of a generic base, Base[X].
            text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            known = self.follow(found.module, text.split("."))
            if isinstance(known, Found) and isinstance(known.node, ast.ClassDef):
                line += self.classes(known)
        return line

    def attribute(self, owner: Found, name: str) -> Found | None:
        """What a class, or an instance of it, has under ``name``."""
        for kind in self.classes(owner):
            for node in _statements(kind.node.body):
                if name in _bound(node):
                    return Found(kind.module, node)
            for node in ast.walk(kind.node):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
                    if isinstance(node.value, ast.Name) and node.value.id == "self":
                        return Found(kind.module, node)
        return None

    def follow(self, module: str, parts: list[str]) -> Found | str:
        """The definition of a dotted name, or what is missing of it."""
        found = Found(module, None)
        where = module
        for part in parts:
            if found.node is None:
                inner = self.look_up(found.module, part)
            elif isinstance(found.node, ast.ClassDef):
                inner = self.attribute(found, part)
            else:
                inner = None
            if inner is None:
                return f"{where} has no {part!r}"
            found, where = inner, f"{where}.{part}"
        return found

    def arguments(self, found: Found) -> list[str] | None:
        """Names of the parameters of a function, or of the ``__init__`` of a class; None where neither is written."""
        if isinstance(found.node, Function):
            every = found.node.args
            return [a.arg for a in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
        if not isinstance(found.node, ast.ClassDef):
            return None
        line = self.classes(found)
        for kind in line:
            for node in kind.node.body:
                if isinstance(node, Function) and node.name == "__init__":
                    return self.arguments(Found(kind.module, node))
        # A dataclass, a named tuple or a struct.
        fields = [n.target.id for kind in reversed(line) for n in kind.node.body if isinstance(n, ast.AnnAssign)]
        return list(dict.fromkeys(fields)) or None


def _statements(body: list[ast.stmt]):
    """Statements of a body, and of every branch in it."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                for inner in getattr(node, part, []):
                    yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _bound(node: ast.AST) -> set[str]:
    """Names that a statement defines or assigns."""
    if isinstance(node, (*Function, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {part.id for target in targets if target is not None for part in ast.walk(target) if _is_name(part)}


def _reads(value: ast.expr, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(value))


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def check_source(contract: Contract, sources: Sources) -> str | None:
    """As ``contracts.check``, from the text alone.

    Returns:
        None if the symbol is written there with its arguments, else one line that names the first thing missing.
    """
    if sources.file(contract.module) is None:
        return f"{contract.symbol}: there is no module {contract.module}"
    found = sources.follow(contract.module, contract.name.split(".") if contract.name else [])
    if isinstance(found, str):
        return f"{contract.symbol}: {found}"
    if not contract.arguments:
        return None
    names = sources.arguments(found)
    if names is None:
        return f"{contract.symbol}: its signature cannot be read"
    places = [names.index(argument) if argument in names else -1 for argument in contract.arguments]
    if -1 in places:
        return f"{contract.symbol}: no argument {contract.arguments[places.index(-1)]!r} among ({', '.join(names)})"
    if places != sorted(places):
        return f"{contract.symbol}: arguments {', '.join(contract.arguments)} have other places in ({', '.join(names)})"
    return None


# -- the command ---------------------------------------------------------------------------------------------------


def pinned() -> list[str]:
    """What the extra ``gpu`` pins of the libraries that the table names."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    named = {contract.module.partition(".")[0] for contract in CONTRACTS}
    return [entry for entry in extra if re.fullmatch(r"[\w-]+==[\w.]+", entry) and entry.partition("==")[0] in named]


def unpack(requirement: str, wheels: Path, into: Path) -> int:
    """Have pip fetch a wheel and unpack its Python files; returns how many there are."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(wheels.glob(pattern)):
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement],
            check=True,
        )
    with zipfile.ZipFile(next(wheels.glob(pattern))) as wheel:
        members = [member for member in wheel.namelist() if member.endswith(".py")]
        wheel.extractall(into, members)
    return len(members)


def main(arguments: list[str] | None = None) -> int:
    """Print what the sources lack; returns 1 if it is anything."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.source_contracts", description=__doc__.split("\n")[0]
    )
    parser.add_argument("requirements", nargs="*", help="NAME==VERSION, by default what the extra gpu pins")
    parser.add_argument("--wheels", type=Path, help="folder to keep wheels in (vLLM's has 280 MB), and to take from")
    options = parser.parse_args(arguments)
    requirements = options.requirements or pinned()
    if wrong := [text for text in requirements if not re.fullmatch(r"[\w-]+==[\w.]+", text)]:
        parser.error(f"{wrong[0]}: wanted NAME==VERSION")
    missing = 0
    with tempfile.TemporaryDirectory() as folder:
        wheels = options.wheels or Path(folder) / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        for requirement in requirements:
            into = Path(folder) / requirement
            files = unpack(requirement, wheels, into)
            library = requirement.partition("==")[0]
            contracts = [c for c in CONTRACTS if c.module.partition(".")[0] == library]
            compiled = [c.symbol for c in contracts if c.symbol in COMPILED]
            read = [c for c in contracts if c.symbol not in COMPILED]
            lacking = [text for c in read if (text := check_source(c, Sources(into))) is not None]
            missing += len(lacking)
            print(f"{requirement}: {len(read) - len(lacking)} of {len(read)} symbols are in its {files} Python files")
            print("".join(f"  {text}\n" for text in lacking), end="")
            print("".join(f"  made in C, not looked for: {symbol}\n" for symbol in compiled), end="")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
