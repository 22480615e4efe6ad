"""Probe methods, one file each: what is attached to the model, how it warms up, what it measures.

svd_lora     the paper's, for most criteria (Eq. 7, Algorithm 1)
adalora      adapters whose ranks are pruned
autolora     bi-level selection scalars
full_delta   full deltas (Hybrid-LoRA-4)
lookahead    svd_lora, and the loss saved by moving one weight
weight_gradient  what gradients of frozen weights have in common over the batches
features     outputs of modules beside those of random inputs
"""
