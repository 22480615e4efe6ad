"""verl's parts that the probe with objective ``policy`` uses besides the engine's."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import Subject, behaviour, rows

_POLICY = "verl_backend/probe/policy_engine.py"
_DATASET = "verl_backend/probe/policy_dataset.py"

PROBE = Subject(
    "The probe with objective policy",
    (
        *rows(
            "policy_probe",
            "verl.utils.torch_functional",
            "",
            ("get_constant_schedule_with_warmup", _POLICY, "a constant rate", "optimizer num_warmup_steps"),
        ),
        *rows(
            "policy_probe",
            "verl.utils.dataset.rl_dataset",
            "RLHFDataset",
            ("", _DATASET, "the run's own prompts", "data_files tokenizer config processor max_samples"),
        ),
        *rows(
            "policy_probe",
            "verl.utils.import_utils",
            "",
            ("load_extern_object", _DATASET, "the run's own dataset class", "module_path object_name"),
        ),
    ),
    (
        behaviour(
            "policy_probe",
            _POLICY,
            "a worker calls `lr_scheduler_step` once a step, after the last mini-batch",
            "tests/test_contracts.py::test_verl_still_steps_the_schedule_once_after_the_last_mini_batch",
        ),
        behaviour(
            "policy_probe",
            _DATASET,
            "`data.custom_cls` replaces the dataset of training and of validation",
            "tests/test_probing_runs.py::test_held_out_prompts_wrap_verls_own_dataset",
        ),
    ),
)
