"""Weight sync: what a trainer sends to a rollout engine, and how both sides prove that it arrived.

``digest``           one short text per tensor that changes with any bit of it
``wire``             the stream: a header, the named tensors, a manifest; and the check of what came out of it
``mode_base``        the interface of a sync mode; ``modes`` has them by name
``merge``            plain merged weights, all of them
``sparse_merge``     after a first sync of ``merge``, the elements that changed: ``sent_weights`` is what the trainer
                     remembers, ``element_list`` what travels, ``element_sum`` its proof, ``live_weight`` where it goes
``adapter``          the full modules' weights, and the LoRA factors for the engine's own adapter
``receiver_merge``   the full modules' weights, and fp32 factors that the receiver merges itself
``hybrid_weights``   reading a hybrid model, sharded or not, one whole tensor at a time
``base_weights``     the original weights, and that trainer and rollout engine started from the same

Nothing here imports verl or vLLM; the parts that do are in ``verl_backend``.
"""
