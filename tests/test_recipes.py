"""The scripts in ``recipes/``: each run that they can start composes, and passes verl's and the plugin's checks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

pytest.importorskip("verl", reason="verl is not installed")

import torch  # noqa: E402
import transformers  # noqa: E402
from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf, open_dict  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hybrid_lora_plugin.cli.arguments import parse  # noqa: E402
from hybrid_lora_plugin.config import (  # noqa: E402
    WITHOUT_PROBE,
    AllocateCommandConfig,
    DataCommandConfig,
    EvaluateCommandConfig,
    ExportCommandConfig,
    ProbeCommandConfig,
)
from hybrid_lora_plugin.config_validation import validate  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from hybrid_lora_plugin.weight_loading import check_weights  # noqa: E402
from recipes.merge_lora import merge_lora  # noqa: E402
from recipes.text_model import save_text_model  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.tiny_families import SIZES, SPECIAL, make_family  # noqa: E402
from tests.support.tiny_models import make_char_tokenizer  # noqa: E402
from tests.support.verl_processes import ROOT  # noqa: E402

RECIPES = ROOT / "recipes"
SCRIPTS = sorted(RECIPES.glob("*.sh"))
#: entry point, and the file of verl it starts from
PRIMARY = {"verl.trainer.main_ppo": "ppo_trainer", "verl.trainer.sft_trainer": "sft_trainer_engine"}


def parts(group):
    return sorted(path.stem for path in (RECIPES / "recipe" / group).glob("*.yaml"))


MODELS, ALGORITHMS, SELECTIONS = parts("model"), [*parts("algorithm"), "sft"], parts("selection")
HYBRID = [name for name in SELECTIONS if name not in ("full", "lora")]
#: Every selection with every algorithm, and every model: a model's part is its path and nothing else.
ROWS = [
    *itertools.product(["qwen2_5_1_5b"], ["grpo", "gspo", "sft"], SELECTIONS),
    ("qwen2_5_1_5b", "gspo_narrow_clip", "hybrid_lora"),
    *itertools.product(["qwen2_5_3b", "qwen2_5_7b"], ["grpo", "gspo", "sft"], ["hybrid_lora"]),
]
#: with recurrent layers beside attention, and what a tiny model of its kind is called in ``tests/support``
RECURRENT = {"falcon_h1_0_5b": "falcon_h1", "qwen3_5_0_8b": "qwen3_5_text"}
QWEN = [name for name in MODELS if name not in RECURRENT]


def script(name, *arguments, **environment):
    """A script with its exit status and texts; of this process's environment only what a shell has."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    return subprocess.run(
        ["bash", RECIPES / f"{name}.sh", *arguments], capture_output=True, text=True, env=kept | environment, timeout=60
    )


def commands(name, *arguments, **environment):
    """What a script would run, a list of words for each."""
    done = script(name, *arguments, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def module_and_arguments(command):
    modules = [at + 1 for at, word in enumerate(command) if word == "-m"]
    return command[modules[-1]], command[modules[-1] + 1 :]


def composed(command):
    """The configuration that a command of verl starts with."""
    module, arguments = module_and_arguments(command)
    at = arguments.index("--config-dir")
    search = f"hydra.searchpath=[file://{arguments[at + 1]}]"
    overrides = [search, *arguments[:at], *arguments[at + 2 :]]
    with initialize_config_module("verl.trainer.config", version_base=None, job_name=module.rpartition(".")[2]):
        return compose(PRIMARY[module], overrides=overrides, return_hydra_config=True)


def checked(config):
    """As a run checks it before Ray starts; returns verl's part of it, resolved."""
    if "hybrid_lora" in config:
        check_configuration(config)
    with open_dict(config):
        del config["hydra"]
    OmegaConf.resolve(config)
    return config


@pytest.fixture(scope="module")
def setting(tiny_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    return {"MODEL_PATH": str(tiny_qwen2), "ALLOCATION": str(make_allocation(tiny_qwen2, folder / "allocation"))}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_a_script(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_row_passes_verls_and_the_plugins_checks(row, setting, capsys):
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    _, algorithm, selection = row
    (command,) = commands("run", *row, **setting)
    config = checked(composed(command))
    said = capsys.readouterr().out
    assert ("hybrid_lora" in config) == (selection in HYBRID) == ("learning rates: full modules 1e-06" in said)
    assert "WARNING" not in said and "without effect, as a step" not in said
    assert config.trainer.test_freq == config.trainer.save_freq == 50
    if algorithm == "sft":
        model, optimizer = config.model, config.optim
        for node in (config.engine, config.optim, config.checkpoint):
            assert dataclasses.is_dataclass(omega_conf_to_dataclass(node))
    else:
        model, actor, rollout = (config.actor_rollout_ref[name] for name in ("model", "actor", "rollout"))
        optimizer = actor.optim
        validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=False)
        for node in (rollout, config.algorithm):
            assert dataclasses.is_dataclass(omega_conf_to_dataclass(node))
        assert config.algorithm.adv_estimator == "hybrid_group" and actor.loss_agg_mode == "seq-mean-token-mean"
        assert actor.use_kl_loss and (actor.kl_loss_coef, rollout.n, rollout.temperature) == (0.01, 4, 1.0)
        clip = (3e-4, 4e-4) if algorithm == "gspo_narrow_clip" else (0.2, 0.2)
        assert (actor.clip_ratio_low, actor.clip_ratio_high) == clip
        assert actor.policy_loss.loss_mode == ("vanilla" if algorithm == "grpo" else "hybrid_gspo")
        assert rollout.max_model_len == config.data.max_prompt_length + config.data.max_response_length
        assert config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs > 1
        assert config.trainer.n_gpus_per_node == 8
    if selection in HYBRID:
        hybrid = config.hybrid_lora
        assert (hybrid.full_lr, hybrid.lora.lr, hybrid.lora.rank, hybrid.budget.ratio) == (1e-6, 2.5e-5, 16, 0.1)
        assert (hybrid.probe.warmup_steps, hybrid.probe.partitions) == (500, 20)
    else:
        rank = 16 if selection == "lora" else 0
        assert (optimizer.lr, model.lora_rank) == (2.5e-5 if rank else 1e-6, rank)


@pytest.mark.parametrize("model", QWEN)
def test_rows_of_models_differ_in_the_path_alone(model):
    (path,) = yaml.safe_load((RECIPES / "recipe" / "model" / f"{model}.yaml").read_text())["model"].values()
    assert path.lower() == "qwen/" + model.replace("qwen2_5_", "qwen2.5-").replace("1_5", "1.5") + "-instruct"
    for algorithm, selection in itertools.product(ALGORITHMS, SELECTIONS):
        ours, first = [commands("run", name, algorithm, selection, OUTPUT="/o") for name in (model, QWEN[0])]
        first = [[word.replace(QWEN[0], model).replace("Qwen/Qwen2.5-1.5B-Instruct", path) for word in line]
                 for line in first]  # fmt: skip
        assert ours == first
    for algorithm, at in (("gspo", "actor_rollout_ref.model.path"), ("sft", "model.path")):
        assert OmegaConf.select(composed(commands("run", model, algorithm, "full")[-1]), at) == path


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    """A tiny model of each kind with an allocation."""
    folder, found = tmp_path_factory.mktemp("recurrent"), {}
    for name, family in RECURRENT.items():
        path = make_family(family, folder / name)
        found[name] = {"MODEL_PATH": str(path), "ALLOCATION": str(make_allocation(path, folder / f"{name}-allocation"))}
    return found


#: machine, algorithm, selection
PADDED = [
    ("a800x8", "gspo", "hybrid_lora"), ("a800x8", "gspo", "lora"), ("a800x8", "grpo", "full"),
    ("rtx4090x2", "gspo", "hybrid_lora"), ("a800x8", "sft", "hybrid_lora"), ("a800x8", "sft", "lora"),
]  # fmt: skip


@pytest.mark.parametrize("model", RECURRENT)
def test_rows_of_a_recurrent_model_are_padded_whatever_the_machine_says(model, recurrent, capsys):
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import validate_config

    for machine, algorithm, selection in PADDED:
        setting = recurrent[model] | {"TASK": "gsm8k", "MACHINE": machine}
        (command,) = commands("run", model, algorithm, selection, **setting)
        config = checked(composed(command))
        said = capsys.readouterr().out
        assert ("hybrid_lora" in config) == (selection == "hybrid_lora") and "WARNING" not in said
        models = config.model if algorithm == "sft" else config.actor_rollout_ref.model
        assert models.use_remove_padding is False and models.path == setting["MODEL_PATH"]
        if algorithm == "sft":
            assert not config.data.use_dynamic_bsz
        else:
            validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=False)
            actor, rollout, ref = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "ref"))
            assert rollout.tensor_model_parallel_size == 1 and rollout.dtype == "bfloat16"
            assert not (actor.use_dynamic_bsz or rollout.log_prob_use_dynamic_bsz or ref.log_prob_use_dynamic_bsz)
            # verl cuts a mini-batch of answers, and the batch, into whole micro-batches on each GPU.
            gpus = config.trainer.n_gpus_per_node
            assert actor.ppo_mini_batch_size * rollout.n // gpus % actor.ppo_micro_batch_size_per_gpu == 0
            assert config.data.train_batch_size * rollout.n // gpus % rollout.log_prob_micro_batch_size_per_gpu == 0
        if selection == "lora":
            lora = get_peft_model(AutoModelForCausalLM.from_pretrained(models.path), lora_of(models))
            named = {name.partition(".lora_")[0].rpartition(".")[2] for name, _ in lora.named_parameters()}
            adapted = {"falcon_h1_0_5b": {"in_proj"}, "qwen3_5_0_8b": {"in_proj_qkv", "in_proj_b", "out_proj"}}[model]
            assert {"q_proj", "down_proj"} | adapted <= named and ("out_proj" in named) == ("out_proj" in adapted)
            assert models.lora_rank == (8 if model.startswith("qwen3_5") else 16)
        elif selection == "hybrid_lora":
            assert config.hybrid_lora.lora.rank == (8 if model.startswith("qwen3_5") else 16)


def lora_of(model):
    """PEFT's configuration, as verl makes it of a model's (``FSDPEngine._build_lora_module``)."""
    excluded = OmegaConf.to_container(model).get("exclude_modules")
    return LoraConfig(
        r=model.lora_rank, lora_alpha=model.lora_alpha, target_modules=model.target_modules, exclude_modules=excluded
    )


@pytest.mark.parametrize("model", RECURRENT)
def test_a_recurrent_model_is_probed_with_its_placement_where_its_run_looks(model, tmp_path):
    probe, train = commands("run", model, "gspo", "hybrid_lora", TASK="gsm8k", OUTPUT=str(tmp_path))
    (placed,) = commands("probe", model, "hybrid_lora", "placement.preset=mlp", TASK="gsm8k", OUTPUT=str(tmp_path))
    config = parse(module_and_arguments(placed)[1], ProbeCommandConfig)
    validate(config)
    assert config.placement.preset == "mlp" and placed[: len(probe)] == probe
    assert f"hybrid_lora.allocation={config.output_dir}" in train
    path = yaml.safe_load((RECIPES / "recipe" / "model" / f"{model}.yaml").read_text())["model"]["path"]
    path = os.path.abspath(path) if os.path.dirname(path) == "data/models" else path
    assert config.model.path == path == OmegaConf.select(composed(train), "actor_rollout_ref.model.path")
    rank = OmegaConf.select(composed(train), "hybrid_lora.lora.rank")
    assert config.lora.rank == rank and config.lora.alpha == 2 * rank


def test_the_text_model_of_a_multimodal_checkpoint_is_saved_where_runs_look_for_it(tmp_path, capsys):
    model, folder = tmp_path / "published", tmp_path / "rows" / "models" / "qwen3_5_0_8b"
    text = SIZES | SPECIAL["qwen3_5_text"][1] | {"vocab_size": 60}
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision | {"num_position_embeddings": 16})
    transformers.Qwen3_5ForConditionalGeneration(config).bfloat16().save_pretrained(model)
    whole = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(model, dtype="auto")
    make_char_tokenizer().save_pretrained(model)
    variables = {"DATA": str(tmp_path / "rows"), "SOURCE": str(model)}
    (command,) = commands("prepare_model", "qwen3_5_0_8b", **variables)
    module, arguments = module_and_arguments(command)
    assert module == "recipes.text_model" and arguments == [str(model), str(folder)]
    assert save_text_model(*arguments) == folder
    check_weights(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded).__name__ == "Qwen3_5ForCausalLM" and loaded.dtype == torch.bfloat16
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, whole.eval()(input_ids=ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    assert "is there" in script("prepare_model", "qwen3_5_0_8b", **variables).stdout
    command = commands("run", "qwen3_5_0_8b", "gspo", "full", DATA=str(tmp_path / "rows"))[-1]
    assert f"actor_rollout_ref.model.path={folder}" in command
    done = script("prepare_model", "qwen2_5_3b")
    assert done.returncode == 2 and "used as it is published" in done.stderr
    (command,) = commands("prepare_model", "qwen3_5_0_8b", DATA=str(tmp_path / "none"))
    assert module_and_arguments(command)[1][0] == "Qwen/Qwen3.5-0.8B"


@pytest.mark.parametrize(
    "task, machine", [*(("reasoning", name) for name in parts("machine") if name != "gpu"), ("gsm8k", "a800x8")]
)
def test_tasks_and_machines_pass_the_checks(task, machine, setting):
    from verl.utils.config import validate_config

    (command,) = commands("run", "qwen2_5_1_5b", "grpo", "hybrid_lora", TASK=task, MACHINE=machine, **setting)
    config = checked(composed(command))
    validate_config(config=config, use_reference_policy=True, use_critic=False)
    length = config.actor_rollout_ref.rollout.max_model_len
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if actor.use_dynamic_bsz:
        assert min(actor.ppo_max_token_len_per_gpu, rollout.log_prob_max_token_len_per_gpu) >= length
    assert config.trainer.device == ("cpu" if machine == "cpu" else "cuda")
    assert config.data.train_files.endswith(f"data/{task}/rl/train.parquet")


@pytest.mark.parametrize("machine", parts("sft/machine"))
def test_sft_has_the_same_machines(machine, setting):
    (command,) = commands("run", "qwen2_5_1_5b", "sft", "hybrid_lora", MACHINE=machine, **setting)
    config = checked(composed(command))
    assert not config.data.use_dynamic_bsz or config.data.max_token_len_per_gpu >= config.data.max_length
    assert parts("sft/machine") == [name for name in parts("machine") if name != "gpu"]


def test_several_nodes_join_a_cluster_that_runs(setting, monkeypatch):
    monkeypatch.setenv("NODES", "2")
    (command,) = commands("run", "qwen2_5_7b", "gspo", "hybrid_lora", NODES="2", **setting)
    config = checked(composed(command))
    assert (config.trainer.nnodes, config.ray_kwargs.ray_init.address) == (2, "auto")
    done = script("run", "qwen2_5_7b", "sft", "full", NODES="2", DRY_RUN="1")
    assert done.returncode == 2 and "TORCHRUN" in done.stderr


def test_variables_and_settings_reach_the_run(setting, tmp_path):
    variables = {"RUN": "mine", "OUTPUT": str(tmp_path), "DATA": "rows", "LOGGER": "swanlab", "GPUS": "4"}
    command = commands("run", "qwen2_5_3b", "gspo", "lora", "data.seed=7", "trainer.test_freq=9", **variables)[-1]
    config = composed(command)
    assert config.trainer.logger == ["console", "file", "swanlab"] and config.trainer.n_gpus_per_node == 4
    assert config.trainer.default_local_dir == f"{tmp_path}/mine/checkpoints"
    assert config.data.train_files == os.path.abspath("rows/reasoning/rl/train.parquet")
    assert (config.data.seed, config.trainer.test_freq) == (7, 9), "settings win over parts"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["qwen2_5_1_5b", "gspo"], ["run.sh MODEL ALGORITHM SELECTION"]),
        (["qwen2_5_72b", "gspo", "full"], ["qwen2_5_72b", "qwen2_5_1_5b"]),
        (["qwen2_5_3b", "ppo", "full"], ["ppo", "gspo_narrow_clip"]),
        (["qwen2_5_3b", "sft", "dora"], ["dora", "hybrid_lora"]),
    ],
)
def test_a_mistake_is_told_with_what_there_is(arguments, words):
    done = script("run", *arguments, DRY_RUN="1")
    assert done.returncode == 2 and all(word in done.stderr for word in words) and not done.stdout


@pytest.mark.parametrize("selection", HYBRID)
def test_a_run_without_its_allocation_probes_first(selection, tmp_path):
    probe, train = commands("run", "qwen2_5_7b", "gspo", selection, OUTPUT=str(tmp_path))
    module, arguments = module_and_arguments(probe)
    assert module == "hybrid_lora_plugin.cli.probe"
    config = parse(arguments, ProbeCommandConfig)
    part = yaml.safe_load((RECIPES / "recipe" / "selection" / f"{selection}.yaml").read_text())
    assert config.criterion == part["hybrid_lora"]["criterion"]
    assert bool(config.probe.files) == (config.criterion not in WITHOUT_PROBE)
    assert f"hybrid_lora.allocation={config.output_dir}" in train


def test_a_selection_can_be_made_from_measurements_of_another():
    (command,) = commands("probe", "qwen2_5_7b", "gradient_norm", FROM="outputs/probed")
    module, arguments = module_and_arguments(command)
    config = parse(arguments, AllocateCommandConfig)
    assert module == "hybrid_lora_plugin.cli.allocate"
    assert (config.artifact, config.criterion) == ("outputs/probed", "gradient_norm")


def test_runs_of_verl_alone_have_nothing_to_probe():
    assert len(commands("run", "qwen2_5_7b", "gspo", "lora")) == 1
    done = script("probe", "qwen2_5_7b", "full", DRY_RUN="1")
    assert done.returncode == 2 and "no allocation" in done.stderr


@pytest.mark.parametrize("task", parts("task"))
def test_data_are_prepared_where_runs_look_for_them(task, tmp_path):
    written = {}
    for command in commands("prepare_data", TASK=task, DATA=str(tmp_path), CODE="1"):
        module, arguments = module_and_arguments(command)
        if module == "hybrid_lora_plugin.cli.data":
            config = parse(arguments, DataCommandConfig)
            validate(config)
            written[config.output_dir] = config.format
    for algorithm, form in (("grpo", "rl"), ("sft", "sft")):
        config = composed(commands("run", "qwen2_5_1_5b", algorithm, "full", TASK=task, DATA=str(tmp_path))[-1])
        for file in (config.data.train_files, config.data.val_files):
            assert written[os.path.dirname(file)] == form
    config = composed(commands("run", "qwen2_5_1_5b", "grpo", "full", TASK=task, DATA=str(tmp_path), CODE="1")[-1])
    assert written[os.path.dirname(config.data.train_files[1])] == "rl"


def test_what_is_prepared_stays(tmp_path):
    (tmp_path / "gsm8k" / "rl").mkdir(parents=True)
    (tmp_path / "gsm8k" / "rl" / "README.md").write_text("")
    said = script("prepare_data", TASK="gsm8k", DATA=str(tmp_path), DRY_RUN="1").stdout.splitlines()
    assert len(said) == 2 and "is there" in said[0] and "format=sft" in said[1]


def test_the_best_checkpoint_is_exported_or_the_one_that_is_named(tmp_path):
    variables = {"OUTPUT": str(tmp_path), "RUN": "mine"}
    checkpoints = tmp_path / "mine" / "checkpoints"
    checkpoints.mkdir(parents=True)
    row = ("qwen2_5_1_5b", "gspo", "hybrid_lora")
    done = script("export", *row, **variables)
    assert done.returncode == 2 and "no checkpoint" in done.stderr
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("150")

    def exported(**more):
        (command,) = commands("export", *row, **variables, **more)
        return os.path.basename(parse(module_and_arguments(command)[1], ExportCommandConfig).checkpoint)

    assert exported() == "global_step_150"
    (checkpoints / "best_checkpoint.json").write_text(json.dumps({"step": 100, "value": 0.5}, indent=1))
    assert exported() == "global_step_100" and exported(STEP="50") == "global_step_50"


@pytest.mark.parametrize("algorithm, folder", [("grpo", "global_step_9/actor"), ("sft", "global_step_9")])
def test_runs_of_verl_alone_are_exported_by_verl(algorithm, folder):
    merger, lora = commands("export", "qwen2_5_1_5b", algorithm, "lora", STEP="9")
    assert merger[merger.index("--local_dir") + 1].endswith(folder) and lora[-2] == "recipes.merge_lora"
    assert len(commands("export", "qwen2_5_1_5b", algorithm, "full", STEP="9")) == 1


def test_what_is_exported_is_evaluated_and_served():
    row = ("qwen2_5_1_5b", "gspo", "hybrid_lora")
    (export,), (serve,) = commands("export", *row, STEP="9"), commands("serve", *row)
    folder = parse(module_and_arguments(export)[1], ExportCommandConfig).output_dir
    assert serve[serve.index("--model") + 1] == folder
    for task in parts("task"):
        (export,), (command,) = commands("export", *row, STEP="9", TASK=task), commands("evaluate", *row, TASK=task)
        config = parse(module_and_arguments(command)[1], EvaluateCommandConfig)
        validate(config)
        assert config.model == parse(module_and_arguments(export)[1], ExportCommandConfig).output_dir
    (command,) = commands("evaluate", "qwen2_5_3b", "prompt=io")
    config = parse(module_and_arguments(command)[1], EvaluateCommandConfig)
    assert (config.model, config.prompt) == ("Qwen/Qwen2.5-3B-Instruct", "io")


def test_every_command_of_the_page_is_one(tmp_path):
    """With its variables, in the order of the page; the stand-ins' come after their `export`."""
    page = (RECIPES / "README.md").read_text().replace("\\\n", " ")
    exported, seen = {"OUTPUT": str(tmp_path)}, set()
    for line in re.findall(r"^(?:export |[A-Z_]+=|bash ).*$", page, re.M):
        words = shlex.split(line)
        values = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        if words[0] == "export":
            exported |= {name: value for name, value in values.items() if name != "PYTHON"}
            continue
        at = words.index("bash") if "ray" not in words else len(words) - 5
        name = os.path.basename(words[at + 1]).removesuffix(".sh")
        assert commands(name, *words[at + 2 :], **(exported | values)) or name == "prepare_data"
        seen.add(name)
    assert seen == {path.stem for path in SCRIPTS} - {"settings"}


def test_an_adapter_that_verls_merger_leaves_is_added_to_the_model(tiny_qwen2, tmp_path):
    from peft import PeftModel

    shutil.copytree(tiny_qwen2, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "model" / "lora_adapter")
    tokens = torch.arange(12)[None]
    wanted = adapted(tokens).logits
    assert merge_lora(tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not isinstance(merged, PeftModel) and torch.allclose(merged(tokens).logits, wanted, atol=1e-5)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tiny_qwen2)(tokens).logits, wanted, atol=1e-3)
    assert not merge_lora(tmp_path / "model"), "nor is it added twice"


def test_every_part_that_is_named_anywhere_is_there():
    """Hydra takes a group that does not exist for a value, and says nothing."""
    named = re.compile(r"\+(recipe(?:/[a-z_]+)+)(?:@[\w.]+)?=([a-z0-9_]+)")
    places = ("recipes", "tests", "benchmarks", "docs", "hybrid_lora_plugin")
    ours = [file for place in places for end in ("py", "sh", "md", "yaml") for file in (ROOT / place).rglob(f"*.{end}")]
    found = {pair for file in ours for pair in named.findall(file.read_text(encoding="utf-8"))}
    assert len(found) >= 5
    assert [pair for pair in found if not (ROOT / "recipes" / pair[0] / f"{pair[1]}.yaml").is_file()] == []
