"""Criterion ``trial``: candidate allocations trained for a while from one start, by successive halving.

    options    the settings of a trial with a number for each null, and what is refused before it starts
    portfolio  which candidates there are, from as few probes as possible
    schedule   rounds, survivors, steps and bytes, before anything is trained
    contender  one candidate as the hybrid model of ``training``, with its optimizer, on all ranks
    halving    the rounds: train, compare, drop
    verdict    what the held-out rows can tell apart, and which candidate is taken where they cannot
    state      what is on disk of an unfinished trial
    runner     the command's trial, from rows to artifact
    in_memory  a trial of a model in memory, for studies

Candidates are paired: weights, rows, their order and the first value of each adapter are the same for all of them.
"""
