"""Shared by all tests: one thread, and tiny checkpoints made once."""

import pytest
import torch

from tiny_models import make_tiny_qwen2

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory):
    """Folder of a two-layer Qwen2 with its tokenizer; tests must not change it."""
    return make_tiny_qwen2(tmp_path_factory.mktemp("tiny") / "qwen2")
