"""PEFT, transformers and torch: the hybrid model, its layer, and how checkpoints and tokenizers are loaded."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import Subject, behaviour, rows

_LORA_LINEAR = "training/lora_linear.py"
_WEIGHTS = "weight_loading.py"
_PLAN = "plan/model.py"
_PLANNED = "verl_backend/planned_command.py"
_APPLY = "training/apply.py"
_REFERENCE = "training/reference.py"
_CONTENDER = "probing/trial/contender.py"
_EXPORT = "training/export.py"
_BASE_MODEL = "training/base_model.py"
_SERVED = "evaluation/served_model.py"
_ADAPTER_FOLDER = "training/adapter_folder.py"
_LOADING = "probing/loading.py"
_TEMPLATE = "probing/data/template.py"
_TOKENS = "probing/data/tokens.py"
_MODEL_CHECK = "verl_backend/model_check.py"
_PATCHES = "verl_backend/patches.py"
_CONFIG_READERS = (_LOADING, _MODEL_CHECK, _BASE_MODEL, _SERVED, _PLANNED)
_BOTH_ENGINES = ("verl_backend/engine.py", "verl_backend/probe/policy_engine.py")

TRAINING = Subject(
    "The hybrid model, its layer, and loading",
    (
        *rows("engine", "torch", "Tensor", ("_version", _LORA_LINEAR, "tells whether an input was changed in place")),
        *rows(
            "engine",
            "torch.nn",
            "Module",
            ("_buffers", _PATCHES, "buffers that must keep their type"),
            (
                "register_forward_hook",
                _LORA_LINEAR,
                "forgets what adapters computed together, also after a call that failed",
                "hook always_call",
            ),
        ),
        *rows(
            "engine",
            "peft",
            "",
            ("PeftModel", _APPLY, "what apply_allocation returns"),
            ("PeftModel.peft_config", _APPLY, "tells a model that is wrapped already"),
            ("LoraConfig._register_custom_module", _APPLY, "puts our layer in place of PEFT's", "mapping"),
            ("get_peft_model", (_APPLY, _PLAN), "wraps the model", "model peft_config adapter_name"),
        ),
        *rows(
            "engine export",
            "peft",
            "",
            ("TaskType", (_APPLY, _ADAPTER_FOLDER, _PLAN), "kind of model"),
            ("TaskType.CAUSAL_LM", (_APPLY, _ADAPTER_FOLDER, _PLAN), "kind of model"),
            (
                "LoraConfig",
                (_APPLY, _ADAPTER_FOLDER, _PLAN),
                "the adapters",
                "task_type r target_modules lora_alpha lora_dropout bias",
            ),
        ),
        *rows(
            "engine",
            "peft.tuners.lora",
            "",
            ("LoraLayer", (_APPLY, _REFERENCE, _CONTENDER), "marks the modules that got an adapter"),
            ("LoraLayer._disable_adapters", _REFERENCE, "switches an adapter off for the reference policy"),
            ("Linear", _LORA_LINEAR, "base class of our layer"),
            ("Linear.forward", _LORA_LINEAR, "answers for everything but the plain case", "x"),
            ("Linear.lora_A Linear.lora_B", (_APPLY, _LORA_LINEAR), "factors by adapter name"),
            (
                "Linear.lora_bias Linear.lora_dropout Linear.lora_variant Linear.scaling Linear.in_features "
                "Linear.base_layer",
                _LORA_LINEAR,
                "what the layer computes",
            ),
            (
                "Linear.disable_adapters Linear.merged Linear.active_adapters",
                _LORA_LINEAR,
                "tells whether the plain case holds",
            ),
            ("Linear.reset_lora_parameters", _APPLY, "draws A again in fp32", "adapter_name init_lora_weights"),
        ),
        *rows(
            "engine",
            "transformers",
            "",
            ("PreTrainedModel", _PATCHES, "class whose cast is narrowed to parameters"),
            ("PreTrainedModel.to", _PATCHES, "the cast that verl calls"),
            ("PreTrainedModel.enable_input_require_grads", _BOTH_ENGINES, "gradient for checkpointed layers"),
            ("PreTrainedConfig._name_or_path", "allocation/schema.py", "names the model in a refusal"),
        ),
        *rows(
            "registration probe export",
            "transformers",
            "",
            ("AutoConfig", (_LOADING, _MODEL_CHECK, _BASE_MODEL, _SERVED, _PLANNED), "config of a checkpoint"),
            (
                "AutoConfig.from_pretrained",
                (_LOADING, _MODEL_CHECK, _BASE_MODEL, _SERVED, _PLANNED),
                "config of a checkpoint",
            ),
        ),
        *rows(
            "registration probe",
            "transformers",
            "",
            ("PreTrainedModel.get_output_embeddings", "linear_account.py", "which linear module is the head"),
            (
                "AutoModelForCausalLM",
                ("candidates.py", _LOADING, _BASE_MODEL, _WEIGHTS),
                "the model, with or without weights",
            ),
            ("AutoModelForCausalLM.from_config", "candidates.py", "the model on the meta device"),
            ("PreTrainedConfig.get_text_config", "candidates.py", "text part of a composite config"),
        ),
        *rows(
            "export",
            "transformers",
            "",
            ("GenerationConfig", (_BASE_MODEL, _SERVED), "settings of generation of a model that was not loaded"),
            (
                "GenerationConfig.from_pretrained",
                (_BASE_MODEL, _SERVED, "probing/prepare.py"),
                "settings of generation alone",
            ),
        ),
        *rows(
            "export",
            "transformers.utils",
            "",
            ("logging", ("cli/export.py", "cli/plan.py"), "quiet where nothing takes long"),
        ),
        *rows(
            "export",
            "peft",
            "",
            ("LoraConfig.save_pretrained", _ADAPTER_FOLDER, "writes adapter_config.json", "save_directory"),
        ),
        *rows(
            "probe export",
            "transformers",
            "",
            ("AutoTokenizer", (_LOADING, _EXPORT), "tokenizer of a checkpoint"),
            ("AutoTokenizer.from_pretrained", (_LOADING, _EXPORT), "tokenizer of a checkpoint"),
            ("AutoModelForCausalLM.from_pretrained", (_LOADING, _BASE_MODEL, _WEIGHTS), "the model with its weights"),
        ),
        *rows(
            "probe",
            "transformers",
            "",
            ("__version__", "probing/provenance.py", "recorded in the artifact"),
            (
                "PreTrainedTokenizerBase.apply_chat_template",
                _TEMPLATE,
                "text of a chat",
                "conversation add_generation_prompt tokenize",
            ),
            ("PreTrainedTokenizerBase.chat_template", _TOKENS, "whether chats can be encoded"),
            (
                "PreTrainedTokenizerBase.all_special_tokens",
                "probing/data/conversation.py",
                "where a response ends in the text of a chat",
            ),
        ),
        *rows(
            "registration probe",
            "transformers.models.auto.modeling_auto",
            "",
            (
                "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
                ("candidates.py", "model_families.py"),
                "class name of a config that was never saved, and of the text model in a multimodal one",
            ),
        ),
        *rows(
            "registration engine probe export",
            "transformers",
            "",
            ("PreTrainedModel.all_tied_weights_keys", _WEIGHTS, "which weights are one"),
            ("PreTrainedModel._hf_peft_config_loaded", _WEIGHTS, "whether an adapter came with the weights"),
        ),
        *rows(
            "registration engine probe export",
            "transformers.utils.logging",
            "",
            (
                "get_verbosity set_verbosity is_progress_bar_enabled enable_progress_bar",
                _WEIGHTS,
                "silence about what one line will say",
            ),
            ("disable_progress_bar", (_WEIGHTS, "cli/export.py"), "silence about what one line will say"),
        ),
    ),
    (
        behaviour(
            "registration engine probe export",
            _WEIGHTS,
            "loading onto the meta device reports the same missing and unexpected names as loading the weights",
            "tests/test_model_refusals.py::test_every_family_passes_and_misses_what_is_lost",
        ),
        behaviour(
            "engine",
            _APPLY,
            "PEFT puts the registered class in place of its own layer and keeps its names",
            "tests/test_training.py::test_exactly_the_allocated_modules_train_each_in_its_own_way",
        ),
        behaviour(
            "engine",
            _REFERENCE,
            "a LoRA layer of PEFT's computes its base alone while `_disable_adapters` is set, whatever its factors "
            "require",
            "tests/test_training.py::test_adapters_off_is_the_base_layer_and_leaves_every_gradient_on",
        ),
        behaviour(
            "engine",
            _LORA_LINEAR,
            "PEFT's layer computes the formula that ours computes in fewer steps",
            "tests/test_lora_linear.py::test_losses_and_gradients_are_pefts",
        ),
        behaviour(
            "engine",
            _PATCHES,
            "`to` of a Hugging Face model casts buffers too",
            "tests/test_training_verl.py::test_casting_parameters_leaves_the_frequencies_of_rope",
        ),
        behaviour(
            "export",
            "training/model_folder.py",
            "`save_pretrained` writes no weights of an empty state, and else fills its files in the order of "
            "`file_order`",
            "tests/test_training.py::test_a_folder_written_one_weight_at_a_time_is_transformers_own",
        ),
        behaviour(
            "probe",
            _TOKENS,
            "a tokenizer answers for `eos_token_id` and `pad_token_id`, which its class does not name",
            "tests/test_probe_data.py::test_labels_cover_response_and_end_token_only",
        ),
        behaviour(
            "probe",
            _TEMPLATE,
            "what `apply_chat_template` is given comes before the functions that transformers gives a template, as "
            "`strftime_now`",
            "tests/test_probe_conversation.py::test_a_template_that_prints_the_date_prints_the_day_it_is_given",
        ),
    ),
)
