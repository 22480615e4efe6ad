"""The versions that a file in ``requirements`` pins."""

from __future__ import annotations

import re

from tests.support.verl_processes import ROOT


def locked(file: str) -> dict[str, str]:
    """Version by package of ``requirements/FILE``."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / file).read_text(), re.M))
