"""The reward of the demo task: 1 for exactly the right number, else 0.

verl loads this file by its path (``custom_reward_function.path``), outside any package: it may import only the
standard library.
"""

from __future__ import annotations

_END_TEXTS = ("<|im_end|>", "<pad>")  # present when the response was decoded with its special tokens


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """Compare the first answer of a response with the ground truth.

    The first answer is everything before the first end-of-sequence text, without surrounding whitespace. It must
    equal the ground truth character by character: ``082``, ``82.``, ``82 or 83`` are all wrong for ``82``, so the
    policy can gain nothing by hedging or by not stopping.

    Args:
        data_source: name of the data set; not used, verl passes it.
        solution_str: the decoded response.
        ground_truth: the right answer.
        extra_info: the row's extra information; not used.

    Returns:
        Always the same keys, or verl could not stack them over a batch: ``score`` and ``acc``, each 0.0 or 1.0.
    """
    answer = solution_str or ""
    for end in _END_TEXTS:
        answer = answer.partition(end)[0]
    right = float(answer.strip() == str(ground_truth).strip())
    return {"score": right, "acc": right}
