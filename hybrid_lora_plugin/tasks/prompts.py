"""The messages that ask a problem: one user turn, the system turn is the chat template's own.

Two styles, as in the paper's §4.4: ``io`` asks for the answer alone, ``cot`` for the steps before it. Both end with
where the answer has to stand, which is where ``rewards`` looks for it.
"""

from __future__ import annotations

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.tasks.problem import LETTERS, Problem

STYLES = ("io", "cot")

_ANSWER = {
    "math": "put your final answer within \\boxed{}",
    "integer": "put your final answer, a whole number, within \\boxed{}",
    "letter": 'end with a line "Answer: X", where X is the letter of one option',
    "code": "write the whole program in one block that starts with ```python and ends with ```",
}


def messages(problem: Problem, style: str) -> list[dict[str, str]]:
    """The conversation so far, for a tokenizer's chat template: one ``user`` turn.

    Args:
        problem: what is asked.
        style: ``io`` or ``cot``.

    Raises:
        ConfigurationError: another style.
    """
    return [{"role": "user", "content": user_turn(problem, style)}]


def user_turn(problem: Problem, style: str) -> str:
    """Text of the user's turn; arguments and errors as of ``messages``."""
    if style not in STYLES:
        raise ConfigurationError(f"style: {style!r}; wanted one of {', '.join(STYLES)}")
    parts = [problem.question.strip()]
    if problem.options:
        parts.append("\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, problem.options, strict=False)))
    if problem.starter:
        parts.append(f"Go on from this:\n```python\n{problem.starter.rstrip()}\n```")
    answer = _ANSWER[problem.kind]
    parts.append(f"Please reason step by step, and {answer}." if style == "cot" else f"Give no explanation; {answer}.")
    return "\n\n".join(parts)
