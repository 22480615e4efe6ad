"""Shared by all tests: one thread, the CPU environment, and tiny checkpoints made once."""

import gc
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
def main_ppo():
    """``python -m verl.trainer.main_ppo`` as a function of its arguments; its imports are paid once."""
    from tests.support.forking_python import ForkingPython
    from tests.support.verl_processes import ROOT, environment_of

    command = ForkingPython("verl.trainer.main_ppo", ROOT, environment_of())
    yield command
    command.close()


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory):
    """Folder of a two-layer Qwen2 with its tokenizer; tests must not change it."""
    return make_tiny_qwen2(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="module")
def few_objects():
    """For what collects garbage often: what other tests left would take it a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
