"""Put the loss, the advantage, the rollout replica and the CPU platform into verl's registries; importing this module
does it.

verl imports it in every process through the ``verl.plugins`` entry point, unless ``VERL_USE_EXTERNAL_PLUGINS`` leaves
it out, and logs a failure at DEBUG level only. Nothing of verl is imported here that ``import verl`` has not loaded:
its algorithms take about a second, not every process needs them, and loss and advantage are registered when one imports
them. The engine is registered by ``engine_registration``, which a run that asks for Hybrid-LoRA names in
``actor_rollout_ref.model.external_lib``: there a failure stops the worker with its message.

Whether the installed verl can carry such a run is asked on the driver (``doctor.gate``) and not here, in every process.
"""

from __future__ import annotations

import logging
import os

import verl
import wrapt
from packaging.specifiers import SpecifierSet

from hybrid_lora_plugin.errors import with_reference

#: verl versions whose hooks this plugin was read and tested against.
SUPPORTED_VERL = SpecifierSet(">=0.9.1,<0.10", prereleases=True)

#: where verl keeps the registries of both
ALGORITHMS = "verl.trainer.ppo.core_algos"
#: where it keeps the one of rollout replicas
REPLICAS = "verl.workers.rollout.replica"

_registered = False


def installed_verl() -> str:
    """The installed verl version; read from its file because verl loads plugins while it is being imported."""
    with open(os.path.join(os.path.dirname(verl.__file__), "version", "version")) as stream:
        return stream.read().strip()


def is_supported(version: str) -> bool:
    """Whether ``version`` of verl is one whose hooks are known."""
    return version in SUPPORTED_VERL


def require_supported_verl(version: str, allow_untested: bool = False) -> None:
    """Raise ImportError, in one line, unless ``version`` of verl is one whose hooks are known, or any is allowed."""
    if not is_supported(version) and not allow_untested:
        raise ImportError(
            with_reference(
                f"hybrid_lora: verl {version} is installed, but this plugin is tested with verl {SUPPORTED_VERL}; "
                "install verl==0.9.1, or try this one with hybrid_lora.allow_untested=true after hybrid-lora-doctor, "
                "or leave out +hybrid_lora=enabled",
                "verl-version-not-supported",
            )
        )


def register() -> None:
    """Register the platform, and the rest for when verl's own modules of it are imported; a second call does nothing.

    In a verl outside the supported range the platform alone, which ``VERL_PLATFORM=cpu`` asks for by name: a run
    without ``hybrid_lora`` is left alone, and one with it registers the rest through ``engine_registration``.
    """
    global _registered
    if _registered:
        return
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from hybrid_lora_plugin.verl_backend.cpu import platform  # noqa: F401  registers itself

    if is_supported(installed_verl()):
        wrapt.register_post_import_hook(_algorithms_imported, ALGORITHMS)
        wrapt.register_post_import_hook(_replicas_imported, REPLICAS)
    _registered = True


def register_algorithms() -> None:
    """Register loss and advantage now.

    Raises:
        ValueError: verl has another advantage of that name.
    """
    from hybrid_lora_plugin.verl_backend import advantages, losses

    losses.register()
    advantages.register()


def register_replica() -> None:
    """Register the rollout replica now."""
    from verl.workers.rollout import replica

    _replicas_imported(replica)


def _algorithms_imported(_) -> None:
    try:
        register_algorithms()
    except Exception as error:
        # As verl does with plugins: a run that asks for neither goes on. One with +hybrid_lora=enabled fails in its
        # engine.
        logging.getLogger(__name__).warning("hybrid_lora: loss and advantage are not registered: %s", error)


def _replicas_imported(replicas) -> None:
    # verl asks for the class when it starts servers, in whichever process that is.
    replicas.RolloutReplicaRegistry.register("vllm", _load_replica)


def _load_replica() -> type:
    from hybrid_lora_plugin.verl_backend.receiver.replica import ReplicaForModel

    return ReplicaForModel


register()
