"""What tests share, some of it with benchmarks: tiny models, drawn allocations, workers to start, and the fault
harness.

tiny_models  tiny_probe  sync_models          models of a few thousand parameters, real in every part
allocations  drawn_allocations                allocations without a probe
processes  verl_processes                     starting real processes and reading what they say
*_worker                                      what those processes run
altered_libraries                             installed libraries with one file changed, not to be imported
rollout_harness  hybrid_model_engine          real rollout engines fed by hybrid models
faults  sync_faults                           what can go wrong in a sync, and doing it; a command as well
faulty_stream  gloo_checkpoint_engine  host_flash_attention    stand where a run on a CPU needs them
"""
