"""Whether a response is right: the same for a verl run, for rescoring and for an evaluation.

verdict.py   what is said of one response
"""
