"""Everything that imports verl, Ray or vLLM.

``registration``  puts the parts below into verl's registries; verl imports it in every process
``preflight``     checks a composed configuration on the driver, before Ray starts
``engine``        the FSDP2 engine that trains under an allocation; ``engine_checkpoints`` what it saves and resumes
``sender``        the sending end of a weight sync
``transport``     what lies between the two ends
``receiver``      the receiving end, inside vLLM's server and workers
``probe``         probing inside a run
``losses``        policy loss ``hybrid_gspo``
``advantages``    advantage ``hybrid_group``
``cpu``           verl's platform for machines without an accelerator
``contracts``     what is relied on in verl, vLLM, PEFT and torch, symbol by symbol
``doctor``        which features work with what is installed, for a command and for the preflight
``patches``       the only patches of verl, torch and vLLM, all but five of them for the CPU platform

A new loss, advantage or engine is one file here and one line in ``registration``.
"""
