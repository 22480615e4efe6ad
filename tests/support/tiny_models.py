"""Tiny real checkpoints for tests: a random Qwen2 with a character-level tokenizer and a chat template."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"


def make_char_tokenizer():
    """A ``PreTrainedTokenizerFast`` with one token a character; end of turn is the end token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_qwen2_config(vocab_size: int, layers: int = 2, hidden: int = 32, heads: int = 4, kv_heads: int = 2, **changes):
    """A ``Qwen2Config`` of that size; MLP width is twice the hidden size."""
    from transformers import Qwen2Config

    values = dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return Qwen2Config(**(values | changes))


def make_tiny_qwen2(
    folder: str | Path,
    layers: int = 2,
    hidden: int = 32,
    seed: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    on_grid: bool = False,
    **changes,
) -> Path:
    """Save a random Qwen2 and its tokenizer to ``folder``; ``vocab_size == len(tokenizer)``.

    Args:
        folder: where to.
        layers, hidden, heads, kv_heads: sizes.
        seed: of the weights; biases are random too, so that a forgotten bias shows.
        on_grid: with weights that bfloat16 holds as they are, stored in float32 all the same.
        changes: more fields of ``Qwen2Config``.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    tokenizer = make_char_tokenizer()
    config = tiny_qwen2_config(
        len(tokenizer),
        layers,
        hidden,
        heads,
        kv_heads,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.02)
            if on_grid:
                parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(file, rows):
    """Write rows as JSONL; returns the path as text."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sums(count):
    """``count`` distinct chat rows of small additions."""
    return [
        {"messages": [{"role": "user", "content": f"{i}+{2 * i}="}, {"role": "assistant", "content": str(3 * i)}]}
        for i in range(count)
    ]
