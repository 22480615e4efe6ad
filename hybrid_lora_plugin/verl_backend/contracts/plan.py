"""What ``hybrid-lora-plan`` uses besides: Hydra to compose a command, and tensors without memory to run layers on."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import Subject, behaviour, rows

_COMMAND = "verl_backend/planned_command.py"
_CLI = "cli/plan.py"
_ACTIVATIONS = "plan/activations.py"
_LIVE = "plan/live_bytes.py"

PLAN = Subject(
    "The plan of a run",
    (
        *rows("plan", "verl.trainer.config", "", ("", _COMMAND, "where its configuration is")),
        *rows(
            "plan evidence",
            "verl.trainer.main_ppo",
            "",
            ("", (_COMMAND, "evidence/verl_runs.py"), "a program that can be planned, and a run of a comparison"),
        ),
        *rows("plan", "verl.trainer.sft_trainer", "", ("", _COMMAND, "a program that can be planned")),
        *rows(
            "plan",
            "hydra",
            "",
            ("compose", _COMMAND, "composes a command", "config_name overrides return_hydra_config"),
            ("initialize_config_dir", _COMMAND, "with a primary file of the user's", "config_dir version_base"),
            ("initialize_config_module", _COMMAND, "with verl's own", "config_module version_base"),
        ),
        *rows(
            "plan",
            "hydra.core.global_hydra",
            "GlobalHydra",
            ("", _COMMAND, "what a process composed before"),
            ("instance clear", _COMMAND, "forgets it"),
        ),
        *rows("plan", "hydra.errors", "", ("HydraException", _COMMAND, "a command that cannot be composed")),
        *rows(
            "plan",
            "transformers",
            "",
            ("AttentionInterface", _ACTIVATIONS, "an attention that is not run"),
            ("AttentionInterface.register", _ACTIVATIONS, "makes it known", "key value"),
        ),
        *rows(
            "plan",
            "transformers.utils.logging",
            "",
            ("set_verbosity_error", _CLI, "silences what it says of a config"),
        ),
        *rows(
            "plan",
            "torch.utils._python_dispatch",
            "TorchDispatchMode",
            ("", _LIVE, "sees every operation"),
            ("__init__ __torch_dispatch__", _LIVE, "called with each"),
        ),
    ),
    (
        behaviour(
            "plan",
            _LIVE,
            "the Python object of a storage lives as long as the storage, so that a weak reference to it tells its end",
            "tests/test_plan.py::test_a_storage_is_counted_until_its_last_tensor_is_gone",
        ),
        behaviour(
            "plan",
            "plan/logits.py",
            "verl's log-probabilities and entropy hold a certain number of tensors of the logits' size",
            "tests/test_plan_command.py::test_logits_are_what_verls_own_functions_hold",
        ),
    ),
)
