"""Shared by all tests: one thread, the CPU environment, and tiny checkpoints made once."""

import os

from recipes.demo.environment import CPU_ENVIRONMENT

# Before anything imports verl or vLLM, which read their platform once.
os.environ.update(CPU_ENVIRONMENT)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.support.sync_models import case, cases, hybrid  # noqa: E402, F401
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory):
    """Folder of a two-layer Qwen2 with its tokenizer; tests must not change it."""
    return make_tiny_qwen2(tmp_path_factory.mktemp("tiny") / "qwen2")
