"""A real rollout engine fed by a real hybrid model, without a training run: for faults and for timings.

verl's standalone replica with Ray, the plugin's server, worker extension and server adapter, and vLLM; in the place of
the network there is a checkpoint engine that holds the hybrid model itself.
"""
