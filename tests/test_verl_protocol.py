"""Protocol ``rl`` of the evidence harness: probes of one start are shared, and each arm is a command verl takes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.placed import left_frozen, read_placement
from hybrid_lora_plugin.evidence.protocol import Arm, Choice, Run, Start
from hybrid_lora_plugin.evidence.verl_runs import VerlProtocol
from hybrid_lora_plugin.training.apply import apply_allocation
from tests.support.tiny_families import make_family
from tests.support.tiny_models import sums, write_jsonl

START = Start("tiny", "sums", 7)
HEAD = [
    "data.train_files=train.parquet", "data.val_files=train.parquet", "trainer.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(40))


@pytest.fixture
def settings(tiny_qwen2, rows):
    return {
        "measure": "val-core/sums/reward/mean@1",
        "bases": [{"name": "tiny", "path": str(tiny_qwen2)}],
        "tasks": [{"name": "sums", "arguments": ["data.max_prompt_length=24"], "probe_files": [str(rows)]}],
        "arguments": HEAD,
        "probe": {"warmup_steps": 3, "partitions": 4, "batch_size": 4, "max_length": 32, "lr": 1e-3},
        "eval_every": 2,
    }


def protocol(settings, folder):
    made = VerlProtocol(settings, folder, "auto", ["tiny"], ["sums"])
    made.prepare(lambda line: None)
    return made


def run(full, rank, arm="hybrid", **changes):
    return Run(arm, START, Choice(tuple(full), rank), **({"full_lr": 3e-6, "lora_lr": 5e-5, "steps": 4} | changes))


def test_arms_of_one_method_share_a_probe_and_it_is_kept(settings, tmp_path):
    ours = protocol(settings, tmp_path)
    arms = [
        Arm("hybrid", "hybrid", {"criterion": "hybrid", "budget.ratio": 0.3}, rank=4),
        Arm("reversed", "hybrid", {"criterion": "hybrid", "direction": "highest", "budget.ratio": 0.3}, rank=4),
        Arm("gradient", "hybrid", {"criterion": "gradient_norm", "budget.ratio": 0.3}, rank=4),
        Arm("random/1", "hybrid", {"criterion": "random", "budget.ratio": 0.3}, rank=4, draw=1),
    ]
    chosen = ours.choose(START, arms)
    names = [candidate.name for candidate in ours.candidates("tiny")]
    assert set(chosen) == {arm.name for arm in arms} and len(set(chosen.values())) >= 3
    assert all(full and set(full) < set(names) for full in chosen.values())
    (made,) = (tmp_path / "probes").glob("*/*/allocation.json")
    before = made.stat().st_mtime_ns
    assert protocol(settings, tmp_path).choose(START, arms) == chosen
    (still,) = (tmp_path / "probes").glob("*/*/allocation.json")
    assert still == made and still.stat().st_mtime_ns == before


def test_a_selection_that_cannot_be_made_names_its_arm(settings, tmp_path):
    arm = Arm("random:mlp/1", "hybrid", {"criterion": "random", "budget.ratio": 0.001}, rank=4, draw=1)
    with pytest.raises(ConfigurationError, match="^arm random:mlp/1: budget.ratio: 0.001 allows"):
        protocol(settings, tmp_path).choose(START, [arm])


@pytest.mark.verl
def test_each_arm_is_a_command_that_verl_and_the_plugin_take(settings, tmp_path, capsys):
    pytest.importorskip("verl", reason="verl is not installed")
    from hydra import compose, initialize_config_module
    from verl.utils.config import validate_config

    from hybrid_lora_plugin import load_allocation
    from hybrid_lora_plugin.verl_backend.preflight import check_configuration

    ours = protocol(settings, tmp_path)
    names = [candidate.name for candidate in ours.candidates("tiny")]
    runs = {"hybrid": run(names[:2], 4), "lora": run((), 8, "lora"), "full": run(names, 0, "full")}
    for arm, one in runs.items():
        command = ours.arguments(one)
        assert command[:3] == [sys.executable, "-m", "verl.trainer.main_ppo"]
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=command[3:], return_hydra_config=True)
        if "hybrid_lora" in config:
            check_configuration(config)
        validate_config(config=config, use_reference_policy=False, use_critic=False)
        model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
        seeds = config.data.seed, actor.data_loader_seed, actor.fsdp_config.seed, config.actor_rollout_ref.rollout.seed
        assert set(seeds) == {7} and config.trainer.total_training_steps == 4 and config.data.max_prompt_length == 24
        assert ("hybrid_lora" in config) == (arm == "hybrid")
        if arm == "hybrid":
            hybrid = config.hybrid_lora
            assert (hybrid.full_lr, hybrid.lora.lr, hybrid.lora.rank, hybrid.lora.alpha) == (3e-6, 5e-5, 4, 8)
            assert load_allocation(hybrid.allocation).full_names == names[:2]
        else:
            assert (model.lora_rank, actor.optim.lr) == ((8, 5e-5) if arm == "lora" else (0, 3e-6))
            assert model.lora.get("merge", False) == (arm == "lora")


def test_what_comes_of_a_run_is_read_from_verls_metrics(settings, tmp_path):
    """With a program in verl's place that writes what verl writes: the run itself is tried by hand."""
    writes = (
        "import json,os,sys\n"
        "steps=[{'step':s,'data':{'val-core/sums/reward/mean@1':s/4,'perf/total_num_tokens':100}} for s in (0,2,4)]\n"
        "open(os.environ['VERL_FILE_LOGGER_PATH'],'w').write(''.join(json.dumps(s)+'\\n' for s in steps))\n"
        "print(os.environ['MORE'], sys.argv)"
    )
    settings |= {"command": ["python", "-c", writes], "environment": ["MORE=a=b"]}
    ours, seen = protocol(settings, tmp_path), []
    names = [candidate.name for candidate in ours.candidates("tiny")]
    ours.train([run(names[:1], 4), run(names, 0)], lambda one, outcome: seen.append(outcome))
    assert [outcome.curve for outcome in seen] == 2 * [((0, 0.0), (2, 0.5), (4, 1.0))]
    hybrid, full = seen
    assert 0 < hybrid.trainable_parameters < full.trainable_parameters
    weights = full.trainable_parameters
    assert hybrid.flops == 300 * (4 * weights + 2 * hybrid.trainable_parameters) and full.flops == 300 * 6 * weights
    (log,) = {path.read_text().splitlines()[-1].split()[0] for path in tmp_path.glob("runs/*/log.txt")}
    assert log == "a=b"


def test_a_run_that_fails_or_lacks_the_measure_says_where_to_look(settings, tmp_path):
    ours = protocol(settings | {"command": ["python", "-c", "raise SystemExit('no GPU left')"]}, tmp_path / "a")
    with pytest.raises(ConfigurationError, match=r"settings.command: a run ended with status 1;.+log.txt(.|\n)+no GPU"):
        ours.train([run((), 4)], lambda *_: None)
    other = json.dumps({"step": 4, "data": {"val-core/other": 1}})
    writes = f"import os; open(os.environ['VERL_FILE_LOGGER_PATH'], 'w').write({other!r})"
    ours = protocol(settings | {"command": ["python", "-c", writes]}, tmp_path / "b")
    with pytest.raises(ConfigurationError, match=r"settings.measure: .+ which has val-core/other; give one of these"):
        ours.train([run((), 4)], lambda *_: None)


def test_a_measure_that_is_misspelt_is_told_after_the_first_validation(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_lora_plugin.evidence.verl_runs.LOOK_EVERY", 0.1)
    first = json.dumps({"step": 0, "data": {"val-core/sums/reward/mean@1": 0.1, "val-aux/sums": 0.0}})
    writes = (
        "import os, time\n"
        "file = open(os.environ['VERL_FILE_LOGGER_PATH'], 'w')\n"
        # A line is written in two parts, and looked at in between.
        f"line = {first!r}\n"
        "for part in (line[:20], line[20:] + '\\n'):\n"
        "    file.write(part); file.flush(); time.sleep(0.5)\n"
        "{then}"
    )
    command = ["python", "-c", writes.replace("{then}", "time.sleep(300)")]
    ours = protocol(settings | {"measure": "val-core/sums/reward/mean@4", "command": command}, tmp_path / "misspelt")
    with pytest.raises(ConfigurationError) as refused:
        ours.train([run((), 4)], lambda *_: None)
    assert "settings.measure: 'val-core/sums/reward/mean@4' is not in the first step of" in str(refused.value)
    assert "which has val-aux/sums, val-core/sums/reward/mean@1; give one of these" in str(refused.value)
    # One that is there goes on, and is ended when its minutes are over.
    ours = protocol(settings | {"command": command, "minutes": 0.03}, tmp_path / "slow")
    with pytest.raises(ConfigurationError, match="a run ended with status none after 0.03 minutes"):
        ours.train([run((), 4)], lambda *_: None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measure": ""}, "settings.measure: nothing given"),
        ({"measures": "x"}, "settings.measures: unknown"),
        ({"bases": []}, "bases: 'tiny' has no entry in settings.bases, which has none"),
        ({"tasks": [{"name": "other"}]}, "tasks: 'sums' has no entry in settings.tasks, which has other"),
        ({"bases": [{"name": "tiny"}]}, "settings.bases: tiny has no path"),
        ({"environment": ["MORE"]}, "settings.environment: 'MORE'"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, changes, words, tmp_path):
    with pytest.raises(ConfigurationError, match=words.replace(".", r"\.")):
        protocol(settings | changes, tmp_path)


def test_arms_that_verl_cannot_train_are_refused(settings, tmp_path):
    ours = protocol(settings, tmp_path)
    with pytest.raises(ConfigurationError, match="verl trains no DoRA"):
        ours.arguments(Run("dora", START, Choice((), 4, dora=True), 1e-6, 1e-5, 4))
    with pytest.raises(ConfigurationError, match="rank 0 leaves modules without an adapter"):
        ours.arguments(run((), 0))
    # The plugin needs adapters, and verl's list of types knows no layers.
    candidates = ours.candidates("tiny")
    mlp, attention = ([one.name for one in candidates if one.component == kind] for kind in ("mlp", "attention"))
    for choice, said in (
        (Choice(tuple(mlp), 0, frozen=tuple(attention)), "full: verl trains all weights, and the plugin some of them"),
        (Choice(tuple(mlp), 4, frozen=tuple(attention)), "full: verl trains all weights, and the plugin some of them"),
        (Choice(tuple(mlp[:1]), 4, frozen=tuple(mlp[1:])), "is frozen and others of its component are fully tuned"),
        (Choice((), 4, frozen=tuple(mlp[1:])), "_proj is frozen in some layers and adapted in others"),
    ):
        runs = [run((), 4), Run("full", START, choice, 1e-6, 1e-5, 4)]
        with pytest.raises(ConfigurationError, match=said):
            ours.train(runs, lambda *_: pytest.fail("a run began before another was refused"))


# -- placements -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def falcon(tmp_path_factory):
    return make_family("falcon_h1", tmp_path_factory.mktemp("falcon"))


def trained_by(config, path, dtype):
    """The model that verl, or the plugin in it, makes of a configuration, unsharded."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    from hybrid_lora_plugin import load_allocation

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if "hybrid_lora" in config:
        lora = config.hybrid_lora.lora
        return apply_allocation(model, load_allocation(config.hybrid_lora.allocation), rank=lora.rank, alpha=lora.alpha)
    verls = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    return FSDPEngine._build_lora_module(SimpleNamespace(model_config=verls), model)


ARMS = [
    ("qwen2", "lora", "attention"), ("qwen2", "hybrid", "mlp"), ("falcon_h1", "lora", "attention"),
    ("falcon_h1", "lora", "recurrent"), ("falcon_h1", "lora", "all"), ("falcon_h1", "hybrid", "recurrent+mlp"),
    ("falcon_h1", "hybrid", {"attention": "lora", "recurrent": "frozen", "mlp": "auto"}),
]  # fmt: skip


@pytest.mark.verl
@pytest.mark.parametrize(
    ("family", "kind", "placement"), ARMS, ids=lambda value: value if isinstance(value, str) else "by_hand"
)
def test_what_a_placement_freezes_keeps_its_bits_in_the_model_of_its_command(
    family, kind, placement, settings, tiny_qwen2, falcon, tmp_path, capsys
):
    pytest.importorskip("verl", reason="verl is not installed")
    from hydra import compose, initialize_config_module

    from hybrid_lora_plugin.verl_backend.preflight import check_configuration

    path = tiny_qwen2 if family == "qwen2" else falcon
    settings["bases"] = [{"name": "tiny", "path": str(path)}]
    settings["arguments"] = [
        *HEAD,
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    ]
    ours = protocol(settings, tmp_path)
    candidates = ours.candidates("tiny")
    full = {next(one.name for one in candidates if one.component == "mlp")} if kind == "hybrid" else set()
    frozen = left_frozen(kind, read_placement(placement, "placement"), candidates, full)
    one = Run("placed", START, Choice(tuple(full), 4, frozen=frozen), 3e-3, 5e-3, 4)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=ours.arguments(one)[3:], return_hydra_config=True)
    assert ("hybrid_lora" in config) == (kind == "hybrid")
    if kind == "hybrid":
        check_configuration(config)
    for dtype in (torch.float32, torch.bfloat16):
        model = trained_by(config, path, dtype)
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        adapted = {module_of(name) for name in before if "lora_A" in name}
        assert adapted == {one.name for one in candidates} - {*full, *frozen} and adapted
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) == ours._trained_parameters(one)
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(2):  # at first A stays, as B is 0
            tokens = torch.arange(24).reshape(2, 12) % 40
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {module_of(name) for name in moved} == adapted | full
        assert all(".lora_" in name or module_of(name) in full for name in moved)


def module_of(parameter):
    """Plain name of the module that a parameter of a PEFT model belongs to."""
    plain = parameter.removeprefix("base_model.model.").partition(".lora_")[0]
    return plain.removesuffix(".weight").removesuffix(".bias")
