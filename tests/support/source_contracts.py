"""The table of contracts against the wheels of libraries that cannot be imported here.

    python -m tests.support.source_contracts [vllm==0.24.0 ...] [--wheels FOLDER]

What users run on a GPU, vLLM 0.24 among it, does not import on a machine without one. Its wheel can still be read: the
command has pip fetch each one (by default what the extra ``gpu`` of ``pyproject.toml`` pins, as far as the table names
it), unpacks its Python files, and has ``contracts.by_source`` look the table up in them. Nothing of a wheel is imported
or run. Exit status 1 if a symbol is missing.

``hybrid-lora-doctor sources=FOLDER`` says of folders that are unpacked already which features they break.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import tomllib

from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS
from hybrid_lora_plugin.verl_backend.contracts.by_source import COMPILED, Sources, check_sources
from hybrid_lora_plugin.verl_backend.contracts.versions import DISTRIBUTIONS, is_relied_on

ROOT = Path(__file__).parents[2]
#: library by the name of its distribution, where the two differ
LIBRARIES = {name: library for library, names in DISTRIBUTIONS.items() for name in names}


def library_of(requirement: str) -> str:
    """Top module of the library that ``NAME==VERSION`` brings."""
    name = requirement.partition("==")[0]
    return LIBRARIES.get(name, name)


def pinned() -> list[str]:
    """What the extra ``gpu`` pins of the libraries that the table names."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    named = {contract.library for contract in CONTRACTS}
    return [entry for entry in extra if re.fullmatch(r"[\w-]+==[\w.]+", entry) and library_of(entry) in named]


def unpack(requirement: str, wheels: Path, into: Path) -> int:
    """Have pip fetch a wheel and unpack its Python files and its version; returns how many files there are."""
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
        wheel.extractall(into, [m for m in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", m)])
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
            files, sources = unpack(requirement, wheels, into), Sources(into)
            version = requirement.partition("==")[2]
            contracts = [c for c in CONTRACTS if c.library == library_of(requirement) and is_relied_on(c, version)]
            lacking = [text for _, text in check_sources(contracts, sources)]
            missing += len(lacking)
            compiled = [contract.symbol for contract in contracts if contract.symbol in COMPILED]
            read = len(contracts) - len(compiled)
            print(f"{requirement}: {read - len(lacking)} of {read} symbols are in its {files} Python files")
            print("".join(f"  {text}\n" for text in lacking), end="")
            print("".join(f"  made in C, not looked for: {symbol}\n" for symbol in compiled), end="")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
