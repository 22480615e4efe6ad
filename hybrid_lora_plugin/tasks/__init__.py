"""What is asked of a model and what counts as its answer: the same in training and in evaluation.

problem.py      one problem with its gold answer
prompts.py      the messages that ask it
answers.py      what a response gives as its answer
benchmarks.py   the evaluation sets, by name
schemas.py      how a row of each becomes a problem, in the columns that the hub has
"""
