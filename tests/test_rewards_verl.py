"""The reward function of a verl run: its options, its keys, and what is refused before the run starts."""

from __future__ import annotations

import dataclasses
import re

import pytest

from hybrid_lora_plugin.errors import ConfigurationError, RewardError, split_reference
from hybrid_lora_plugin.rewards import sandbox, verl_reward
from hybrid_lora_plugin.rewards.scorer import ScoringLimits
from hybrid_lora_plugin.rewards.terms import excess_length, has_form
from hybrid_lora_plugin.rewards.verl_reward import RewardOptions, compute_score
from tests.support.verl_processes import ROOT, run

KEYS = {"score", "acc", "answered", "format", "timed_out", "length"}


@pytest.mark.parametrize(
    ("source", "response", "gold", "about", "score"),
    [
        ("openai/gsm8k", r"so \boxed{1,080}", "1080", {}, 1.0),
        ("openai/gsm8k", r"so \boxed{1,081}", "1080", None, 0.0),
        ("openai/gsm8k", "so 1080", "1080", None, 0.0),
        ("openai/gsm8k", "", "1080", None, 0.0),
        ("TIGER-Lab/MMLU-Pro", "Answer: J", "J", {"kind": "letter", "options_count": 10}, 1.0),
        ("TIGER-Lab/MMLU-Pro", "Answer: J", "C", {"kind": "letter", "options_count": 4}, 0.0),
        ("my own", r"\boxed{5}", "5", {"kind": "integer", "options_count": 0}, 1.0),
    ],
)
def test_the_keys_are_always_the_same_and_all_numbers(source, response, gold, about, score):
    found = compute_score(source, response, gold, about)
    assert found.keys() == KEYS and all(type(value) is float for value in found.values())
    assert found["score"] == found["acc"] == score
    assert found["length"] == len(response)


def test_form_and_length_count_only_where_they_are_asked_for():
    response = r"\boxed{5}" + " " * 991
    options = {"format_weight": 0.5, "length_weight": 0.2, "length_free": 500, "length_most": 1500}
    assert compute_score("openai/gsm8k", response, "5")["score"] == 1.0
    assert compute_score("openai/gsm8k", response, "5", **options)["score"] == pytest.approx(1.0 + 0.5 - 0.2 * 0.5)
    assert compute_score("openai/gsm8k", response, "6", **options)["acc"] == 0.0


@pytest.mark.parametrize(
    ("kind", "response", "think", "form"),
    [
        ("math", r"\boxed{5}", False, True),
        ("math", r"\boxed{4} \boxed{5}", False, False),
        ("math", r"\boxed{5", False, False),
        ("math", r"<think>\boxed{4}</think>\boxed{5}", False, True),
        ("math", r"\boxed{5}", True, False),
        ("math", r"<think>a</think>\boxed{5}", True, True),
        ("math", r"<think>a</think>\boxed{5}</think>", True, False),
        ("letter", "B it is\nAnswer: B", False, True),
        ("letter", "**Answer: B**\n", False, True),
        ("letter", "Answer: B or C", False, False),
        ("letter", "Answer: B\nor not", False, False),
        ("code", "```python\nx\n```", False, True),
        ("code", "```python\nx\n```\n```python\ny\n```", False, False),
    ],
)
def test_a_form_is_what_the_prompt_asks_for_and_once(kind, response, think, form):
    assert has_form(kind, response, think) is form


def test_the_length_costs_nothing_up_to_one_end_and_all_from_the_other():
    assert [excess_length(n, 100, 200) for n in (0, 100, 150, 200, 900)] == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"formatweight": 1}, "formatweight: no option of this reward; there are code_at_a_time"),
        ({"format_weight": "high"}, "format_weight: 'high'; wanted a finite number"),
        ({"length_weight": -1}, "length_weight: -1; wanted"),
        ({"unsandboxed_code": 1}, "unsandboxed_code: 1; wanted true or false"),
        ({"length_free": 9, "length_most": 9}, "length_most: 9; wanted more than length_free"),
        ({"math_seconds": 0}, "math_seconds: 0; wanted a number above 0"),
        ({"code_bytes": 1.5}, "code_bytes: 1.5; wanted a whole number above 0"),
        ({"code_seconds": "long"}, "code_seconds: 'long'"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(given, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        compute_score("openai/gsm8k", "", "5", **given)
    assert split_reference(str(caught.value))[1] == "reward-option-not-usable"


def test_what_verl_hands_over_for_a_reward_model_is_no_option():
    assert compute_score("openai/gsm8k", "", "5", reward_router_address=None, reward_model_tokenizer=None)["acc"] == 0


def test_a_source_that_nobody_knows_is_refused_by_its_name():
    with pytest.raises(ConfigurationError, match="data_source: 'me/mine' is not known"):
        compute_score("me/mine", "", "5", {"kind": None})


def test_every_source_of_verl_s_own_names_has_a_kind_of_ours():
    assert set(verl_reward.KINDS_OF_SOURCES.values()) == {"math", "integer", "letter", "code"}


def test_every_option_is_on_the_page():
    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    table = page.partition("## Options")[2].partition("## Measured")[0]
    told = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line[:3] == "| `")))
    assert told == {field.name for kind in (RewardOptions, ScoringLimits) for field in dataclasses.fields(kind)}
    assert KEYS <= set(re.findall(r"`(\w+)`", table))


# -- before a run -----------------------------------------------------------------------------------------------------


def run_with(folder, rows, **reward):
    omegaconf = pytest.importorskip("omegaconf")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    given = {"path": "pkg://hybrid_lora_plugin.rewards.verl_reward", "name": "compute_score", **reward}
    return omegaconf.OmegaConf.create(
        {"data": {"train_files": [str(folder / "rows.parquet")]}, "reward": {"custom_reward_function": given}}
    )


def row(kind, source="s"):
    return {"data_source": source, "extra_info": {"kind": kind, "index": 1}}


def check(config):
    from hybrid_lora_plugin.verl_backend.reward_check import check_rewards

    check_rewards(config)


@pytest.fixture
def without_bubblewrap(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    sandbox._interpreter.cache_clear()
    yield
    sandbox._interpreter.cache_clear()


@pytest.mark.usefixtures("without_bubblewrap")
def test_code_is_refused_before_the_run_where_there_is_no_sandbox(tmp_path):
    with pytest.raises(RewardError, match="bubblewrap is missing.*apt-get install.*--security-opt.*unsandboxed_code"):
        check(run_with(tmp_path, [row("integer"), row("code")]))
    # Rows of other kinds need none, nor does another reward function.
    check(run_with(tmp_path, [row("integer")]))
    check(run_with(tmp_path, [row("code")], path="my_reward.py"))
    check(run_with(tmp_path, [row("code")], path=None))


@pytest.mark.usefixtures("without_bubblewrap")
@pytest.mark.parametrize("path", ["pkg://hybrid_lora_plugin/rewards/verl_reward", sandbox.__file__])
def test_the_reward_is_known_by_any_of_its_paths(tmp_path, path):
    path = path.replace("sandbox.py", "verl_reward.py")
    with pytest.raises(RewardError, match="bubblewrap"):
        check(run_with(tmp_path, [row("code")], path=path))


@pytest.mark.usefixtures("without_bubblewrap")
def test_running_programs_bare_is_said_loudly(tmp_path, capsys):
    check(run_with(tmp_path, [row("code")], reward_kwargs={"unsandboxed_code": True}))
    assert "WARNING: unsandboxed_code" in capsys.readouterr().err


def test_options_and_rows_are_refused_before_the_run(tmp_path):
    with pytest.raises(ConfigurationError, match="formt_weight: no option"):
        check(run_with(tmp_path, [row("integer")], reward_kwargs={"formt_weight": 1}))
    with pytest.raises(ConfigurationError, match=r"data.train_files: .*rows.parquet: data_source: 'me/mine'"):
        check(run_with(tmp_path, [row(None, "me/mine")]))
    check(run_with(tmp_path, [{"data_source": "openai/gsm8k"}]))


@pytest.mark.usefixtures("without_bubblewrap")
def test_a_run_that_cannot_judge_its_rows_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    preflight = pytest.importorskip("hybrid_lora_plugin.verl_backend.preflight", reason="hydra is not installed")
    config = run_with(tmp_path, [row("code")])
    # The part of the check that is this package's reward; all of it wants a whole verl configuration.
    monkeypatch.setattr(preflight, "check_configuration", check)
    with pytest.raises(SystemExit) as caught:
        preflight._check_or_exit(config, may_probe=False)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and line.startswith("hybrid_lora: code rewards: bubblewrap is missing")
    assert split_reference(line)[1] == "rewards-not-possible"


THROUGH_VERL = r"""
import asyncio, torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

if __name__ == "__main__":
    config = OmegaConf.create({"reward": {"custom_reward_function": {
        "path": "pkg://hybrid_lora_plugin.rewards.verl_reward", "name": "compute_score",
        "reward_kwargs": {"format_weight": 0.5, "math_seconds": 1.0}}}})

    class Tokenizer:
        texts = [r"\boxed{0.5}", r"\boxed{0.6}", "none", r"\boxed{9^{9^{9^9}}}"]
        def decode(self, ids, skip_special_tokens):
            return self.texts[int(ids[0])]

    def response(number):
        return DataProto.from_dict(
            tensors={"responses": torch.tensor([[number]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)},
            non_tensors={"data_source": ["HuggingFaceH4/MATH-500"], "reward_model": [{"ground_truth": "1/2"}],
                         "extra_info": [{}]})

    async def main():
        manager = NaiveRewardManager(config, Tokenizer(), get_custom_reward_fn(config))
        found = await asyncio.gather(*(manager.run_single(response(number)) for number in [0, 1, 2, 3] * 3))
        print([item["reward_score"] for item in found], [item["reward_extra_info"]["timed_out"] for item in found[:4]],
              len({tuple(item["reward_extra_info"]) for item in found}))

    asyncio.run(main())
"""


@pytest.mark.verl
def test_verl_s_reward_manager_gets_its_scores_in_its_threads():
    pytest.importorskip("math_verify")
    done = run(["-c", THROUGH_VERL])
    assert done.stdout.splitlines()[-1] == f"{[1.5, 0.5, 0.0, 0.5] * 3} [0.0, 0.0, 0.0, 1.0] 1"
