"""Whether a response is right: the same for a verl run, for rescoring and for an evaluation.

verdict.py           what is said of one response
scorer.py            judging responses
math.py              whether an expression is the gold
expression_text.py   what the text of two expressions decides
math_process.py      one process that compares expressions, as its parent sees it
math_worker.py       that process
code_gold.py         the gold of a code problem
"""
