"""The probe: warm up SVD-style LoRA on every candidate, then score the modules (paper Algorithm 1).

    svd_lora.py   the layer of Eq. 7            data.py     rows, split, batches
    loss.py       response NLL                  warmup.py   AdamW on A, B, e, alpha
    score.py      partitions, sensitivities     state.py    the interruptible run on disk
    runner.py     all of it, in order           progress.py what the user sees

Nothing here needs verl.
"""
