"""``+hybrid_lora=enabled`` and the recipes on verl's real configuration, and what is refused before Ray starts."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import yaml

pytest.importorskip("verl", reason="verl is not installed")

from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf, open_dict  # noqa: E402

from hybrid_lora_plugin import config as plugin_config  # noqa: E402
from hybrid_lora_plugin.config import HybridLoraConfig  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.sync.modes import SYNC_MODES  # noqa: E402
from hybrid_lora_plugin.verl_backend import registration  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from hybrid_lora_plugin.verl_backend.run_settings import settle  # noqa: E402
from hybrid_lora_plugin.verl_backend.sender import waits  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import ROOT, run  # noqa: E402

RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml"))


def composed(*overrides: str, hydra: bool = True):
    """verl's PPO configuration as ``main_ppo`` composes it, recipes on the search path, with Hydra's node."""
    search = f"hydra.searchpath=[file://{ROOT / 'recipes'}]"
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[search, *overrides], return_hydra_config=hydra)


@pytest.fixture(scope="module")
def artifact(tiny_qwen2, tmp_path_factory):
    return make_allocation(tiny_qwen2, tmp_path_factory.mktemp("artifact") / "allocation")


@pytest.fixture
def accepted(tiny_qwen2, artifact):
    """Overrides that the preflight accepts, for tests to add one mistake to."""
    return ["+hybrid_lora=enabled", f"hybrid_lora.allocation={artifact}", f"actor_rollout_ref.model.path={tiny_qwen2}"]


def test_group_has_the_defaults_of_the_dataclasses():
    node = OmegaConf.to_container(composed("+hybrid_lora=enabled").hybrid_lora)
    assert node == OmegaConf.to_container(OmegaConf.structured(HybridLoraConfig))


def test_group_knows_for_every_sync_mode_who_merges():
    text = (ROOT / "hybrid_lora_plugin/conf/hybrid_lora/enabled.yaml").read_text()
    merge_for = yaml.safe_load(text)["actor_rollout_ref"]["model"]["lora"]["merge_for"]
    assert merge_for == {name: not mode.engine_adapter for name, mode in SYNC_MODES.items()}
    assert tuple(SYNC_MODES) == plugin_config.SYNC_MODES


def test_group_is_found_without_a_search_path_flag_and_sets_what_it_needs():
    config = composed("+hybrid_lora=enabled")
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    assert (model.lora_rank, model.lora_alpha, model.lora.merge) == (16, 32, True)
    assert model.lora.hybrid.sync == "merge" and not actor.get("hybrid")
    assert config.actor_rollout_ref.rollout.load_format == "safetensors"
    assert model.lora.rollout_dtype == config.actor_rollout_ref.rollout.dtype


@pytest.mark.verl
def test_main_ppo_shows_the_group_and_the_command_line_wins(main_ppo):
    overrides = [
        "hybrid_lora.lora.rank=8",
        "actor_rollout_ref.actor.optim.lr=3e-4",
        "actor_rollout_ref.rollout.load_format=dummy",
    ]
    done = main_ppo("--cfg", "job", "+hybrid_lora=enabled", *overrides)
    assert done.returncode == 0, done.stdout
    shown = done.stdout
    config = OmegaConf.create(shown[shown.index("actor_rollout_ref:") :])
    assert config.actor_rollout_ref.actor.optim.lr == 3e-4
    assert config.actor_rollout_ref.rollout.load_format == "dummy"
    assert config.actor_rollout_ref.model.lora_rank == 8, "follows hybrid_lora.lora.rank"


def test_command_line_value_wins_over_the_group():
    assert (
        composed("+hybrid_lora=enabled", "actor_rollout_ref.model.lora_rank=4").actor_rollout_ref.model.lora_rank == 4
    )


def test_configuration_without_the_group_is_verls_own():
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    ours = OmegaConf.to_yaml(composed(hydra=False))
    assert "hybrid_lora" not in ours
    # Composed again from verl's files alone, our search-path plugin taken out.
    plugins = Plugins.instance()
    registered = plugins.plugin_type_to_subclass_list[SearchPathPlugin]
    kept = [plugin for plugin in registered if plugin.__module__.startswith("hydra_plugins.hybrid_lora")]
    assert kept, "Hydra has found the plugin"
    try:
        for plugin in kept:
            registered.remove(plugin)
        assert OmegaConf.to_yaml(composed(hydra=False)) == ours
    finally:
        registered.extend(kept)


def test_accepted_overrides_pass_the_preflight_and_the_path_becomes_absolute(accepted, artifact, monkeypatch):
    monkeypatch.chdir(artifact.parent)
    config = composed(*accepted, f"hybrid_lora.allocation={artifact.name}")
    check_configuration(config)
    assert config.actor_rollout_ref.model.lora.hybrid.allocation == str(artifact)


REFUSED = {
    "missing artifact": (["hybrid_lora.allocation=/nowhere/at/all"], ["/nowhere/at/all", "hybrid-lora-probe"]),
    "no artifact and nothing to probe with": (
        ["hybrid_lora.allocation=null"],
        ["hybrid_lora.allocation", "hybrid-lora-probe", "hybrid_lora.probe.files"],
    ),
    "unknown option": (["+hybrid_lora.warp=9"], ["warp", "docs/configuration.md"]),
    "unknown nested option": (["+hybrid_lora.lora.rnak=9"], ["rnak"]),
    "wrong type": (["hybrid_lora.full_lr=fast"], ["hybrid_lora.full_lr", "fast"]),
    "rank 0": (["hybrid_lora.lora.rank=0"], ["hybrid_lora.lora.rank", "0", "at least 1"]),
    "rank -3 for verl": (["actor_rollout_ref.model.lora_rank=-3"], ["actor_rollout_ref.model.lora_rank", "-3"]),
    "learning rate 0": (["hybrid_lora.full_lr=0"], ["hybrid_lora.full_lr"]),
    "strategy": (
        ["actor_rollout_ref.actor.strategy=veomni"],
        ["actor_rollout_ref.actor.strategy", "'veomni'", "fsdp2 or fsdp"],
    ),
    "FSDP1 in groups of one": (
        [
            "actor_rollout_ref.actor.strategy=fsdp",
            "actor_rollout_ref.actor.fsdp_config.fsdp_size=1",
            "trainer.n_gpus_per_node=2",
        ],
        ["actor_rollout_ref.actor.fsdp_config.fsdp_size", "1", "fsdp2"],
    ),
    "frozen type": (["hybrid_lora.frozen_dtype=int8"], ["hybrid_lora.frozen_dtype", "'int8'", "auto"]),
    "sync mode": (
        ["hybrid_lora.sync=telepathy"],
        ["hybrid_lora.sync", "'telepathy'", "merge, sparse_merge, adapter, receiver_merge"],
    ),
    "sync check": (["hybrid_lora.sync_check=maybe"], ["hybrid_lora.sync_check", "'maybe'", "digest"]),
    "sync timeout": (["hybrid_lora.sync_timeout=0"], ["hybrid_lora.sync_timeout", "above 0"]),
    "sync probe limit": (["hybrid_lora.sync_logprob_limit=0"], ["hybrid_lora.sync_logprob_limit", "above 0"]),
    "sync policy limit": (["hybrid_lora.sync_policy_limit=1"], ["hybrid_lora.sync_policy_limit", "between 0 and 1"]),
    "checkpoint engine that casts": (
        ["actor_rollout_ref.rollout.checkpoint_engine.backend=mooncake"],
        ["checkpoint_engine.backend", "'mooncake'", "nccl"],
    ),
    "checkpoint engine that sends shards": (
        ["actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded"],
        ["checkpoint_engine.backend", "'delta_sharded'", "nccl"],
    ),
    "prefill and decode apart": (["actor_rollout_ref.rollout.disaggregation.enabled=true"], ["disaggregation.enabled"]),
    "quantized rollout": (["actor_rollout_ref.rollout.quantization=fp8"], ["rollout.quantization", "'fp8'", "null"]),
    "own worker extension": (
        ["+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=a.B"],
        ["worker_extension_cls", "'a.B'", "null"],
    ),
    "quantization past verl": (
        ["+actor_rollout_ref.rollout.engine_kwargs.vllm.quantization=fp8"],
        ["engine_kwargs.vllm.quantization", "'fp8'", "null and use actor_rollout_ref.rollout.quantization"],
    ),
    "workers past verl": (
        ["+actor_rollout_ref.rollout.engine_kwargs.vllm.data_parallel_size=2"],
        ["engine_kwargs.vllm.data_parallel_size", "2", "give 1"],
    ),
    "checkpoints on HDFS": (
        ["trainer.default_hdfs_dir=hdfs://here"],
        ["trainer.default_hdfs_dir", "'hdfs://here'", "give null", "trainer.checkpoint_callback_class"],
    ),
    "checkpoints in no file system": (
        ["trainer.default_local_dir=hdfs://here"], ["trainer.default_local_dir", "'hdfs://here'", "a folder"],
    ),
    "resuming from HDFS": (
        ["trainer.resume_mode=resume_path", "trainer.resume_from_path=hdfs://here/global_step_3"],
        ["trainer.resume_from_path", "global_step_3", "a folder"],
    ),
    "waits above NCCL's": (
        ["hybrid_lora.sync_timeout=600"],
        ["sync_timeout: 600", "940 s", "nccl_timeout=600", "sync_timeout=373 or less", "nccl_timeout above 940"],
    ),
    "waits above NCCL's with a fixed prompt": (
        ["hybrid_lora.sync_timeout=300", "hybrid_lora.sync_check=logprobs"],
        ["sync_timeout: 300", "600 s", "sync_timeout=299 or less", "nccl_timeout above 600"],
    ),
    "no wait below NCCL's": (
        ["actor_rollout_ref.nccl_timeout=40"],
        ["sync_timeout: 240", "400 s", "nccl_timeout=40", "give actor_rollout_ref.nccl_timeout above 400"],
    ),
    "dummy weights for a partial sync": (
        ["hybrid_lora.sync=receiver_merge", "actor_rollout_ref.rollout.load_format=dummy"],
        ["load_format", "'dummy'", "hybrid_lora.sync=receiver_merge", "safetensors", "hybrid_lora.sync=merge"],
    ),
    "another product in the engine": (
        ["hybrid_lora.sync=receiver_merge", "actor_rollout_ref.rollout.full_determinism=true"],
        ["full_determinism", "hybrid_lora.sync=receiver_merge", "hybrid_lora.sync=merge"],
    ),
    "changes of 32 bits": (
        ["hybrid_lora.sync=sparse_merge", "actor_rollout_ref.rollout.dtype=float32"],
        ["rollout_dtype", "'float32'", "hybrid_lora.sync=sparse_merge", "bfloat16", "hybrid_lora.sync=merge"],
    ),
    "data-parallel engines": (
        ["actor_rollout_ref.rollout.data_parallel_size=2"],
        ["data_parallel_size", "2", "replicas"],
    ),
    "fully sharded adapter": (
        ["hybrid_lora.sync=adapter", "+actor_rollout_ref.model.lora.fully_sharded_loras=true"],
        ["fully_sharded_loras", "hybrid_lora.sync=adapter", "hybrid_lora.sync=receiver_merge"],
    ),
    "rank beyond vLLM's": (
        ["hybrid_lora.sync=adapter", "hybrid_lora.lora.rank=513"],
        ["lora_rank", "513", "512", "hybrid_lora.sync=receiver_merge"],
    ),
    "merge for an adapter": (
        ["hybrid_lora.sync=adapter", "actor_rollout_ref.model.lora.merge=true"],
        ["lora.merge", "True", "hybrid_lora.sync=adapter"],
    ),
    "other rollout": (["actor_rollout_ref.rollout.name=sglang"], ["rollout.name", "vllm"]),
    "bf16 masters": (["actor_rollout_ref.actor.fsdp_config.model_dtype=bf16"], ["model_dtype", "fp32"]),
    "adapter only": (["+actor_rollout_ref.actor.checkpoint.save_lora_only=true"], ["save_lora_only", "false"]),
    "hybrid node removed": (["actor_rollout_ref.model.lora.hybrid=null"], ["model.lora.hybrid", "plain LoRA"]),
    "rollout dtype": (["actor_rollout_ref.rollout.dtype=auto"], ["rollout_dtype", "'auto'", "bfloat16"]),
    "no merge": (["actor_rollout_ref.model.lora.merge=false"], ["lora.merge", "False", "hybrid_lora.sync=merge"]),
    "switched off": (["hybrid_lora.enabled=false"], ["hybrid_lora.enabled", "leave that argument out"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_names_field_value_and_way_out(case, accepted):
    mistake, words = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        check_configuration(composed(*accepted, *mistake))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("sync", "merge"), [("merge", True), ("sparse_merge", True), ("adapter", False), ("receiver_merge", True)]
)
def test_sync_mode_sets_verls_own_switch_for_adapters(sync, merge, accepted):
    config = composed(*accepted, f"hybrid_lora.sync={sync}")
    check_configuration(config)
    assert config.actor_rollout_ref.model.lora.merge is merge


@pytest.mark.parametrize("check", ["digest", "logprobs", "off"])
def test_every_wait_of_a_sync_ends_before_verls_own_limit_by_default(check, accepted):
    config = composed(*accepted, f"hybrid_lora.sync_check={check}")
    assert waits.longest(config.hybrid_lora.sync_timeout, check == "logprobs") < config.actor_rollout_ref.nccl_timeout
    check_configuration(config)
    # Apart by more than what a machine needs to notice.
    check_configuration(composed(*accepted, f"hybrid_lora.sync_check={check}", "actor_rollout_ref.nccl_timeout=540"))


def test_workers_are_told_where_checkpoints_go_if_there_will_be_any(accepted):
    for frequency, wanted in ((-1, None), (0, None), (5, "some/where")):
        config = composed(*accepted, f"trainer.save_freq={frequency}", "trainer.default_local_dir=some/where")
        check_configuration(config)
        assert config.actor_rollout_ref.model.lora.hybrid.checkpoint_dir == wanted


def test_a_clip_range_that_cannot_act_is_told(accepted, capsys):
    def told(*overrides):
        check_configuration(composed(*accepted, *overrides))
        return "ppo_epochs=1) and the ratio is 1: the clip range" in capsys.readouterr().out

    actor = "actor_rollout_ref.actor"
    once = ["data.train_batch_size=64", f"{actor}.ppo_mini_batch_size=64"]
    assert told(*once) and told(*once, f"{actor}.policy_loss.loss_mode=hybrid_gspo")
    assert not told(once[0], f"{actor}.ppo_mini_batch_size=32") and not told(*once, f"{actor}.ppo_epochs=2")
    assert not told(*once, "algorithm.rollout_correction.bypass_mode=true")


def test_raising_both_limits_is_accepted(accepted):
    check_configuration(composed(*accepted, "hybrid_lora.sync_timeout=600", "actor_rollout_ref.nccl_timeout=1000"))


@pytest.mark.parametrize("module", ["json", "[json]", "[json,hybrid_lora_plugin.verl_backend.engine_registration]"])
def test_own_checkpoint_engine_and_library_stay_in_front_of_our_module(module, accepted):
    node, ours = "actor_rollout_ref.rollout.checkpoint_engine", "hybrid_lora_plugin.verl_backend.engine_registration"
    own = [f"{node}.backend=mine", f"{node}.custom_backend_module={module}"]
    config = composed(*accepted, *own, f"actor_rollout_ref.model.external_lib={module}")
    check_configuration(config)
    assert config.actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module == ["json", ours]
    assert config.actor_rollout_ref.model.external_lib == ["json", ours]


@pytest.mark.parametrize("sync", ["merge", "sparse_merge"])
def test_merge_sync_needs_no_weights_of_the_engine(sync, accepted):
    check_configuration(composed(*accepted, f"hybrid_lora.sync={sync}", "actor_rollout_ref.rollout.load_format=dummy"))


def test_unreadable_artifact_is_refused(accepted, tmp_path):
    (tmp_path / "allocation.json").write_text("{ not json")
    with pytest.raises(ConfigurationError, match="allocation.json"):
        check_configuration(composed(*accepted, f"hybrid_lora.allocation={tmp_path}"))


def test_artifact_of_another_model_is_refused(accepted, tmp_path):
    other = make_tiny_qwen2(tmp_path / "other", layers=3)
    with pytest.raises(ConfigurationError, match="artifact of another model"):
        check_configuration(composed(*accepted, f"actor_rollout_ref.model.path={other}"))


def test_artifact_with_a_contradiction_is_refused(accepted, artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "edited")
    path = tmp_path / "edited" / "allocation.json"
    raw = json.loads(path.read_text())
    next(module for module in raw["modules"] if module["assignment"] == "lora")["assignment"] = "full"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigurationError, match="budget.used"):
        check_configuration(composed(*accepted, f"hybrid_lora.allocation={tmp_path / 'edited'}"))


@pytest.mark.parametrize("version", ["0.9.0", "0.10.0", "0.8.2", "1.0"])
def test_verl_outside_the_supported_range_is_refused(version):
    with pytest.raises(ImportError, match=f"verl {version} is installed.*install verl==0.9.1"):
        registration.require_supported_verl(version)


def test_installed_verl_is_supported():
    registration.require_supported_verl(registration.installed_verl())


@pytest.mark.verl
@pytest.mark.parametrize("case", ["missing artifact", "strategy"])
def test_main_ppo_stops_with_one_line_and_writes_nothing(case, accepted, tmp_path, main_ppo):
    mistake, words = REFUSED[case]
    done = main_ppo(*accepted, *mistake, f"hydra.run.dir={tmp_path / 'run'}")
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("hybrid_lora: ") and all(word in last for word in words)
    assert "Traceback" not in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.verl
def test_worker_without_the_plugin_stops_instead_of_training_plain_lora(tiny_qwen2):
    """A worker whose plugin cannot register fails where verl reads the model, with the reason."""
    code = (
        "import sys, verl.utils.device\n"
        "import importlib.metadata\n"
        "from hybrid_lora_plugin import verl_backend\n"
        "sys.modules['hybrid_lora_plugin.verl_backend.registration'] = None\n"
        "from verl.workers.config import HFModelConfig\n"
        f"HFModelConfig(path={str(tiny_qwen2)!r}, "
        "external_lib='hybrid_lora_plugin.verl_backend.engine_registration')\n"
    )
    environment = {
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "VERL_USE_EXTERNAL_MODULES": "hybrid_lora_plugin.verl_backend.cpu.platform",
    }
    done = run(["-c", code], check=False, **environment)
    assert done.returncode != 0 and "hybrid_lora_plugin.verl_backend.registration" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_composes_and_passes_verls_own_validation(name, tiny_qwen2, artifact):
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = composed(
        "+hybrid_lora=enabled", f"+recipe={name}", f"hybrid_lora.allocation={artifact}",
        f"actor_rollout_ref.model.path={tiny_qwen2}",
    )  # fmt: skip
    check_configuration(config)
    with open_dict(config):
        OmegaConf.resolve(config)
    validate_config(config=config, use_reference_policy=True, use_critic=False)
    for node in (config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.algorithm):
        assert dataclasses.is_dataclass(omega_conf_to_dataclass(node))
    actor = config.actor_rollout_ref.actor
    assert (actor.policy_loss.loss_mode, config.algorithm.adv_estimator) == ("hybrid_gspo", "hybrid_group")
    assert actor.use_kl_loss and actor.kl_loss_coef == 0.01
    steps_per_batch = config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
    assert steps_per_batch > 1, "with one update a batch the ratio is 1 and the clip range is inert"


def test_paper_recipe_has_the_papers_settings(artifact):
    config = composed("+hybrid_lora=enabled", "+recipe=qwen2_5_1_5b_gspo_8xa800", f"hybrid_lora.allocation={artifact}")
    settle(config)
    actor, rollout, model = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "model"))
    assert (rollout.temperature, rollout.n, actor.clip_ratio_low, actor.clip_ratio_high) == (1.0, 4, 0.2, 0.2)
    assert (config.hybrid_lora.lora.lr, config.hybrid_lora.full_lr, model.lora_rank) == (2.5e-5, 1e-6, 16)
    assert (config.hybrid_lora.budget.ratio, config.hybrid_lora.probe.warmup_steps) == (0.1, 500)
    assert (config.trainer.test_freq, config.trainer.n_gpus_per_node) == (50, 8)


def test_configuration_page_is_what_the_dataclasses_say():
    from hybrid_lora_plugin.cli.reference import configuration_page

    assert (ROOT / "docs/configuration.md").read_text() == configuration_page(), "run `make docs`"
