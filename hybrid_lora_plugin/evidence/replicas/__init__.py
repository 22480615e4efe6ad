"""Protocols that train many small replicas at once in one process.

tasks        arithmetic, and shifts from it          settings     the block of a plan
base         small Qwen2 models, trained to add      forward      R of them in one batched pass
updates      what each replica trains, AdamW         flops        operations and weights of a run
selection    the probe and the choice for each arm   frozen_weights   zeroth order under the adapters
sft          protocol ``sft``                        policy       protocol ``policy``
"""

from hybrid_lora_plugin.evidence.replicas.policy import PolicyProtocol
from hybrid_lora_plugin.evidence.replicas.sft import SftProtocol

__all__ = ["PolicyProtocol", "SftProtocol"]
