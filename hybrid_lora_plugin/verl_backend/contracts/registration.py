"""How the plugin gets into verl: its registries, its losses, and Hydra on the driver."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import Contract, Subject, behaviour, rows

_ENGINES = "verl_backend/engine_registration.py"
_PLUGIN = "verl_backend/registration.py"
_LOSSES = "verl_backend/losses.py"
_SURROGATE = "verl_backend/surrogate.py"
_PREFLIGHT = "verl_backend/preflight.py"
_REQUIREMENTS = "verl_backend/requirements.py"
_SEARCH_PATH = "../hydra_plugins/hybrid_lora/search_path.py"
_WORKER = "verl_backend/receiver/worker.py"
_CHECKPOINTS = "verl_backend/engine_checkpoints.py"
_SFT = "verl_backend/probe/sft.py"
_CHILD = "verl_backend/doctor/child.py"
_GIVEN = "verl_backend/given_settings.py"
_PLANNED = "verl_backend/planned_command.py"


def _literal(module: str, text: str, file: str, reason: str) -> Contract:
    return Contract(("registration",), module, "", (file,), reason, constant=text)


REGISTRATION = Subject(
    "Registration of loss, advantage, engine and rollout side",
    (
        *rows(
            "registration",
            "verl",
            "",
            ("", (_PLUGIN, _CHILD, _GIVEN, _PLANNED), "its folder holds the version file and its configurations"),
        ),
        _literal("verl", "verl.plugins", _PLUGIN, "group of entry points that `import verl` loads"),
        _literal("verl", "VERL_USE_EXTERNAL_PLUGINS", _PLUGIN, "which of them it loads"),
        *rows(
            "registration loss",
            "verl.trainer.ppo.core_algos",
            "",
            ("", _PLUGIN, "the module whose import registers loss and advantage"),
            ("register_policy_loss", _LOSSES, "registry of policy losses", "name"),
            ("register_adv_est", "verl_backend/advantages.py", "registry of advantages", "name_or_enum"),
        ),
        *rows(
            "loss",
            "verl.trainer.ppo.core_algos",
            "",
            (
                "agg_loss",
                (_LOSSES, _SURROGATE),
                "averages over the global number of sequences, or of tokens",
                "loss_mat loss_mask loss_agg_mode dp_size batch_num_tokens global_batch_size loss_scale_factor",
            ),
            ("PolicyLossFn", _LOSSES, "what a policy loss is called with"),
            (
                "compute_policy_loss_gspo",
                _LOSSES,
                "one of verl's own, with the signature that ours has",
                "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights",
            ),
        ),
        *rows(
            "loss",
            "verl.workers.config.actor",
            "ActorConfig",
            ("clip_ratio clip_ratio_low clip_ratio_high", _LOSSES, "clip range of the loss"),
            ("global_batch_info", _LOSSES, "ranks and sequences of the whole mini-batch"),
        ),
        *rows(
            "engine",
            "verl.workers.config.actor",
            "ActorConfig",
            ("policy_loss loss_agg_mode loss_scale_factor", _SURROGATE, "whose surrogate zeroth order measures"),
        ),
        *rows(
            "engine",
            "verl.workers.utils.losses",
            "",
            ("ppo_loss", _SURROGATE, "what the worker trains with", "config model_output data dp_group"),
        ),
        *rows(
            "registration",
            "verl.utils.device",
            "",
            (
                "get_device_name",
                (_ENGINES, _REQUIREMENTS, _WORKER),
                "key of the engine registry; device of a worker",
            ),
            ("get_vendor", _ENGINES, "key of the engine registry"),
        ),
        *rows(
            "engine",
            "verl.utils.device",
            "",
            (
                "get_device_id",
                (
                    "verl_backend/engine.py",
                    _CHECKPOINTS,
                    "verl_backend/probe/policy_engine.py",
                    "verl_backend/probe/policy_scoring.py",
                    _SFT,
                ),
                "where whole tensors are put together",
            ),
            (
                "get_torch_device",
                ("verl_backend/engine.py", _CHECKPOINTS, _SFT),
                "waits for copies, empties the cache",
            ),
        ),
        *rows(
            "registration",
            "verl.workers.engine",
            "EngineRegistry",
            ("", _ENGINES, "where verl looks for an engine"),
            ("_engines", _ENGINES, "tells whether another plugin holds the key"),
            ("register", _ENGINES, "puts the engine there", "model_type backend device vendor"),
        ),
        _literal("verl.workers.engine.base", "VERL_ENGINE_DEVICE", _ENGINES, "device that engines are looked up for"),
        *rows(
            "registration",
            "verl.workers.rollout.base",
            "",
            ("", _ENGINES, "module of the rollout registry"),
            ("_ROLLOUT_REGISTRY", _ENGINES, "where verl looks for a server adapter, as a dotted path"),
        ),
        *rows(
            "registration",
            "verl.workers.rollout.replica",
            "",
            ("", _PLUGIN, "the module whose import registers the replica"),
            ("RolloutReplicaRegistry", _PLUGIN, "where verl looks for a replica"),
            ("RolloutReplicaRegistry.register", _PLUGIN, "puts it there", "name loader"),
        ),
        *rows(
            "registration",
            "verl.workers.config.model",
            "",
            (
                "HFModelConfig.external_lib",
                ("conf/hybrid_lora/enabled.yaml", "verl_backend/run_settings.py"),
                "names the module that registers the engine in every worker",
            ),
            ("import_external_libs", _ENGINES, "imports that module when a worker reads the model"),
        ),
    ),
    (
        behaviour(
            "registration",
            _PLUGIN,
            "`import verl` loads the entry points of group `verl.plugins`, unless VERL_USE_EXTERNAL_PLUGINS leaves "
            "them out",
            "tests/test_losses.py::test_loss_and_advantage_are_found_through_verls_registries",
        ),
        behaviour(
            "registration",
            _ENGINES,
            "a worker imports `external_lib` before it looks for an engine, and stops if that fails",
            "tests/test_verl_configuration.py::test_worker_without_the_plugin_stops_instead_of_training_plain_lora",
        ),
        behaviour(
            "registration",
            _ENGINES,
            "the registry of engines looks for (device, vendor) before device",
            "tests/test_engine.py::test_registry_gives_our_engine_to_a_hybrid_model",
        ),
        behaviour(
            "registration",
            _ENGINES,
            "the trainer reads the model, and so imports `external_lib`, before it looks for a replica",
            "tests/test_sync_verl.py::test_verl_still_reads_the_model_before_it_looks_for_the_rollout_side",
        ),
        behaviour(
            "registration",
            _ENGINES,
            "a value of the rollout registry may be a dotted path",
            "tests/test_sync_verl.py::test_registration_puts_our_rollout_side_where_verl_looks",
        ),
        behaviour(
            "loss",
            _LOSSES,
            "`agg_loss` with `seq-mean-token-sum` divides by the global number of sequences",
            "tests/test_losses.py::test_mean_over_ranks_is_the_loss_of_one_rank",
        ),
    ),
)

DRIVER = Subject(
    "Checks on the driver",
    (
        *rows(
            "registration",
            "hydra.experimental.callback",
            "Callback",
            ("", _PREFLIGHT, "base class of the check on the driver"),
            ("on_run_start on_job_start", _PREFLIGHT, "called with the composed configuration", "config"),
        ),
        *rows(
            "registration",
            "hydra.types",
            "RunMode",
            ("", (_PREFLIGHT, _GIVEN), "whether it is a sweep"),
            ("MULTIRUN", _PREFLIGHT, "whether it is a sweep"),
            ("RUN", _GIVEN, "composes as a single run does"),
        ),
        *rows(
            "registration",
            "hydra._internal.config_loader_impl",
            "ConfigLoaderImpl",
            ("", _GIVEN, "composes a run once more", "config_search_path"),
            ("_parse_overrides_and_create_caching_repo", _GIVEN, "reads each file once", "config_name overrides"),
            ("_load_single_config", _GIVEN, "one file of the run", "default repo"),
            ("load_configuration", _GIVEN, "verl's own defaults", "config_name overrides run_mode"),
        ),
        *rows(
            "registration",
            "hydra._internal.config_search_path_impl",
            "ConfigSearchPathImpl",
            ("", _GIVEN, "where the files of the run are found"),
            ("append", _GIVEN, "adds a place", "provider path"),
        ),
        *rows(
            "registration",
            "hydra._internal.defaults_list",
            "",
            (
                "create_defaults_list",
                _GIVEN,
                "the files of the run in the order of composition",
                "repo config_name overrides_list prepend_hydra skip_missing",
            ),
        ),
        *rows(
            "registration",
            "hydra.core.override_parser.overrides_parser",
            "OverridesParser",
            ("", _GIVEN, "reads the command line"),
            ("create", _GIVEN, "makes one"),
            ("parse_overrides", _GIVEN, "its settings", "overrides"),
        ),
        *rows(
            "registration",
            "omegaconf",
            "",
            (
                "DictConfig._content DictConfig._get_node DictConfig._is_missing DictConfig._is_none "
                "DictConfig._is_interpolation Node._value",
                _GIVEN,
                "what a file says, with interpolations as they are written",
            ),
        ),
        *rows(
            "registration",
            "hydra.plugins.search_path_plugin",
            "SearchPathPlugin",
            ("", _SEARCH_PATH, "base class of the plugin for Hydra"),
            ("manipulate_search_path", _SEARCH_PATH, "the hook", "search_path"),
        ),
        *rows(
            "registration",
            "hydra.core.config_search_path",
            "ConfigSearchPath",
            ("", _SEARCH_PATH, "where configuration groups are found"),
            ("append", _SEARCH_PATH, "adds ours", "provider path"),
        ),
        *rows(
            "registration",
            "hydra.core.config_store",
            "ConfigStore",
            ("", _SEARCH_PATH, "where the defaults of our options are found"),
            ("instance", _SEARCH_PATH, "the one of the process"),
            ("store", _SEARCH_PATH, "adds ours", "name node group provider"),
        ),
    ),
    (
        behaviour(
            "registration",
            _PREFLIGHT,
            "Hydra lets SystemExit out of a callback, and calls `on_run_start` before it makes the output folder",
            "tests/test_verl_configuration.py::test_main_ppo_stops_with_one_line_and_writes_nothing",
        ),
        behaviour(
            "registration",
            _REQUIREMENTS,
            "the settings of verl that are checked or set have these names",
            "tests/test_verl_configuration.py::test_recipe_composes_and_passes_verls_own_validation",
        ),
    ),
)
