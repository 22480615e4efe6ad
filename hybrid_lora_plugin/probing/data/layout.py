"""Which columns of a file make a row, and what other layouts are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrid_lora_plugin.errors import ProbeError

if TYPE_CHECKING:
    from hybrid_lora_plugin.config import ProbeConfig

#: Columns that go to the chat template beside the turns: verl's and TRL's names.
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs", "enable_thinking")


@dataclass(frozen=True)
class Layout:
    """The columns that make a row.

    A name may lead into a column (``extra_info.answer``). The prompt's may be several joined by ``+``.

    Attributes:
        messages: column of whole chats.
        prompt: column of prompts, texts or chats.
        response: column of responses.
    """

    messages: str = "messages"
    prompt: str = "prompt"
    response: str = "response"

    @classmethod
    def of(cls, config: ProbeConfig) -> Layout:
        """The columns that a configuration names.

        Raises:
            ProbeError: an empty name.
        """
        for name in ("messages_key", "prompt_key", "response_key"):
            if not all(getattr(config, name).split("+")):
                raise ProbeError(f"probe.{name}: {getattr(config, name)!r} is no column; give its name")
        return cls(config.messages_key, config.prompt_key, config.response_key)

    @property
    def prompts(self) -> list[str]:
        """The columns of the prompt; several are texts to be joined."""
        return self.prompt.split("+")

    @property
    def plain(self) -> bool:
        """Whether each name is that of one column."""
        return not any(sign in name for name in (self.messages, self.prompt, self.response) for sign in ".+")

    def columns(self, present: Iterable[str]) -> list[str]:
        """Of the columns of a file, those that are read."""
        wanted = [self.messages, *self.prompts, self.response, *TEMPLATE_COLUMNS]
        present = list(present)
        heads = [name if name in present else name.partition(".")[0] for name in wanted]
        return [name for name in present if name in heads]

    def messages_of(self, row: dict) -> Any:
        """The chat of a row; None if it has none."""
        return value_at(row, self.messages)

    def prompt_of(self, row: dict) -> Any:
        """The prompt of a row: several texts joined by a newline, without empty ones; None if there is none."""
        values = [value_at(row, name) for name in self.prompts]
        if len(values) == 1 or not all(value is None or isinstance(value, str) for value in values):
            return next((value for value in values if value is not None), None)
        return "\n".join(value for value in values if value) or None

    def response_of(self, row: dict) -> Any:
        """The response of a row; None if there is none."""
        return value_at(row, self.response)

    def wanted(self) -> str:
        """The ways a row can be, for an error."""
        return f"give `{self.messages}` that end with an assistant turn, or `{self.prompt}` and `{self.response}`"


def value_at(row: Any, path: str) -> Any:
    """The value of a column, or inside one by a dotted path; None if it is not there."""
    if not isinstance(row, dict) or path in row:
        return row.get(path) if isinstance(row, dict) else None
    head, dot, rest = path.partition(".")
    return value_at(row.get(head), rest) if dot else None


_CHATS = ("conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("question", "solution"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("input", "target"),
    ("inputs", "targets"),
)


def hint(row: dict) -> str:
    """What layout a row seems to have and which option reads it, or a question for the names of its columns."""
    names = [str(name) for name in row]
    chat = next((name for name in _CHATS if name in names), None)
    if chat is not None:
        first = row[chat][0] if isinstance(row[chat], list) and row[chat] else None
        layout = "ShareGPT's layout" if isinstance(first, dict) and "from" in first else "chats in another column"
        return f"this is {layout}: give probe.messages_key={chat}"
    if "prompt" in names and ("reward_model" in names or "data_source" in names):
        inner = _answer_inside(row)
        return (
            f"these are verl's prompts for reinforcement learning, without responses: give "
            f"{f'probe.response_key={inner}' if inner else 'probe.response_key=COLUMN of a response'} to train on it, "
            f"or hybrid_lora.probe.objective=policy in the verl run, which makes its own"
        )
    if {"instruction", "input", "output"} <= set(names):
        return "this is Alpaca's layout: give probe.prompt_key=instruction+input probe.response_key=output"
    for prompt, response in _PAIRS:
        if prompt in names and response in names:
            given = [] if prompt == "prompt" else [f"probe.prompt_key={prompt}"]
            return f"this looks like prompts and responses: give {' '.join([*given, f'probe.response_key={response}'])}"
    if "text" in names:
        return "a plain `text` has no prompt and no response; split it into `prompt` and `response`"
    return "name its columns by probe.messages_key, or by probe.prompt_key and probe.response_key"


def _answer_inside(row: dict) -> str | None:
    for path in ("extra_info.answer", "extra_info.solution", "reward_model.ground_truth"):
        if isinstance(value_at(row, path), str):
            return path
    return None


def unused(present: Sequence[str], layout: Layout) -> list[str]:
    """Columns that nothing reads."""
    read = layout.columns(present)
    return [name for name in present if name not in read]
