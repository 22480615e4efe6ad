"""The probe: warm up extra parameters on every candidate, then measure each module (paper Algorithm 1).

    runner.py       all of it, in order               run.py            what a probing run is, and four of them:
    record.py       what a probe says about itself      svd_lora_run.py   the paper's, for most criteria
    state.py        the interruptible run on disk       adalora.py        pruned ranks
    interrupt.py    stopping between two steps          autolora.py       bi-level selection scalars
    progress.py     what the user sees                  full_delta.py     full deltas (Hybrid-LoRA-4)

    ranks.py        the processes of a probe          svd_lora.py       the layer of Eq. 7
    sharding.py     the frozen base over them         score.py          partitions, masked passes, sensitivities
    passes.py       a batch over ranks and            controls.py       LoRA-Drop, gradient norm, SNIP
                    micro-batches                     perturbation.py   Eq. 9
    loss.py         response NLL                      optimizer.py      AdamW that resumes bit for bit
    loading.py      model and tokenizer               seeding.py        one random stream per purpose

    data.py         split and batches                 rows.py           checked rows by number
    row_files.py    which files an entry stands for   row_stores.py     random access to them
    row_screen.py   checking whole columns at once

Nothing here needs verl.
"""
