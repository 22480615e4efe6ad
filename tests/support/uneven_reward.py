"""A reward that differs between random answers: verl loads this file by its path."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """0.0 or 1.0, by the sum of the answer's bytes."""
    return float(sum((solution_str or "").encode()) % 2)
