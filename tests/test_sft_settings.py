"""``+hybrid_lora=enabled`` on the configuration of verl's SFT trainer: settings have other places, rules do not."""

from __future__ import annotations

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from hydra import compose, initialize_config_dir, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.verl_backend.earlier_checkpoint import TRACKER  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from hybrid_lora_plugin.verl_backend.requirement_rules import RULES  # noqa: E402
from hybrid_lora_plugin.verl_backend.requirements import ENGINE_MODULE  # noqa: E402
from hybrid_lora_plugin.verl_backend.run_kinds import MODEL, REINFORCEMENT_LEARNING, SFT, kind_of_run  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402

ON = "+hybrid_lora=enabled"


@pytest.fixture(scope="module")
def artifact(tiny_qwen2, tmp_path_factory):
    return make_allocation(tiny_qwen2, tmp_path_factory.mktemp("artifact") / "allocation")


@pytest.fixture
def checked(tiny_qwen2, artifact, capsys):
    """Composes as ``sft_trainer`` does, checks as Hydra does; returns the configuration and the lines printed."""

    def check(*overrides, name="sft_trainer_engine", folder=None, job="sft_trainer"):
        arguments = [ON, f"hybrid_lora.allocation={artifact}", f"model.path={tiny_qwen2}", *overrides]
        place = initialize_config_dir(str(folder), version_base=None, job_name=job) if folder else None
        with place or initialize_config_module("verl.trainer.config", version_base=None, job_name=job):
            config = compose(name, overrides=arguments, return_hydra_config=True)
        check_configuration(config)
        return config, capsys.readouterr().out

    return check


def test_the_model_gets_what_the_group_sets_for_an_actor_and_nothing_else_is_added(checked):
    config, said = checked()
    assert "actor_rollout_ref" not in config and config.engine.strategy == "fsdp2"
    model = OmegaConf.to_container(config.model, resolve=True)
    assert (model["lora_rank"], model["lora_alpha"], model["external_lib"]) == (16, 32, ENGINE_MODULE)
    assert model["lora"]["hybrid"]["lora"]["lr"] == 2.5e-5 and model["lora"]["run"] == SFT.name
    # It saves its last step in any case.
    assert model["lora"]["hybrid"]["checkpoint_dir"] == config.trainer.default_local_dir
    assert "learning rates: full modules 1e-06 (the paper's), LoRA 2.5e-05" in said
    assert "exported weights: bfloat16 (no rollout engine has one" in said


@pytest.mark.parametrize("frequency", ["-1", "after_each_epoch"])
def test_starting_afresh_among_older_checkpoints_is_said(checked, tmp_path, frequency):
    afresh = (f"trainer.default_local_dir={tmp_path}", "trainer.resume_mode=disable", f"trainer.save_freq={frequency}")
    assert "WARNING" not in checked(*afresh)[1]
    (tmp_path / TRACKER).write_text("3")
    assert "among those of an earlier run, of which global_step_3 is the last" in checked(*afresh)[1]


def test_rates_and_adapters_of_the_command_keep_their_meaning(checked):
    config, said = checked("optim.lr=2e-5")
    assert (config.hybrid_lora.full_lr, config.hybrid_lora.lora.lr) == (2e-5, 5e-4)
    assert "full modules 2e-05 (optim.lr, command line)" in said
    config, said = checked("optim.lr=2e-5", "model.lora_rank=8")
    assert (config.hybrid_lora.full_lr, config.hybrid_lora.lora.lr) == (8e-7, 2e-5)
    assert (config.model.lora_rank, config.model.lora_alpha) == (8, 16)
    assert "lora.alpha=16 (verl's default of model.lora_alpha)" in said


def test_values_of_a_teams_file_win(checked, tmp_path):
    (tmp_path / "team.yaml").write_text(
        "hydra:\n  searchpath: [pkg://verl.trainer.config]\ndefaults: [sft_trainer_engine, _self_]\n"
        "engine: {strategy: fsdp}\noptim: {lr: 3.0e-6}\nmodel: {external_lib: json}\n"
    )
    config, said = checked(name="team", folder=tmp_path)
    assert config.engine.strategy == "fsdp" and config.hybrid_lora.full_lr == 3e-6
    assert config.model.external_lib == ["json", ENGINE_MODULE] and "optim.lr, team.yaml" in said


def test_exported_weights_have_the_checkpoints_half_type_or_the_one_given(checked, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.tiny_models import make_tiny_qwen2

    half = make_tiny_qwen2(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(half).to(torch.float16).save_pretrained(half)
    config, said = checked(f"model.path={half}")
    assert config.model.lora.rollout_dtype == "float16" and "float16 (the checkpoint's)" in said
    config, said = checked("+model.lora.rollout_dtype=float32")
    assert config.model.lora.rollout_dtype == "float32" and "exported weights: float32 (model.lora.roll" in said


def test_options_for_a_rollout_engine_are_told_to_have_no_effect(checked):
    _, said = checked("hybrid_lora.sync=adapter", "hybrid_lora.sync_timeout=1e6", "hybrid_lora.sync_seed=3")
    line = next(line for line in said.splitlines() if "without effect" in line)
    assert line.endswith("no rollout engine: hybrid_lora.sync, hybrid_lora.sync_timeout")
    assert "without effect" not in checked()[1]


def test_of_several_ranks_the_first_says_it(checked, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert checked("optim.lr=2e-5")[1] == ""
    monkeypatch.setenv("RANK", "0")
    assert "learning rates" in checked("optim.lr=2e-5")[1]


REFUSED = {
    "another engine": (["engine=megatron"], ["engine._target_", "McoreEngineConfig", "engine=fsdp"]),
    "strategy": (["engine.strategy=fsdp_turbo"], ["engine.strategy: 'fsdp_turbo'", "engine.strategy=fsdp2"]),
    "masters": (["engine.model_dtype=bf16"], ["engine.model_dtype: 'bf16'", "fp32"]),
    "optimizer": (["optim.optimizer=Muon"], ["optim.optimizer: 'Muon'", "AdamW"]),
    "rank": (["model.lora_rank=-1"], ["-1", "a LoRA rank of at least 1"]),
    "adapter only": (["+checkpoint.save_lora_only=true"], ["checkpoint.save_lora_only: True"]),
    "another adapter": (["model.lora_adapter_path=/x"], ["model.lora_adapter_path: '/x'", "null"]),
    "Megatron's adapter": (["model.lora.dropout=0.1"], ["model.lora.dropout: 0.1", "hybrid_lora.lora"]),
    "type": (["+model.lora.rollout_dtype=int8"], ["model.lora.rollout_dtype: 'int8'", "model.lora.rollout_dtype=bf"]),
    "rate": (["optim.lr=fast"], ["optim.lr: 'fast'"]),
    "places of an actor": (
        ["actor_rollout_ref.model.lora_rank=8"], ["actor_rollout_ref.model.lora_rank: ", "give model.lora_rank"],
    ),
    "places of a rollout": (
        ["+actor_rollout_ref.rollout.n=8"], ["actor_rollout_ref.rollout.n: ", "verl.trainer.sft_trainer", "leave it"],
    ),
    "policy probe": (
        ["hybrid_lora.allocation=null", "hybrid_lora.probe.objective=policy"],
        ["hybrid_lora.probe.objective", "hybrid_lora.probe.files"],
    ),
    "nothing to probe with": (["hybrid_lora.allocation=null"], ["hybrid_lora.allocation", "hybrid_lora.probe.files"]),
    "groups of one": (
        ["engine.strategy=fsdp", "engine.fsdp_size=1", "trainer.n_gpus_per_node=2"],
        ["engine.fsdp_size: 1", "engine.strategy=fsdp2"],
    ),
    "resuming from HDFS": (["trainer.resume_from_path=hdfs://a/global_step_3"], ["trainer.resume_from_path"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_with_the_names_that_its_user_can_type(case, checked):
    mistake, words = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        checked(*mistake)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert "actor_rollout_ref" not in message or case.startswith("places of")


def test_checkpoints_on_hdfs_are_copied_there_by_verls_trainer_itself(checked):
    checked("trainer.default_hdfs_dir=hdfs://here")


def test_the_trainer_over_ray_is_refused_with_the_one_that_works(checked):
    with pytest.raises(ConfigurationError, match="torchrun -m verl.trainer.sft_trainer"):
        checked(job="sft_trainer_ray")


def test_a_configuration_of_neither_kind_is_refused():
    with pytest.raises(ConfigurationError, match="verl.trainer.main_ppo or torchrun -m verl.trainer.sft_trainer"):
        kind_of_run(OmegaConf.create({"model": {}, "data": {}}))


def test_every_rule_has_a_place_in_sft_or_none_and_reinforcement_learning_keeps_its_names():
    assert all(REINFORCEMENT_LEARNING.place(name) == name for name in RULES)
    places = {name: SFT.place(name) for name in RULES}
    assert places[MODEL + "lora_rank"] == "model.lora_rank" and places["actor_rollout_ref.rollout.name"] is None
    assert not any((place or "").startswith("actor_rollout_ref") for place in places.values())
