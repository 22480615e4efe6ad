"""The demo's lessons: what each starts from, and the page with LoRA alone beside the hybrid."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict

from hybrid_lora_plugin.allocation import load_allocation
from hybrid_lora_plugin.cli.probe import main as probe
from recipes.demo import lora_run, noisy_adder, report, task
from recipes.demo.__main__ import main, on_the_fly
from recipes.demo.evidence import PROBS_DIFF, Check
from recipes.demo.lessons import LESSONS, hybrid_overrides, run_overrides
from recipes.demo.verl_run import ROOT, Step


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of the last digits, with a base that has hardly learnt."""
    trained = noisy_adder.train_base(steps=4, clean_steps=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(noisy_adder, "train_base", lambda seed, quiet: trained)
        return LESSONS["last_digits"].prepare(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def allocated(files, tmp_path_factory):
    """Folder of an allocation by chance."""
    folder = tmp_path_factory.mktemp("probe") / "allocation"
    options = [f"model.path={files.model}", "criterion=random", "lora.rank=1", f"output_dir={folder}"]
    assert probe(options) == 0
    return folder


@pytest.fixture(scope="module")
def allocation(allocated):
    return load_allocation(allocated)


def test_a_lesson_has_a_model_and_rows_of_its_own(files):
    import pandas

    assert (files.model / "model.safetensors").exists() and files.probe_rows.exists()
    row = pandas.read_parquet(files.rows["validation"]).to_dict("records")[0]
    left, right = row["prompt"][0]["content"].rstrip("=").split("+")
    assert row["reward_model"]["ground_truth"] == left[-1] + right[-1]
    assert set(files.rows) == set(task.SPLITS)


@pytest.mark.parametrize("name", LESSONS)
def test_every_lesson_probes_with_either_objective(name, tmp_path):
    lesson = LESSONS[name]
    rows = tmp_path / "rows.jsonl"
    assert f"hybrid_lora.probe.files=[{rows}]" in on_the_fly(lesson, "sft", rows)
    given = on_the_fly(lesson, "policy", rows)
    assert "hybrid_lora.probe.objective=policy" in given and not any("files" in option for option in given)


def test_lora_alone_has_the_largest_rank_that_does_not_pass_the_hybrid(files, allocation):
    matched = lora_run.rank_of_size(files.model, allocation)
    counts = allocation.parameter_counts()
    assert matched.wanted == counts.trainable
    one = matched.parameters // matched.rank
    assert matched.rank > 1 and matched.parameters <= matched.wanted < matched.parameters + one


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("hybrid", [True, False])
def test_the_runs_of_the_last_digits_pass_the_preflight_and_verls_own_validation(
    files, allocated, allocation, ranks, hybrid
):
    pytest.importorskip("verl")
    from hybrid_lora_plugin.verl_backend.preflight import check_configuration  # noqa: I001
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import validate_config

    lesson = LESSONS["last_digits"]
    options = run_overrides(lesson, files, lesson.steps, ranks)
    if hybrid:
        options = [*hybrid_overrides(lesson), *options, f"hybrid_lora.allocation={allocated}"]
    else:
        options += lora_run.lora_overrides(lesson, lora_run.rank_of_size(files.model, allocation))
    search = f"hydra.searchpath=[file://{ROOT / 'recipes'}]"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[search, *options], return_hydra_config=True)
    if hybrid:
        checked = check_configuration(config)
        assert (checked.full_lr, checked.lora.lr, checked.lora.rank, checked.lora.alpha) == (2e-3, 5e-3, 1, 2)
    with open_dict(config):
        del config["hydra"]
    OmegaConf.resolve(config)
    assert need_reference_policy(config), "the demo checks what becomes of it"
    validate_config(config=config, use_reference_policy=True, use_critic=False)
    # verl asks for whole micro batches, and finds it out after the first rollouts.
    answers = config.data.train_batch_size * config.actor_rollout_ref.rollout.n // ranks
    update = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n // ranks
    assert update % config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu == 0
    for part in ("rollout", "ref"):
        assert answers % config.actor_rollout_ref[part].log_prob_micro_batch_size_per_gpu == 0


@pytest.mark.parametrize("beside", [False, True])
def test_the_page_shows_lora_alone_where_it_was_trained(files, allocation, beside, tmp_path, capsys):
    def run(*values):
        steps = []
        for number, value in enumerate(values):
            metrics = {"val-core/hybrid_lora/last_digits/acc/mean@1": value, "critic/score/mean": value}
            steps.append(Step(number, metrics | ({PROBS_DIFF: 1e-7} if number else {})))
        return steps

    matched = lora_run.rank_of_size(files.model, allocation)
    heatmap = tmp_path / "source.png"
    heatmap.write_bytes(b"png")
    findings = report.Findings(
        steps=run(0.01, 0.3, 0.6),
        allocation=allocation,
        counts="",
        dtype="float32",
        checks=[Check("it works", True, "seen")],
        seconds={"train": 61.0},
        peak_memory=None,
        exported=tmp_path / "exported",
        model=LESSONS["last_digits"].model,
        lora=lora_run.LoraRun(matched, 2e-3, run(0.01, 0.05, 0.25)) if beside else None,
    )
    text = report.write_report(findings, tmp_path, heatmap).read_text()
    assert "A small Qwen2 model that can add, and has to give the last digit" in text
    row = f"| of LoRA alone, rank {matched.rank} | 0.010 before, 0.250 after, with {matched.parameters:,} trainable"
    assert (row in text) is beside
    report.print_summary(findings)
    assert ("of LoRA alone" in capsys.readouterr().out) is beside
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_an_unknown_lesson_and_too_few_steps_are_refused(capsys):
    for options, said in ((["--lesson", "latin"], "invalid choice: 'latin'"), (["--steps", "1"], "--steps: 1 is too")):
        with pytest.raises(SystemExit) as ended:
            main(options)
        assert ended.value.code == 2 and said in capsys.readouterr().err
