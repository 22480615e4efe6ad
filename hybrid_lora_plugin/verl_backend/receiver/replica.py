"""The rollout replica of a model (verl 0.9.1 ``workers/rollout/replica.py``): ours under Hybrid-LoRA, else verl's own.

Registered in every process that imports verl's replicas: not each process that starts rollout servers has read the
model and with it the plugin's own module. A run without Hybrid-LoRA gets an object of verl's own class.
"""

from __future__ import annotations

from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica


class ReplicaForModel(vLLMReplica):
    """Builds the replica a model asks for: ours where its ``lora`` node has ``hybrid``, else verl's own class."""

    def __new__(cls, replica_rank, config, model_config, *args, **kwargs):
        wanted = vLLMReplica
        if (model_config.get("lora") or {}).get("hybrid"):
            from hybrid_lora_plugin.verl_backend.receiver.server import HybridLoraReplica

            wanted = HybridLoraReplica
        # An instance of another class: Python does not call __init__ on it again.
        replica = object.__new__(wanted)
        replica.__init__(replica_rank, config, model_config, *args, **kwargs)
        return replica
