"""A verl configuration without an allocation: what is checked before the workers probe, and the command of a policy
probe.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from hybrid_lora_plugin import load_allocation  # noqa: E402
from hybrid_lora_plugin.allocation.select import select_modules  # noqa: E402
from hybrid_lora_plugin.candidates import find_candidates, meta_model  # noqa: E402
from hybrid_lora_plugin.config import HybridLoraConfig  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.probing.provenance import model_identity, probe_record  # noqa: E402
from hybrid_lora_plugin.report.artifact import save_allocation  # noqa: E402
from hybrid_lora_plugin.training.checkpoint import CheckpointDescription, save_trained  # noqa: E402
from hybrid_lora_plugin.verl_backend import preflight  # noqa: E402
from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: E402
from hybrid_lora_plugin.verl_backend.probe import policy  # noqa: E402
from hybrid_lora_plugin.verl_backend.probe.policy import probe_overrides  # noqa: E402
from hybrid_lora_plugin.verl_backend.probe.resume import command_config  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.tiny_models import make_char_tokenizer, make_tiny_qwen2, sums, write_jsonl  # noqa: E402
from tests.test_verl_configuration import composed  # noqa: E402

POLICY = "hybrid_lora.probe.objective=policy"


@pytest.fixture
def probing(tiny_qwen2, tmp_path):
    """Overrides of a run that probes first, accepted as they are."""
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(5))
    return [
        "+hybrid_lora=enabled",
        f"actor_rollout_ref.model.path={tiny_qwen2}",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
        "actor_rollout_ref.rollout.name=vllm",
        f"hybrid_lora.probe.files=[{rows}]",
        "hybrid_lora.lora.rank=4",
        "hybrid_lora.budget.ratio=0.3",
    ]


def test_paths_become_absolute_and_the_artifact_goes_beside_the_checkpoints(probing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = composed(*probing, "trainer.default_local_dir=kept", "hybrid_lora.probe.files=[rows.jsonl]")
    hybrid = check_configuration(config)
    assert hybrid.output_dir == config.hybrid_lora.output_dir == str(tmp_path / "kept" / "allocation")
    assert list(config.hybrid_lora.probe.files) == [str(tmp_path / "rows.jsonl")]
    assert config.actor_rollout_ref.model.lora.hybrid.output_dir == hybrid.output_dir, "workers read it there"


REFUSED = {
    "no such rows": (["hybrid_lora.probe.files=[/nowhere.jsonl]"], ["hybrid_lora.probe.files", "/nowhere.jsonl"]),
    "no rows": (["hybrid_lora.probe.files=[]"], ["hybrid_lora.allocation", "hybrid_lora.probe.files"]),
    "rank": (["hybrid_lora.lora.rank=30"], ["hybrid_lora.lora.rank: 30", "give 10 or less"]),
    "budget": (["hybrid_lora.budget.ratio=1e-5"], ["hybrid_lora.budget.ratio", "give at least"]),
    "criterion": (["hybrid_lora.criterion=best"], ["hybrid_lora.criterion", "'best'", "hybrid"]),
    "policy criterion": ([POLICY, "hybrid_lora.criterion=snip"], ["hybrid_lora.criterion", "'snip'", "objective=sft"]),
    "policy length": (
        [POLICY, "hybrid_lora.criterion=alpha", "hybrid_lora.probe.partitions=auto"],
        ["probe.partitions: 'auto'", "measured once", "give a number"],
    ),
    "policy run": ([POLICY, "hybrid_lora.criterion=adalora"], ["hybrid_lora.criterion", "'adalora'", "schedule"]),
    "policy lookahead": (
        [POLICY, "hybrid_lora.criterion=lookahead", "hybrid_lora.probe.lookahead.lr=1e-6"],
        ["hybrid_lora.criterion", "'lookahead'", "once for each module", "objective=sft"],
    ),
    "policy trial": ([POLICY, "hybrid_lora.criterion=trial"], ["hybrid_lora.criterion: 'trial'", "hybrid-lora-trial"]),
    "trial": (
        ["hybrid_lora.criterion=trial", "hybrid_lora.trial.portfolio=[hybird]"],
        ["hybrid_lora.trial.portfolio: 'hybird' is no candidate", "lookahead"],
    ),
    "trial length": (
        ["hybrid_lora.criterion=trial", "hybrid_lora.probe.partitions=auto"],
        ["hybrid_lora.probe.partitions: 'auto'", "20"],
    ),
    "policy warm-up": ([POLICY, "hybrid_lora.probe.warmup_steps=0"], ["hybrid_lora.probe.warmup_steps", "at least 1"]),
    "policy refill": (
        [POLICY, "trainer.v1.sampler.sync_refill_failed_groups=true"],
        ["sync_refill_failed_groups", "false"],
    ),
    "policy sampler": ([POLICY, "trainer.v1.sampler.custom_sampler.path=mine.py"], ["custom_sampler.path", "null"]),
    "policy filter": ([POLICY, "algorithm.filter_groups.enable=true"], ["algorithm.filter_groups.enable"]),
    "policy asynchronous": ([POLICY, "trainer.v1.trainer_mode=colocate_async"], ["trainer.v1.trainer_mode", "sync"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_names_field_value_and_way_out(case, probing):
    mistake, words = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        check_configuration(composed(*probing, *mistake))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("how", ["auto", "resume_path"])
def test_a_run_that_resumes_keeps_the_allocation_of_its_checkpoint(how, probing, tiny_qwen2, tmp_path):
    checkpoints = tmp_path / ("checkpoints" if how == "auto" else "elsewhere")
    step = checkpoints / "global_step_40"
    step.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("40")
    resume = []
    if how == "resume_path":
        resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={step}"]
    with pytest.raises(ConfigurationError, match="checkpoint to resume in .*global_step_40 holds no actor/hybrid_lora"):
        check_configuration(composed(*probing, *resume))
    text = (make_allocation(tiny_qwen2, tmp_path / "kept") / "allocation.json").read_text()
    description = CheckpointDescription(
        base_model=str(tiny_qwen2), rank=4, alpha=32, global_step=40, rounding_mode="stochastic"
    )
    save_trained(step / "actor", {"weight": torch.ones(1)}, description, text)
    config = composed(*probing, *resume)
    assert check_configuration(config).allocation == config.hybrid_lora.allocation
    assert config.hybrid_lora.allocation == str(step / "actor" / "hybrid_lora" / "allocation.json")
    assert not check_configuration(composed(*probing, "trainer.resume_mode=disable")).allocation


def test_a_folder_in_the_artifacts_place_is_refused_before_anything_runs(probing, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train.log").touch()
    for objective in ([], [POLICY]):
        with pytest.raises(ConfigurationError, match="output_dir: .*full exists and is not an empty folder"):
            check_configuration(composed(*probing, *objective, f"hybrid_lora.output_dir={tmp_path / 'full'}"))


def test_an_artifact_that_the_run_left_is_used_or_refused_but_never_replaced(probing, tiny_qwen2, tmp_path):
    make_allocation(tiny_qwen2, tmp_path / "checkpoints" / "allocation")
    with pytest.raises(ConfigurationError, match="hybrid_lora.*has .*; give hybrid_lora.allocation="):
        check_configuration(composed(*probing, "hybrid_lora.probe.seed=77"))


def test_a_criterion_without_a_probe_needs_no_rows(probing):
    check_configuration(composed(*probing, "hybrid_lora.probe.files=[]", "hybrid_lora.criterion=spread"))
    with pytest.raises(ConfigurationError, match="hybrid_lora.probe.objective: 'policy' has no effect here"):
        check_configuration(composed(*probing, "hybrid_lora.probe.files=[]", "hybrid_lora.criterion=random", POLICY))


def test_policy_probe_is_the_runs_own_command_with_a_phase(probing, tmp_path):
    own = ["++data.custom_cls.path=mine.py", "++data.custom_cls.name=Mine", "trainer.experiment_name=mine"]
    settings = [POLICY, "hybrid_lora.probe.warmup_steps=7", "hybrid_lora.probe.partitions=5"]
    config = composed(*probing, *own, *settings, "hybrid_lora.probe.partitions_per_batch=2")
    hybrid = check_configuration(config)
    overrides = [o for o in probe_overrides(config, hybrid) if not o.startswith("hydra.")]
    probe = composed(*probing, *own, *settings, "hybrid_lora.probe.partitions_per_batch=2", *overrides)
    check_configuration(probe)
    assert probe.hybrid_lora.phase == probe.actor_rollout_ref.model.lora.hybrid.phase == "probe"
    assert probe.trainer.total_training_steps == 7 + 3, "5 partitions, 2 a step"
    assert probe.trainer.default_local_dir == f"{hybrid.output_dir}.partial/checkpoints"
    assert probe.hybrid_lora.output_dir == hybrid.output_dir and probe.trainer.experiment_name == "mine-probe"
    assert (probe.data.hybrid_lora.custom_cls_path, probe.data.hybrid_lora.custom_cls_name) == ("mine.py", "Mine")
    assert probe.data.custom_cls.name == "HeldOutPrompts" and not probe.data.shuffle
    config.trainer.experiment_name = "mine-probe"  # the rollout's trace has it too
    kept = ("actor_rollout_ref.rollout", "algorithm", "reward", "actor_rollout_ref.actor")
    for node in kept:
        assert OmegaConf.select(probe, node) == OmegaConf.select(config, node), node
    alone = [*probing, *settings, "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]"]
    overrides = probe_overrides(composed(*alone), hybrid)
    kept = composed(*alone, *(o for o in overrides if not o.startswith("hydra."))).actor_rollout_ref.actor.checkpoint
    assert kept.save_contents == kept.load_contents == ["model", "optimizer", "extra"], "it must be able to go on"


def test_a_policy_probe_that_finds_its_own_length_has_steps_up_to_the_limit(probing):
    auto = [
        "hybrid_lora.probe.warmup_steps=auto", "hybrid_lora.probe.max_warmup_steps=50",
        "hybrid_lora.probe.warmup_check_steps=20", "hybrid_lora.probe.partitions=auto",
        "hybrid_lora.probe.max_partitions=30", "hybrid_lora.probe.partitions_per_batch=2",
    ]  # fmt: skip
    config = composed(*probing, POLICY, *auto)
    hybrid = check_configuration(config)
    given = dict(override.partition("=")[::2] for override in probe_overrides(config, hybrid))
    assert given["trainer.total_training_steps"] == str(50 + 2 * 2 + 15), "two looks of 4 partitions, 2 a step"
    assert given["data.dataloader_num_workers"] == "0", "no prompt is fetched before its step"
    assert given["++data.hybrid_lora.check_every"] == "20" and given["++data.hybrid_lora.check_steps"] == "2"


def test_a_policy_probe_runs_before_the_run_and_once(probing, tmp_path, tiny_qwen2, monkeypatch):
    """With a stand-in for the probe's process: what the driver does around it."""
    commands = []

    def child(command, environment, done=None):
        assert done is None, "its last step is known"
        commands.append((command, environment))
        assert (tmp_path / "checkpoints" / "allocation.partial" / "settings.json").exists()
        make_allocation(tiny_qwen2, tmp_path / "checkpoints" / "allocation")
        return 0, None

    monkeypatch.setattr(policy, "run_child", child)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "verl.trainer.main_ppo", "+hybrid_lora=enabled"])
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    config = composed(*probing, POLICY)
    preflight._check_or_exit(config, may_probe=True)
    ((command, environment),) = commands
    assert command[:4] == [sys.executable, "-m", "verl.trainer.main_ppo", "+hybrid_lora=enabled"]
    assert 'hybrid_lora.phase="probe"' in command
    assert environment["VERL_FILE_LOGGER_PATH"].endswith("metrics.probe.jsonl")
    assert not (tmp_path / "checkpoints" / "allocation.partial").exists()

    with pytest.raises(SystemExit, match="cannot be probed inside a sweep"):
        other = composed(*probing, POLICY, f"trainer.default_local_dir={tmp_path / 'other'}")
        preflight._check_or_exit(other, may_probe=False)


def test_policy_probes_of_several_seeds_become_one_choice_and_a_finished_one_is_not_repeated(
    probing, tmp_path, tiny_qwen2, monkeypatch
):
    """With a stand-in for the probes' processes, each of which leaves a real artifact or is interrupted."""
    commands, outcomes = [], iter(["done", "interrupted", "done"])
    partial = tmp_path / "checkpoints" / "allocation.partial"

    def child(command, environment, done=None):
        commands.append(command)
        if next(outcomes) == "interrupted":
            return 1, signal.SIGTERM
        given = dict(word.partition("=")[::2] for word in command)
        folder, seed = given["hybrid_lora.output_dir"].strip('"'), int(given["hybrid_lora.probe.seed"])
        # What the engine finds its settings by.
        assert json.loads(Path(f"{folder}.partial/settings.json").read_text())["hybrid_lora.probe.seed"] == seed
        values = torch.rand(4, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        probed_artifact(tiny_qwen2, folder, seed, {"sensitivities": values})
        return 0, None

    monkeypatch.setattr(policy, "run_child", child)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "verl.trainer.main_ppo", "+hybrid_lora=enabled"])
    settings = [*probing, POLICY, "hybrid_lora.probe.seeds=[3,5]", "hybrid_lora.probe.partitions=4"]
    with pytest.raises(SystemExit) as caught:
        preflight._check_or_exit(composed(*settings), may_probe=True)
    assert caught.value.code == 143 and (partial / "seed_0" / "allocation.json").is_file()
    preflight._check_or_exit(composed(*settings), may_probe=True)
    assert [command[-2:] for command in commands] == [
        [f"hybrid_lora.probe.seed={seed}", "hybrid_lora.probe.seeds=[]"] for seed in (3, 5, 5)
    ]
    allocation = load_allocation(tmp_path / "checkpoints" / "allocation")
    assert [one.seed for one in allocation.probe.seeds] == [3, 5] and allocation.agreement is not None
    assert set(load_file(tmp_path / "checkpoints" / "allocation" / "sensitivities.safetensors")) == {
        "seed_0/sensitivities", "seed_1/sensitivities",
    }  # fmt: skip
    assert not partial.exists()
    # Another start of the run uses it.
    preflight._check_or_exit(composed(*settings), may_probe=True)
    assert len(commands) == 3
    with pytest.raises(SystemExit, match="hybrid_lora.probe.seeds"):
        preflight._check_or_exit(composed(*settings, "hybrid_lora.probe.seeds=[3,6]"), may_probe=True)


def probed_artifact(model, folder, seed, measurements):
    """As the engine writes it, with what was measured given."""
    hybrid = HybridLoraConfig(output_dir=str(folder))
    hybrid.probe.objective, hybrid.probe.seed, hybrid.probe.partitions = "policy", seed, 4
    hybrid.lora.rank, hybrid.budget.ratio = 4, 0.3
    config = command_config(hybrid, str(model), False)
    plain = meta_model(AutoConfig.from_pretrained(model))
    candidates = find_candidates(plain)
    data = {"settings": json.loads(Path(f"{folder}.partial/settings.json").read_text())}
    allocation = select_modules(
        config, model_identity(str(model), plain, candidates, 1), candidates, measurements, lora_rank=4,
        probe=probe_record(config, "svd_lora", torch.float32, data, hybrid.probe.lr), environment={},
    )  # fmt: skip
    save_allocation(Path(folder), allocation, measurements)


def test_a_probe_that_may_end_early_is_ended_once_its_allocation_is_there(tmp_path):
    """Real processes: the child would go on for a minute."""
    child = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    file, begun = tmp_path / "done", time.monotonic()
    status = policy.run_child([sys.executable, "-c", child, str(file)], dict(os.environ), done=file.exists)
    assert status == (policy.ENDED, None) and time.monotonic() - begun < 30


def test_a_policy_probe_that_fails_stops_the_run(probing, monkeypatch):
    monkeypatch.setattr(policy, "run_child", lambda command, environment, done=None: (3, None))
    with pytest.raises(SystemExit, match="policy probe ended with exit status 3"):
        preflight._check_or_exit(composed(*probing, POLICY), may_probe=True)


def test_an_interrupted_policy_probe_says_how_to_go_on(probing, monkeypatch, capsys):
    monkeypatch.setattr(policy, "run_child", lambda command, environment, done=None: (1, signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        preflight._check_or_exit(composed(*probing, POLICY), may_probe=True)
    assert caught.value.code == 143 and "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        "hybrid_lora.probe.seed=9",
        "hybrid_lora.probe.lr=1e-3",
        "algorithm.adv_estimator=hybrid_group",
        "actor_rollout_ref.rollout.n=8",
        "data.train_batch_size=7",
    ],
)
def test_an_unfinished_policy_probe_does_not_go_on_under_other_settings(change, probing, monkeypatch):
    monkeypatch.setattr(policy, "run_child", lambda command, environment, done=None: (1, signal.SIGINT))
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            preflight._check_or_exit(composed(*probing, POLICY), may_probe=True)
        assert caught.value.code == 130, "the same settings go on"
    with pytest.raises(SystemExit, match=f"{change.partition('=')[0]}: .*allocation.partial was begun with"):
        preflight._check_or_exit(composed(*probing, POLICY, change), may_probe=True)


def test_an_unfinished_policy_probe_does_not_go_on_with_another_model(probing, tiny_qwen2, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "run_child", lambda command, environment, done=None: (1, signal.SIGINT))
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)
    same_path = f"actor_rollout_ref.model.path={model}"
    with pytest.raises(SystemExit):
        preflight._check_or_exit(composed(*probing, POLICY, same_path), may_probe=True)
    make_tiny_qwen2(model, seed=1)
    with pytest.raises(SystemExit, match="checkpoint: .*was begun with"):
        preflight._check_or_exit(composed(*probing, POLICY, same_path), may_probe=True)


@pytest.mark.parametrize(
    "text", ["/x/lr=1e-5/a", "exp (v2)", "a,b", 'say "hi"', "back\\slash\\", "[1]", "{a}", "a b #c", "it's"]
)
def test_any_path_or_name_survives_the_probes_command_line(text):
    (parsed,) = OverridesParser.create().parse_overrides([f"key={policy._quoted(text)}"])
    assert parsed.value() == text and not parsed.is_sweep_override()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_probes_process_does_not_outlive_the_run(signum, tmp_path):
    """Real processes: the child notes the signal it gets and ends."""
    child = (
        "import os, signal, sys, time\n"
        "def note(signum, frame): open(sys.argv[1], 'a').write(f' {signum}'); sys.exit(5)\n"
        "signal.signal(signal.SIGTERM, note); signal.signal(signal.SIGINT, note)\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    parent = (
        f"import os, sys\nfrom hybrid_lora_plugin.verl_backend.probe.policy import "
        f"run_child\nprint(run_child([sys.executable, '-c', {child!r}, sys.argv[1]], dict(os.environ)))\n"
    )
    file = tmp_path / "child"
    process = subprocess.Popen([sys.executable, "-c", parent, str(file)], stdout=subprocess.PIPE, text=True)
    while not file.exists() or not file.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    pid = int(file.read_text().split()[0])
    process.send_signal(signum)
    out, _ = process.communicate(timeout=30)
    if signum != signal.SIGKILL:
        assert out.strip() == f"(5, {int(signum)})"
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child is still there")
    assert file.read_text().split()[1:] == [str(int(signum if signum != signal.SIGKILL else signal.SIGTERM))]


@pytest.mark.verl
def test_main_ppo_says_in_one_line_what_a_policy_probe_lacks(probing, tmp_path, main_ppo):
    run_dir = f"hydra.run.dir={tmp_path / 'run'}"
    done = main_ppo(*probing, POLICY, "hybrid_lora.criterion=snip", run_dir)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("hybrid_lora: ") and "'snip'" in last
    assert "Traceback" not in done.stdout and not (tmp_path / "run").exists()


def test_held_out_prompts_wrap_verls_own_dataset(tmp_path):
    import pandas

    from hybrid_lora_plugin.verl_backend.probe.policy_dataset import HeldOutPrompts, prompt_order
    from hybrid_lora_plugin.verl_backend.probe.policy_schedule import write_ended

    rows = [
        {"prompt": [{"role": "user", "content": f"{i}+1="}], "data_source": "sums", "extra_info": {"index": i}}
        for i in range(30)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    config = composed(
        "+hybrid_lora=enabled", f"data.train_files={tmp_path / 'train.parquet'}", "data.train_batch_size=4",
        "++data.hybrid_lora={warmup_steps: 3, check_every: 0, check_steps: 0, scoring_steps: 2, seed: 1, "
        "shuffle: false, custom_cls_path: null, custom_cls_name: null, folder: null}",
    ).data  # fmt: skip
    training = HeldOutPrompts(config.train_files, make_char_tokenizer(), config)
    assert [training[i]["extra_info"]["index"] for i in range(len(training))] == prompt_order(30, 4, 3, 2, 1)
    # A warm-up that finds its own length: two steps, a look at the first held-out batch, and again.
    config.hybrid_lora.update(warmup_steps=4, check_every=2, check_steps=1, folder=str(tmp_path / "probe"))
    training = HeldOutPrompts(config.train_files, make_char_tokenizer(), config)
    assert len(training) == (4 + 2 + 2) * 4
    order = prompt_order(30, 4, 4, 2, 1)
    warmup, held_out = order[:16], order[16:]

    def dealt():
        return [training[i]["extra_info"]["index"] for i in range(len(training))]

    assert dealt() == warmup[:8] + held_out[:4] + warmup[8:] + held_out[:4] + held_out
    write_ended(tmp_path / "probe", 3)
    assert dealt()[12:20] == held_out, "over after the first look: held-out prompts are next"
    write_ended(tmp_path / "probe", None)
    assert dealt()[12:20] == warmup[8:], "a probe that continues from before knows nothing of it"
    config.train_files = "another.parquet"
    validation = HeldOutPrompts(str(tmp_path / "train.parquet"), make_char_tokenizer(), config)
    assert [validation[i]["extra_info"]["index"] for i in range(len(validation))] == list(range(30))
    assert validation.prompt_key == "prompt", "other attributes are those of the wrapped dataset"
