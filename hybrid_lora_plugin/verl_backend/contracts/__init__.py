"""What the plugin relies on in verl, vLLM, PEFT, torch, transformers, Ray and Hydra, as one table.

``CONTRACTS`` holds one record a symbol, ``BEHAVIOURS`` what no look at names can show, each with the test that shows
it. It is complete for what the package imports and overrides: ``tests/test_contracts.py`` compares the two.
``docs/contracts.md`` is written from it, ``hybrid-lora-doctor`` looks it up. Nothing of those libraries is imported
before ``check`` asks for it, so the table can be read anywhere.

``record``         what a record says, and the features that stop working without it
``by_source``      looks a symbol up in the text of a library, importing nothing
``by_import``      looks it up in what is installed
``registration`` ``verl_engine`` ``training`` ``verl_rollout`` ``vllm_model`` ``probe`` ``generation`` ``plan``
``evidence`` ``cpu``
                   the records, by what they are records of
"""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.by_import import check
from hybrid_lora_plugin.verl_backend.contracts.cpu import CPU
from hybrid_lora_plugin.verl_backend.contracts.evidence import EVIDENCE
from hybrid_lora_plugin.verl_backend.contracts.generation import GENERATION
from hybrid_lora_plugin.verl_backend.contracts.plan import PLAN
from hybrid_lora_plugin.verl_backend.contracts.probe import PROBE
from hybrid_lora_plugin.verl_backend.contracts.record import (
    EVERY_RUN,
    FEATURES,
    RAN_WITH,
    READ_IN,
    SYNC,
    Behaviour,
    Contract,
    Subject,
)
from hybrid_lora_plugin.verl_backend.contracts.registration import DRIVER, REGISTRATION
from hybrid_lora_plugin.verl_backend.contracts.training import TRAINING
from hybrid_lora_plugin.verl_backend.contracts.verl_engine import ENGINE
from hybrid_lora_plugin.verl_backend.contracts.verl_rollout import METRICS, SENDER, SERVER
from hybrid_lora_plugin.verl_backend.contracts.vllm_model import RECEIVER

__all__ = [
    "BEHAVIOURS",
    "CONTRACTS",
    "EVERY_RUN",
    "FEATURES",
    "RAN_WITH",
    "READ_IN",
    "SUBJECTS",
    "SYNC",
    "Behaviour",
    "Contract",
    "Subject",
    "check",
]

SUBJECTS: tuple[Subject, ...] = (
    REGISTRATION,
    DRIVER,
    ENGINE,
    TRAINING,
    SENDER,
    METRICS,
    RECEIVER,
    SERVER,
    PROBE,
    GENERATION,
    PLAN,
    EVIDENCE,
    CPU,
)
CONTRACTS: tuple[Contract, ...] = tuple(contract for subject in SUBJECTS for contract in subject.contracts)
BEHAVIOURS: tuple[Behaviour, ...] = tuple(record for subject in SUBJECTS for record in subject.behaviours)
