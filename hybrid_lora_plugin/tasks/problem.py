"""One problem with its gold answer, whatever data set it is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid_lora_plugin.errors import ConfigurationError

#: How an answer is judged: an expression, a whole number, the letter of an option, or a program that is run.
KINDS = ("math", "integer", "letter", "code")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Problem:
    """A question that can be asked and an answer that can be checked.

    Attributes:
        source: the data set, as verl's column ``data_source``, e.g. ``HuggingFaceH4/MATH-500``.
        identity: unique within the source; stays with the problem through every file.
        kind: one of ``KINDS``.
        question: the bare question, with neither options nor instructions.
        gold: what an answer is compared with: an expression for ``math``, decimal digits for ``integer``, a letter for
            ``letter``, and for ``code`` a JSON object as ``rewards`` defines it.
        options: of ``letter``, in order: the first is A.
        starter: of ``code``, the lines that the program must go on from.
        metadata: what a report groups by, e.g. subject and level.

    Raises:
        ConfigurationError: a kind that does not exist, no gold answer, or a letter outside the options.
    """

    source: str
    identity: str
    kind: str
    question: str
    gold: str
    options: tuple[str, ...] = ()
    starter: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(f"kind: {self.kind!r} of {self.source}; wanted one of {', '.join(KINDS)}")
        if not self.gold.strip():
            raise ConfigurationError(f"gold: problem {self.identity} of {self.source} has no answer; leave it out")
        letters = LETTERS[: len(self.options)]
        if self.kind == "letter" and (len(self.gold) != 1 or self.gold not in letters):
            raise ConfigurationError(
                f"gold: {self.gold!r} in problem {self.identity} of {self.source}; wanted one of {', '.join(letters)}"
            )
