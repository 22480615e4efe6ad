"""Everything that imports verl, Ray or vLLM.

``registration``  puts the parts below into verl's registries; verl imports it in every process
``preflight``     checks a composed configuration on the driver, before Ray starts
``engine``        the FSDP2 engine that trains under an allocation
``weight_source``, ``rollout_adapter``, ``transport``    the sending end of a weight sync
``rollout_worker``, ``rollout_model``                    the receiving end, inside vLLM's workers
``rollout_server``  verl's vLLM server, which generates from proven weights only
``prompt_probe``  log-probabilities of a fixed prompt, for ``sync_check=probe``
``losses``        policy loss ``hybrid_gspo``
``advantages``    advantage ``hybrid_group``
``cpu_platform``  verl's platform for machines without an accelerator
``patches``       the only patches of verl and torch, all but one of them for the CPU platform
``vllm_cpu``      the only patch of vLLM, for its CPU build

A new loss, advantage or engine is one file here and one line in ``registration``.
"""
