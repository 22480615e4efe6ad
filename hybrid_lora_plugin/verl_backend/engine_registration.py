"""Register the Hybrid-LoRA engine and its rollout side with verl; importing this module does it.

``+hybrid_lora=enabled`` names this module in ``actor_rollout_ref.model.external_lib``, so verl imports it in
every worker that reads the model (``verl/workers/config/model.py``, with ``import_external_libs``). Two things follow:
a run without Hybrid-LoRA never loads it, and a worker without the plugin stops at once instead of training plain LoRA.
"""

from __future__ import annotations

import os

from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.rollout import base as rollout_base

from hybrid_lora_plugin.errors import with_reference
from hybrid_lora_plugin.verl_backend import patches, registration
from hybrid_lora_plugin.verl_backend.engine import HybridLoraEngine

BACKENDS = ("fsdp", "fsdp2")
ADAPTER_MODULE = "hybrid_lora_plugin.verl_backend.sender.server_adapter"


class EngineForModel(FSDPEngineWithLMHead):
    """Builds the engine a model asks for: ours where its ``lora`` node has ``hybrid``, else verl's own class."""

    def __new__(cls, model_config, *args, **kwargs):
        hybrid = model_config.lora.get("hybrid")
        wanted = FSDPEngineWithLMHead
        if hybrid:
            # The driver has asked for more, of the libraries that it has itself.
            registration.require_supported_verl(registration.installed_verl(), bool(hybrid.get("allow_untested")))
            wanted = _probing_engine() if hybrid.get("phase") == "probe" else HybridLoraEngine
        # An instance of another class: Python does not call __init__ on it again.
        engine = object.__new__(wanted)
        engine.__init__(model_config, *args, **kwargs)
        return engine


def _probing_engine() -> type[FSDPEngineWithLMHead]:
    # Late: what it imports of verl besides, no other run needs.
    from hybrid_lora_plugin.verl_backend.probe.policy_engine import PolicyProbeEngine

    return PolicyProbeEngine


def register() -> None:
    """Register for the exact (device, vendor) key that verl looks up first on this machine.

    Raises:
        RuntimeError: another plugin holds that key.
        ValueError: another one has an advantage of our name.
    """
    registration.register()
    registration.register_algorithms()
    if not registration.is_supported(registration.installed_verl()):
        # In a supported one, importing verl has seen to it.
        registration.register_replica()
    device = os.environ.get("VERL_ENGINE_DEVICE") or get_device_name()
    key = (device, get_vendor())
    for backend in BACKENDS:
        holder = EngineRegistry._engines["language_model"][backend].get(key)
        if holder is EngineForModel:
            continue
        if holder is not None:
            raise RuntimeError(
                with_reference(
                    f"hybrid_lora: the {backend} engine for {key[1]} is already registered as {holder.__module__}."
                    f"{holder.__name__}; uninstall that verl plugin or exclude it with "
                    "VERL_USE_EXTERNAL_PLUGINS=hybrid_lora",
                    "engine-already-registered",
                )
            )
        EngineRegistry.register("language_model", backend=backend, device=device, vendor=key[1])(EngineForModel)
    # As verl's own for a model without Hybrid-LoRA.
    rollout_base._ROLLOUT_REGISTRY[("vllm", "async")] = f"{ADAPTER_MODULE}.HybridLoraServerAdapter"
    patches.log_sync_metrics()
    patches.record_validations()
    patches.refuse_plain_servers()


register()
