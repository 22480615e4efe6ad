"""The demo's task, reward and base model: what the demo run relies on."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # recipes/ is not part of the installed package
    sys.path.insert(0, str(ROOT))

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from recipes.demo import base_model, task  # noqa: E402

TINY = dict(steps=3, batch_size=8, hidden=64, intermediate=64, layers=2, quiet=True)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return base_model.build(tmp_path_factory.mktemp("demo") / "base", seed=3, **TINY)


@pytest.fixture(scope="module")
def compute_score():
    """The reward, loaded by its path as verl does."""
    spec = importlib.util.spec_from_file_location("demo_reward_by_path", ROOT / "recipes/demo/reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


def test_splits_share_no_problem_not_even_mirrored():
    train, validation = ({tuple(sorted(p)) for p in task.pool(split)} for split in task.SPLITS)
    assert train and validation and not train & validation


def test_the_same_seed_draws_the_same_problems_and_another_seed_others():
    assert task.draw("train", 100, seed=1) == task.draw("train", 100, seed=1)
    assert task.draw("train", 100, seed=1) != task.draw("train", 100, seed=2)
    drawn = task.draw("train", 1600)
    assert len(set(drawn)) == 1600
    assert sum(p.carries for p in drawn) == round(1600 * task.CARRY_SHARE)


def test_right_and_flawed_answers_differ_exactly_where_the_units_carry():
    for problem in task.pool("train"):
        assert int(problem.answer) == problem.left + problem.right < 100
        assert (task.forget_carry(problem) != problem.answer) == problem.carries


def test_asking_for_too_many_or_for_an_unknown_split_is_refused():
    with pytest.raises(ConfigurationError, match="count: 5000 .* ask for fewer"):
        task.draw("train", 5000)
    with pytest.raises(ConfigurationError, match="split: 'test'"):
        task.pool("test")


def test_rl_parquet_has_verls_columns_and_a_validation_set_that_no_seed_changes(tmp_path):
    pandas = pytest.importorskip("pandas")
    paths = task.write_rl_parquet(tmp_path / "a", train=20, validation=10, seed=0)
    other = task.write_rl_parquet(tmp_path / "b", train=20, validation=10, seed=1)
    row = pandas.read_parquet(paths["train"]).iloc[3]
    left, right = row["prompt"][0]["content"].rstrip("=").split("+")
    assert row["prompt"][0]["role"] == "user"
    assert row["reward_model"] == {"style": "rule", "ground_truth": str(int(left) + int(right))}
    assert (row["data_source"], row["ability"]) == ("hybrid_lora/arithmetic", "math")
    assert row["extra_info"] == {"split": "train", "index": 3}
    assert paths["validation"].read_bytes() == other["validation"].read_bytes()
    assert paths["train"].read_bytes() != other["train"].read_bytes()


def test_sft_rows_are_chats_with_the_right_answer(tmp_path):
    path = task.write_sft_jsonl(tmp_path / "sft.jsonl", count=12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert eval(user["content"].rstrip("=")) == int(assistant["content"])


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("82", 1.0), (" 82\n", 1.0), ("82<|im_end|>", 1.0), ("82<|im_end|><pad><pad>", 1.0), ("82<|im_end|>83", 1.0),
        ("72", 0.0), ("082", 0.0), ("82.", 0.0), ("82 or 83", 0.0), ("8 2", 0.0), ("820", 0.0), ("", 0.0),
        ("<|im_end|>82", 0.0),
    ],
)  # fmt: skip
def test_reward_is_one_only_for_exactly_the_answer(compute_score, response, score):
    assert compute_score("hybrid_lora/arithmetic", response, "82", {"index": 0}, unknown=1) == {
        "score": score,
        "acc": score,
    }


def test_tokenizer_reloads_with_one_id_per_row_of_the_embedding(tiny_folder):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert len(tokenizer) == AutoConfig.from_pretrained(tiny_folder).vocab_size
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<|im_end|>", None)
    for text in ("37+45=82", "two words, à la carte\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer("37+45=")["input_ids"]) == 6


def test_chat_template_is_a_prefix_with_a_generation_prompt(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    user = {"role": "user", "content": "37+45="}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": "82"}], tokenize=False)
    assert prompt == "<user>37+45=<answer>" and whole == prompt + "82<|im_end|>"
    tokens, labels = base_model.encode_rows(tokenizer, [task.Problem(37, 45)], ["82"])
    assert tokens.shape == labels.shape == (1, 11)
    assert tokenizer.decode(labels[0][labels[0] != -100]) == "82<|im_end|>"


def test_base_model_loads_in_float32_with_untied_embeddings_and_its_stop_token(tiny_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)


def test_a_finished_model_is_not_trained_again_but_other_settings_replace_it(tmp_path):
    folder = base_model.build(tmp_path / "base", **TINY)
    first = (folder / "model.safetensors").stat()
    base_model.build(folder, **TINY)
    assert (folder / "model.safetensors").stat().st_ino == first.st_ino
    base_model.build(folder, seed=1, **TINY)
    assert (folder / "model.safetensors").stat().st_ino != first.st_ino
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]  # nothing temporary is left


def test_the_same_seed_builds_the_same_bytes_and_leaves_the_callers_random_state_alone(tmp_path, tiny_folder):
    state = torch.random.get_rng_state()
    again = base_model.build(tmp_path / "base", seed=3, **TINY)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (again / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigurationError, match="folder: .* give a new or an empty folder"):
        base_model.build(tmp_path, **TINY)
    assert (tmp_path / "thesis.txt").exists()
