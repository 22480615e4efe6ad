"""Everything that imports verl, Ray or vLLM.

``registration``  puts the parts below into verl's registries; verl imports it in every process
``preflight``     checks a composed configuration on the driver, before Ray starts
``engine``        the FSDP2 engine that trains under an allocation
``rollout_sync``  what the engine sends to the rollout engine
``losses``        policy loss ``hybrid_gspo``
``advantages``    advantage ``hybrid_group``
``cpu_platform``  verl's platform for machines without an accelerator
``patches``       the only patches of verl and torch, all of them for the CPU platform
``vllm_cpu``      the only patch of vLLM, for its CPU build

A new loss, advantage or engine is one file here and one line in ``registration``.
"""
