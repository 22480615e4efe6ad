"""What a trained model is worth: the paper's benchmarks, asked, judged, summed up and compared.

    measures        which figure each benchmark has: pass@1, pass@4 or accuracy
    problems        the problems of a benchmark, and the tokens that ask them
    served_model    what the engine loads: a model, or a base model with an adapter and full weights
    folder          the files of one evaluation and the settings they depend on
    records         responses and judgements, line by line
    run             what is still to be asked and judged
    estimators      pass@k and its interval
    summary         one benchmark's result
    paired          whether two runs on the same problems differ
    comparison      two evaluations, benchmark by benchmark
    report          results as JSON and Markdown
    picture         and as pictures
    paper           the paper's Table 1

Responses come from ``verl_backend.generation``; ``cli.eval`` puts the two together.
"""
