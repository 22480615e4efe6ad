"""Looks symbols of the table up in the text of libraries, importing and running nothing of them.

In seconds, for libraries that are not installed or cannot be imported on this machine, and before anything of a run is
started. Symbols that a library makes in C are not in its Python files: ``COMPILED``.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hybrid_lora_plugin.verl_backend.contracts.record import READ_IN, Contract
from hybrid_lora_plugin.verl_backend.contracts.versions import distribution, is_relied_on

#: symbols that are made in C
COMPILED = ("torch._foreach_norm", "torch.Tensor._version", "ray.ObjectRef.future")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Found:
    """A definition: the module that has it, and its node; None for a module itself."""

    module: str
    node: ast.AST | None


class Sources:
    """Python files of libraries below some folders, as on ``sys.path``; of two with one library the first counts."""

    def __init__(self, *folders: Path | str):
        self.folders = [Path(folder) for folder in folders]
        self._installed: list[Path] = []

    @classmethod
    def installed(cls, *before: Path | str) -> Sources:
        """Where the libraries of the table are installed; what is in the folders ``before`` counts first."""
        # Of a top module this finds the file without running it.
        specs = map(importlib.util.find_spec, READ_IN)
        folders = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin]
        sources = cls(*before, *dict.fromkeys(folders))
        sources._installed = sources.folders[len(before) :]
        return sources

    @functools.cache  # noqa: B019  lives as long as the command
    def distribution(self, library: str) -> importlib.metadata.Distribution | None:
        """The distribution that brings a library, where the folder that has the library has it."""
        folder = self._folder(library)
        if folder is None:
            return None
        # Of an editable install it lies elsewhere.
        return distribution(library, [str(folder)]) or (distribution(library) if folder in self._installed else None)

    @functools.cache  # noqa: B019  lives as long as the command
    def version(self, library: str) -> str | None:
        """Version of a library; None where it is not known."""
        found = self.distribution(library)
        return found.version if found is not None else None

    @functools.cache  # noqa: B019  lives as long as the command
    def file(self, module: str) -> Path | None:
        """Where ``module`` is written; None where it is not."""
        folder = self._folder(module.partition(".")[0])
        if folder is None:
            return None
        path = folder.joinpath(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    def has(self, library: str) -> bool:
        """Whether a library is in any of the folders."""
        return self._folder(library) is not None

    def _folder(self, library: str) -> Path | None:
        return next((folder for folder in self.folders if (folder / library).exists()), None)

    def tree(self, module: str) -> ast.Module:
        """Syntax tree of a module that ``file`` has."""
        file = self.file(module).resolve()
        state = file.stat()
        return _parsed(file, state.st_mtime_ns, state.st_size)

    @functools.cache  # noqa: B019  lives as long as the command
    def _names(self, module: str) -> tuple[dict[str, ast.AST], tuple[str, ...]]:
        """What a module binds at its top level, and the modules whose names it takes over."""
        names: dict[str, ast.AST] = {}
        stars: list[str] = []
        for node in _statements(self.tree(module).body):
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

    @functools.cache  # noqa: B019  lives as long as the command
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
            if (node := _members(kind.node).get(name)) is not None:
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


def check_source(contract: Contract, sources: Sources) -> str | None:
    """As ``by_import.check``, from the text alone.

    Returns:
        None if the symbol is written there with its arguments, or if nothing relies on it in the version that is there,
        else one line that names the first thing missing.
    """
    if not sources.has(contract.library):
        return f"{contract.symbol}: {contract.library} is not there"
    if not is_relied_on(contract, sources.version(contract.library)):
        return None
    try:
        said = [_check(contract, name, sources) for name in (contract.name, *contract.also)]
    except (SyntaxError, UnicodeDecodeError) as error:
        # Of a newer Python, or no text at all.
        return f"{contract.symbol}: a file on the way to it cannot be read ({type(error).__name__}: {error})"
    if None in said:
        return None
    return said[0] + "".join(f", nor {name}" for name in contract.also)


def check_sources(contracts: Iterable[Contract], sources: Sources) -> list[tuple[Contract, str]]:
    """Every contract that does not hold, with what is missing; those made in C are left out."""
    read = (contract for contract in contracts if contract.symbol not in COMPILED)
    return [(contract, said) for contract in read if (said := check_source(contract, sources)) is not None]


def _check(contract: Contract, name: str, sources: Sources) -> str | None:
    if sources.file(contract.module) is None:
        return f"{contract.symbol}: there is no module {contract.module}"
    if contract.constant:
        literals = (node.value for node in ast.walk(sources.tree(contract.module)) if isinstance(node, ast.Constant))
        return (
            None
            if contract.constant in literals
            else (f"{contract.symbol}: {contract.module} says {contract.constant!r} nowhere")
        )
    found = sources.follow(contract.module, name.split(".") if name else [])
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


@functools.cache
def _parsed(file: Path, changed: int, size: int) -> ast.Module:
    """Syntax tree of a file in that state; once in a process, which is most of what a look takes."""
    return ast.parse(file.read_text("utf-8"))


@functools.cache
def _members(kind: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class defines by itself, and what its methods assign to ``self``, by name."""
    found: dict[str, ast.AST] = {}
    for node in _statements(kind.body):
        for name in _bound(node):
            found.setdefault(name, node)
    for node in ast.walk(kind):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                found.setdefault(node.attr, node)
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
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
