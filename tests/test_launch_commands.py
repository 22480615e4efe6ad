"""Launch commands of verl, as people write them: each gets the verdict that its data and the page tell."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from omegaconf import OmegaConf, open_dict  # noqa: E402

from hybrid_lora_plugin.errors import split_reference  # noqa: E402
from hybrid_lora_plugin.verl_backend.run_kinds import MODEL, kind_of_run  # noqa: E402
from tests.support.compatibility_page import compatibility_page  # noqa: E402
from tests.support.hydra_bases import compose_by_hydra  # noqa: E402
from tests.support.launch_commands import DEFAULTS, SETTLED, Workplace, read_kinds, settled  # noqa: E402
from tests.support.verl_processes import ROOT  # noqa: E402

KINDS = read_kinds()
COMMANDS = {command.name: command for kind in KINDS for command in kind.commands}
REINFORCEMENT_LEARNING = [name for name, command in COMMANDS.items() if "sft_trainer" not in command.entry_point]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def verdict_of(workplace):
    """Verdict by a command's name, each found once."""
    found = {}

    def verdict(name):
        if name not in found:
            found[name] = workplace.judge(COMMANDS[name])
        return found[name]

    return verdict


def test_the_corpus_has_many_commands_of_distinct_names():
    assert len(COMMANDS) == sum(len(kind.commands) for kind in KINDS) >= 60


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_verdict_that_is_expected_of_it(name, verdict_of):
    command, verdict = COMMANDS[name], verdict_of(name)
    if command.refused is not None:
        text, anchor = split_reference(verdict.line)
        assert anchor == command.refused["see"], verdict.line or settled(verdict.config)
        assert "\n" not in text and all(word in text for word in command.refused["words"]), text
        return
    assert verdict.accepted, verdict.line
    wanted = {key: value for key, value in (DEFAULTS | command.accepted).items() if key in SETTLED}
    assert settled(verdict.config) == wanted
    # As workers get them.
    hybrid = kind_of_run(verdict.config).select(verdict.config, MODEL + "lora.hybrid")
    assert (hybrid.full_lr, hybrid.lora.lr, hybrid.lora.rank) == (wanted["full_lr"], wanted["lora_lr"], wanted["rank"])
    printed = "\n".join(verdict.said)
    assert "learning rates: " in printed and all(part in printed for part in command.accepted.get("said", ()))
    untouched = command.accepted.get("untouched", {})
    assert {full: OmegaConf.select(verdict.config, full) for full in untouched} == untouched


@pytest.mark.parametrize("name", REINFORCEMENT_LEARNING)
def test_a_command_is_one_that_verls_own_check_takes(name, verdict_of, monkeypatch):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    for variable, value in COMMANDS[name].environment.items():
        monkeypatch.setenv(variable, value)
    config = copy.deepcopy(verdict_of(name).config)
    with open_dict(config):
        del config["hydra"]
        # What verl 0.9.1 no longer has, and a model that it would load.
        config.actor_rollout_ref.ref.pop("model", None)
        config.critic.pop("model")
        # Otherwise it asks vLLM for the ranks that it knows, whose import takes longer than all of these tests.
        config.actor_rollout_ref.model.lora.merge = True
    critic = need_critic(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=critic)
    for node in (config.actor_rollout_ref.rollout, config.algorithm, config.distillation):
        omega_conf_to_dataclass(node)


@pytest.mark.parametrize("name", ["grpo", "team-two-files", "megatron"])
def test_commands_are_composed_as_hydra_composes_them(name, workplace, verdict_of, monkeypatch):
    verdict_of(name)  # writes its files
    monkeypatch.chdir(workplace.folder)
    for variable, value in (COMMANDS[name].environment | {"PWD": str(workplace.folder)}).items():
        monkeypatch.setenv(variable, value)
    start = workplace.start_and_overrides(COMMANDS[name])
    ours, hydras = workplace.bases.compose(*start), compose_by_hydra(*start)
    assert OmegaConf.to_yaml(ours) == OmegaConf.to_yaml(hydras)


def test_the_page_tells_these_verdicts(verdict_of):
    page = compatibility_page(KINDS, {name: verdict_of(name) for name in COMMANDS})
    assert (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8") == page, "run `make docs`"
