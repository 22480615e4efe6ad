"""The gate of a run: what the installed libraries lack refuses the runs that need it, and no others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS, EVERY_RUN
from hybrid_lora_plugin.verl_backend.contracts.by_source import Sources, check_sources
from tests.support.altered_libraries import altered

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin.verl_backend.doctor import gate  # noqa: E402


def a_run(**hybrid) -> tuple:
    """As much of a composed configuration as the gate looks at, and its ``hybrid_lora`` node."""
    node = HybridLoraConfig(**({"allocation": "allocation"} | hybrid))
    config = {
        "actor_rollout_ref": {"rollout": {"name": "vllm"}, "actor": {"policy_loss": {"loss_mode": "vanilla"}}},
        "algorithm": {"adv_estimator": "grpo"},
        "trainer": {"save_freq": -1, "resume_mode": "auto", "default_local_dir": "/nowhere"},
    }
    return OmegaConf.create(config), node


def without(feature: str) -> tuple:
    """What is missing where one symbol is gone that ``feature`` needs, and as few others as any does."""
    contract = min((c for c in CONTRACTS if feature in c.features), key=lambda c: len(c.features))
    return ((contract, f"{contract.symbol}: gone"),)


@pytest.mark.parametrize(
    ("feature", "setting", "change", "words"),
    [
        ("adapter", {"sync": "adapter"}, {}, ["hybrid_lora.sync: 'adapter'", "hybrid_lora.sync=merge"]),
        (
            "logprobs",
            {"sync_check": "logprobs"},
            {},
            ["hybrid_lora.sync_check: 'logprobs'", "hybrid_lora.sync_check=digest"],
        ),
        (
            "loss",
            {},
            {"actor_rollout_ref.actor.policy_loss.loss_mode": "hybrid_gspo"},
            ["policy_loss.loss_mode: 'hybrid_gspo'", "give gspo"],
        ),
        ("probe", {"allocation": None}, {}, ["hybrid_lora.allocation: None"]),
        ("checkpoint", {}, {"trainer.save_freq": 5}, ["trainer.save_freq: 5", "trainer.save_freq=-1"]),
    ],
)
def test_a_symbol_that_is_gone_refuses_the_runs_that_need_it_and_no_others(feature, setting, change, words):
    missing = without(feature)
    gate.require_features(*a_run(), missing)
    config, hybrid = a_run(**setting)
    for name, value in change.items():
        OmegaConf.update(config, name, value)
    with pytest.raises(ConfigurationError) as caught:
        gate.require_features(config, hybrid, missing)
    said = str(caught.value)
    assert all(word in said for word in [*words, missing[0][1], "hybrid-lora-doctor"]) and "\n" not in said


@pytest.mark.parametrize("feature", EVERY_RUN)
def test_a_symbol_that_every_run_needs_refuses_every_run(feature):
    with pytest.raises(ConfigurationError, match=r"no run works.*gone.*install verl==0.9.1"):
        gate.require_features(*a_run(), without(feature))


def test_a_run_without_rollouts_needs_no_server_and_no_sync():
    """SFT, whose trainer saves its last step whatever the frequency."""
    settings = {"model": {"path": "model"}, "trainer": {"save_freq": "after_each_epoch", "resume_mode": "disable"}}
    config, hybrid = OmegaConf.create(settings), HybridLoraConfig(allocation="allocation", sync="adapter")
    for feature in ("server", "adapter", "logprobs"):
        gate.require_features(config, hybrid, without(feature))
    for feature in ("engine", "registration", "checkpoint"):
        with pytest.raises(ConfigurationError, match="gone"):
            gate.require_features(config, hybrid, without(feature))


def test_policy_probe_and_checkpoints_are_asked_for_by_their_settings(tmp_path):
    config, hybrid = a_run(allocation=None)
    hybrid.probe.objective = "policy"
    assert {need.feature for need in gate.needs_of(config, hybrid)} >= {"merge", "policy_probe"}
    OmegaConf.update(config, "trainer.default_local_dir", str(tmp_path))
    assert "checkpoint" in {need.feature for need in gate.needs_of(config, hybrid)}


def test_another_verl_goes_on_only_where_that_is_allowed_and_nothing_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(gate.registration, "installed_verl", lambda: "0.10.0")
    with pytest.raises(ImportError, match=r"verl 0.10.0 is installed.*hybrid_lora.allow_untested=true"):
        gate.require_features(*a_run(), ())
    assert capsys.readouterr().out == ""
    gate.require_features(*a_run(allow_untested=True), without("adapter"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "warning: verl 0.10.0 is untested" in said and "all but adapter" in said
    # What is missing decides, not the option.
    for feature in ("server", "merge"):
        missing = without(feature) if feature == "server" else without("adapter")
        hybrid = {"allow_untested": True} | ({} if feature == "server" else {"sync": "adapter"})
        with pytest.raises(ConfigurationError, match="gone"):
            gate.require_features(*a_run(**hybrid), missing)


def test_the_gate_looks_once_and_finds_nothing_missing_here():
    assert gate.missing_here() == () and gate.missing_here.cache_info().misses == 1


def test_a_library_that_the_driver_has_not_refuses_nothing(tmp_path, monkeypatch):
    sources = Sources(altered(tmp_path, "verl", "", ""))
    assert check_sources(CONTRACTS, sources), "the others are not there"
    monkeypatch.setattr(Sources, "installed", lambda: sources)
    assert gate.missing_here.__wrapped__() == ()


# -- workers, and runs without the plugin ---------------------------------------------------------------------------


@pytest.mark.verl
def test_a_worker_with_another_verl_stops_unless_that_is_allowed(monkeypatch):
    """The driver has asked about its own libraries, and a worker may have others."""
    from hybrid_lora_plugin.verl_backend import engine_registration

    monkeypatch.setattr(engine_registration.registration, "installed_verl", lambda: "0.10.0")
    monkeypatch.setattr(engine_registration, "HybridLoraEngine", FakeEngine)
    for given in ({"phase": "train"}, {"phase": "train", "allow_untested": False}):
        with pytest.raises(ImportError, match="hybrid_lora.allow_untested=true"):
            engine_registration.EngineForModel(SimpleNamespace(lora={"hybrid": given}))
    allowed = SimpleNamespace(lora={"hybrid": {"phase": "train", "allow_untested": True}})
    assert isinstance(engine_registration.EngineForModel(allowed), FakeEngine)


class FakeEngine:
    """Stands where an engine would be built."""

    def __init__(self, model_config):
        pass


@pytest.mark.parametrize(("version", "hooked"), [("0.9.1", True), ("0.9.7", True), ("0.10.0", False)])
def test_a_plain_run_on_another_verl_is_left_alone(monkeypatch, version, hooked):
    registration, seen = gate.registration, []
    monkeypatch.setattr(registration, "_registered", False)
    monkeypatch.setattr(registration, "installed_verl", lambda: version)
    monkeypatch.setattr(registration.wrapt, "register_post_import_hook", lambda *arguments: seen.append(arguments))
    registration.register()
    assert bool(seen) is hooked
