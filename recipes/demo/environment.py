"""Environment variables of verl, Ray and vLLM on a machine without a GPU."""

import os

#: What each process of a run needs; the plugin reads VERL_PLATFORM, the libraries the rest.
CPU_ENVIRONMENT = {
    # The plugin's platform, and verl's FSDP engines, which it registers for "cuda" and "npu" only.
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "offline",
    # Models and data are local files here; never wait for a hub.
    "HF_HUB_OFFLINE": "1",
}


def cpu_environment(**extra: str) -> dict[str, str]:
    """This process's environment with the variables above and ``extra`` on top, for ``subprocess``."""
    return {**os.environ, **CPU_ENVIRONMENT, **extra}
