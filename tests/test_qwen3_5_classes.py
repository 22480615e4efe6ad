"""Qwen3.5 has two classes, which name the same weights differently: everywhere here it is the text model's."""

from __future__ import annotations

import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin.candidates import COMPONENTS  # noqa: E402
from hybrid_lora_plugin.config import ModelConfig  # noqa: E402
from hybrid_lora_plugin.probing.loading import check_model  # noqa: E402
from hybrid_lora_plugin.verl_backend.model_check import checked_model  # noqa: E402
from hybrid_lora_plugin.weight_loading import check_weights  # noqa: E402
from tests.support.tiny_families import SIZES, SPECIAL  # noqa: E402
from tests.support.tiny_models import make_char_tokenizer  # noqa: E402
from tests.support.verl_processes import ROOT  # noqa: E402
from tests.test_model_refusals import MULTIMODAL, WEIGHTS, refusal, run_of  # noqa: E402

pytestmark = pytest.mark.verl


@pytest.fixture
def multimodal(tmp_path):
    """Qwen3.5 as it is on the hub, small: the text model inside of another."""
    torch.manual_seed(0)
    text = SIZES | SPECIAL["qwen3_5_text"][1] | {"vocab_size": 60}
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision | {"num_position_embeddings": 16})
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "multimodal")
    make_char_tokenizer().save_pretrained(tmp_path / "multimodal")
    return model, tmp_path / "multimodal"


def text_alone(folder, out):
    """What the page says: the command in it, with these two folders."""
    page = (ROOT / "docs/models.md").read_text().partition("save its text model alone")[2]
    command = textwrap.dedent(page.partition("```python\n")[2].partition("```")[0])
    exec(command.replace("Qwen/Qwen3.5-0.8B", str(folder)).replace("qwen3.5-0.8b-text", str(out)), {})


def test_the_multimodal_qwen3_5_is_refused_and_its_text_model_saved_as_the_page_says_is_taken(multimodal, tmp_path):
    model, folder = multimodal
    for call, argument in ((checked_model, run_of(folder)), (check_model, ModelConfig(path=str(folder)))):
        text, anchor = refusal(call, argument)
        assert anchor == MULTIMODAL and "save its text model alone (Qwen3_5ForCausalLM)" in text
    text_alone(folder, tmp_path / "text")
    config, candidates = checked_model(run_of(tmp_path / "text"))
    check_model(ModelConfig(path=str(tmp_path / "text")))
    assert config.model_type == "qwen3_5_text" and {one.component for one in candidates} == set(COMPONENTS)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    # One class, under the names that its files have, and that are the allocation's and the rollout engine's.
    assert set(load_file(tmp_path / "text" / WEIGHTS)) == {name for name, _ in loaded.named_parameters()}
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(input_ids=ids).logits)


def test_a_text_model_under_the_names_of_the_multimodal_one_is_refused(multimodal, tmp_path):
    """transformers writes it so by default, and loads it without a word."""
    _, folder = multimodal
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "text")
    for call, argument in ((checked_model, run_of(tmp_path / "text")), (check_weights, tmp_path / "text")):
        text, anchor = refusal(call, argument)
        assert anchor == MULTIMODAL and "model.language_model.embed_tokens.weight" in text
        assert "save_original_format=False" in text
