"""Whether a response is right: the same for a verl run, for rescoring and for an evaluation.

verdict.py           what is said of one response
scorer.py            judging responses
math.py              whether an expression is the gold
expression_text.py   what the text of two expressions decides
math_process.py      one process that compares expressions, as its parent sees it
math_worker.py       that process
code_gold.py         the gold of a code problem
sandbox.py           running a program against its tests
sandbox_guest.py     what runs inside the two sandboxes
terms.py             what may be added to the reward: form and length
verl_reward.py       verl's custom reward function
"""
