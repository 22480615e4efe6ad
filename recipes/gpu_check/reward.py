"""The reward of the GPU check: the share of vowels among the letters of a response.

It asks for nothing sensible. A random model never solves a task, so a right-or-wrong reward would give every response
of a group the same one, every advantage would be 0, and nothing would train. This one differs between almost any two
random responses, and is the same for the same text everywhere.

verl loads this file by its path (``custom_reward_function.path``), outside any package: it may import only the
standard library.
"""

from __future__ import annotations

_VOWELS = frozenset("aeiou")


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """Score a response.

    Args:
        data_source, ground_truth, extra_info: not used, verl passes them.
        solution_str: the decoded response.

    Returns:
        ``score`` and ``acc``, both the share of vowels in [0, 1]; 0.0 for a response without a letter from a to z.
    """
    letters = [letter for letter in (solution_str or "").lower() if "a" <= letter <= "z"]
    share = sum(letter in _VOWELS for letter in letters) / len(letters) if letters else 0.0
    return {"score": share, "acc": share}
