"""The gold of a code problem: one JSON object with what its tests need.

    {"prompt": "...", "test": "...", "entry_point": "..."}

prompt       Python source in front of the program, e.g. imports and ``class TreeNode``; may be empty
test         Python source that defines ``check(candidate)``, which raises unless ``candidate`` is right
entry_point  Python expression that gives ``candidate`` once prompt and program have run, e.g. ``Solution().twoSum``

As LeetCodeDataset has them (https://github.com/newfacade/LeetCodeDataset).
"""

from __future__ import annotations

import ast
import json
from dataclasses import asdict, dataclass

from hybrid_lora_plugin.errors import ConfigurationError


@dataclass(frozen=True)
class CodeGold:
    """What the tests of a code problem need; the fields are those of the JSON object.

    Raises:
        ConfigurationError: source that Python does not read, or a test that defines no ``check``.
    """

    prompt: str
    test: str
    entry_point: str

    def __post_init__(self) -> None:
        for name, mode in (("prompt", "exec"), ("test", "exec"), ("entry_point", "eval")):
            try:
                tree = ast.parse(getattr(self, name).strip() if mode == "eval" else getattr(self, name), mode=mode)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise ConfigurationError(f"gold.{name}: Python does not read it: {error}") from error
            if name == "test" and not any(
                isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body
            ):
                raise ConfigurationError("gold.test: no check(candidate) in it; wanted a function of that name")

    def text(self) -> str:
        """The JSON object, as a row's gold."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> CodeGold:
        """The object of a row's gold.

        Raises:
            ConfigurationError: no JSON object, or not these three texts.
        """
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigurationError(f"gold: no JSON object: {error}") from error
        names = set(cls.__dataclass_fields__)
        if not isinstance(fields, dict) or set(fields) != names or not all(isinstance(v, str) for v in fields.values()):
            raise ConfigurationError(f"gold: not an object with the texts {', '.join(sorted(names))}")
        return cls(**fields)
