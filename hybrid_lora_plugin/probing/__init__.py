"""The probe: warm up extra parameters on every candidate, then measure each module (paper Algorithm 1).

    runner         from command to artifact              method         what a probe method is; each in methods/
    stages         one probe of one seed, in order       checks         what rank and budget ask of candidates
    provenance     what a probe says about itself        layers         the layer of Eq. 7
    resume         the interruptible probe on disk       measure        masked passes, sensitivities, Eq. 9
    interrupt      stopping between two steps            controls       LoRA-Drop, gradient norm, SNIP
    progress       what the user sees                    forward        a batch, its loss, and the passes over it
    loading        model and tokenizer                   optimizer      AdamW that resumes bit for bit
    distributed    the processes, the sharded base       data/          from files to batches
    shared_base    read by one rank, sent to the others  trial/         allocations that are trained and compared

Nothing here needs verl.
"""
