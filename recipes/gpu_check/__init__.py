"""``make gpu-check``: what can be checked on one CUDA GPU in twenty minutes, on one page."""
