"""The names of torchvision where it is not installed: vLLM's file of Qwen3.5 imports them, its text model calls none.

torchvision's wheel is for CUDA and does not load beside torch's CPU build, so the locked environment leaves it out.
``provide()`` before vLLM looks for the model; with a torchvision that is installed it does nothing. Whatever is called
of it raises. ``everywhere()`` does so in every process of a run, as vLLM looks at a model in one of its own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
_NAME = "torchvision"


class _Name(type):
    """A class of which every attribute is another such class."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *_, **__):
        raise RuntimeError(f"{cls.__name__} was called, and torchvision is not installed")


class _Module(ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(f"{self.__name__}.{name}", (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == _NAME:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def provide() -> None:
    """Let ``import torchvision`` and what is below it succeed, unless the real one is there."""
    if importlib.util.find_spec(_NAME) is None:
        sys.meta_path.append(_Finder())


def everywhere(folder: Path) -> dict[str, str]:
    """Environment in which every Python provides them when it starts, by a file in ``folder``, which must be there."""
    (folder / "sitecustomize.py").write_text(f"from {__name__} import provide\n\nprovide()\n")
    return {"PYTHONPATH": f"{ROOT}:{folder}"}
