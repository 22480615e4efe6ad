"""The model of the GPU check: random weights of Qwen2.5-0.5B's shape, and a tokenizer with as many tokens.

    python -m recipes.gpu_check.model FOLDER [--layers 24] [--hidden 896] [--vocabulary 151936]

Nothing is downloaded. It has no skill; what it shares with the real one are its sizes, its tied embeddings, its bf16
checkpoint, and by a scaled last norm how sure it is of the next token. Without that, each of 151,936 tokens would have
a probability of about 1e-5, and no difference between trainer and rollout engine could be seen in them.
"""

from __future__ import annotations

import argparse
import math
import string
import sys
from dataclasses import dataclass
from pathlib import Path

#: nats of the next token, about that of a language model on plain text
ENTROPY = 3.0
_POSITIONS = 1024


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 in the proportions of Qwen2.5-0.5B.

    Attributes:
        layers: decoder layers.
        hidden: width, a multiple of 64, the size of a head.
        vocabulary: tokens.
    """

    layers: int = 24
    hidden: int = 896
    vocabulary: int = 151936

    @property
    def heads(self) -> int:
        """Attention heads of 64."""
        return self.hidden // 64

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: one for seven."""
        return max(1, self.heads // 7)

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return round(self.hidden * 38 / 7 / 16) * 16

    @property
    def initial(self) -> float:
        """Deviation of the random weights: 0.02 at a width of 896, and for every width the same sizes of activations.

        At 0.02 a narrow model's layers would add next to nothing to the embedding of the last token, which tied
        embeddings then make the next one, too.
        """
        return 0.02 * math.sqrt(896 / self.hidden)

    @property
    def norm_scale(self) -> float:
        """Weight of the last norm, at which the entropy of the next token is about ``ENTROPY``.

        Logits of V tokens that are normal with deviation d leave an entropy of ln V − d²/2; unscaled d is the
        deviation of the embeddings times √hidden.
        """
        wanted = math.sqrt(2 * max(0.0, math.log(self.vocabulary) - ENTROPY))
        return wanted / (self.initial * math.sqrt(self.hidden))

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of width {self.hidden}, {self.heads} heads, {self.kv_heads} of keys and values, MLP "
            f"{self.intermediate}, {self.vocabulary:,} tokens, tied embeddings"
        )


def words(count: int) -> list[str]:
    """So many different words of four letters, neighbours unlike each other; the same ones every time."""
    letters = string.ascii_lowercase
    most = len(letters) ** 4
    if count > most:
        raise ValueError(f"count: {count} words asked for, there are {most}")
    # 7919 has no factor in common with 26, so no number is met twice.
    numbers = (index * 7919 % most for index in range(count))
    return ["".join(letters[number // 26**place % 26] for place in (3, 2, 1, 0)) for number in numbers]


def build_tokenizer(vocabulary: int):
    """The demo's tokenizer of 260 tokens, filled up with words to exactly ``vocabulary``.

    Exactly: verl masks what the tokenizer does not know in vLLM and not in the trainer.
    """
    from recipes.demo import base_model

    known = len(base_model.build_tokenizer())
    tokenizer = base_model.build_tokenizer(words(vocabulary - known))
    tokenizer.model_max_length = _POSITIONS
    return tokenizer


def config_of(shape: Shape, tokenizer):
    """The ``Qwen2Config`` of that shape."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=shape.initial,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build(folder: str | Path, shape: Shape, seed: int = 0) -> Path:
    """Write the model in bfloat16 and its tokenizer to a folder."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = build_tokenizer(shape.vocabulary)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(shape, tokenizer), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # transformers leaves them 0, and one that is lost would not show
                parameter.normal_(std=shape.initial)
        model.model.norm.weight.fill_(shape.norm_scale)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.gpu_check.model", description="Write the random model.")
    parser.add_argument("folder", type=Path)
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    build(options.folder, Shape(options.layers, options.hidden, options.vocabulary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
