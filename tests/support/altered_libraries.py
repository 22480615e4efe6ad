"""An installed library with one file changed, for what reads libraries without importing them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path


def altered(folder: Path, module: str, pattern: str | None = None, other: str = "") -> Path:
    """A folder with the installed library of ``module``, all links but that one file.

    Args:
        folder: where to; more than one file may be altered there.
        module: whose text is changed, or which is not there at all without a pattern.
        pattern, other: what is replaced by what.
    """
    library, *parts = module.split(".")
    theirs, ours = Path(importlib.util.find_spec(library).origin).parent, folder / library
    for part in [*parts, ""]:
        if ours.is_symlink():
            ours.unlink()
        if not ours.exists():
            ours.mkdir(parents=True)
            for entry in theirs.iterdir():
                (ours / entry.name).symlink_to(entry)
        file = f"{part}.py" if (theirs / f"{part}.py").exists() else "__init__.py"
        if file != "__init__.py" or not part:
            break
        theirs, ours = theirs / part, ours / part
    text = (theirs / file).read_text()
    (ours / file).unlink()
    if pattern is not None:
        assert re.search(pattern, text), f"{module} has no {pattern}"
        (ours / file).write_text(re.sub(pattern, other, text))
    return folder
