"""The reward of noisy_adder's tasks: the share of digits that are right, 0 where the answer has another length.

With a reward for whole answers alone, a policy that is right once in two hundred answers sees no reward in most groups.

verl loads this file by its path (``custom_reward_function.path``), outside any package: it may import only the
standard library.
"""

from __future__ import annotations

_END_TEXTS = ("<|im_end|>", "<pad>")  # present when the response was decoded with its special tokens


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """Compare the first answer of a response with the ground truth, digit by digit.

    Args:
        data_source: name of the data set; not used, verl passes it.
        solution_str: the decoded response; all before its first end-of-sequence text counts, without spaces around it.
        ground_truth: the right answer.
        extra_info: the row's extra information; not used.

    Returns:
        ``score``, the share of places that are right, and ``acc``, 1.0 where all of them are.
    """
    answer, right = solution_str or "", str(ground_truth).strip()
    for end in _END_TEXTS:
        answer = answer.partition(end)[0]
    answer = answer.strip()
    if len(answer) != len(right) or not right:
        return {"score": 0.0, "acc": 0.0}
    share = sum(ours == theirs for ours, theirs in zip(answer, right, strict=True)) / len(right)
    return {"score": share, "acc": float(share == 1.0)}
