"""Whether a response is right: the same for a verl run, for rescoring and for an evaluation.

verdict.py     what is said of one response
scorer.py      judging responses
code_gold.py   the gold of a code problem
"""
