"""Qwen2's forward pass for R models at once, which share all but their linear layers.

The same formulas as ``transformers`` (``models/qwen2/modeling_qwen2.py``), with a batched product where that has a
linear layer. All problems have one length, so attention is causal and nothing else; continuations of one prompt that
stand in one row do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: candidate types in the order of a decoder layer, and those that have a bias
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BIASED = ("q_proj", "k_proj", "v_proj")
_PART = {**dict.fromkeys(TYPES[:4], "self_attn"), **dict.fromkeys(TYPES[4:], "mlp")}


def module_name(layer: int, type_: str) -> str:
    """Name of a candidate in the plain model."""
    return f"model.layers.{layer}.{_PART[type_]}.{type_}"


@dataclass
class Branches:
    """Where G continuations of a prompt stand behind it in one row, so that the prompt is computed once for all.

    The row holds the S tokens of the prompt, then the first token of each continuation, then the second of each. A row
    of which less is written is the beginning of it.

    Attributes:
        cos, sin: of the place of each token in its own text, ``[S + G·Q, head_dim]``.
        mask: ``[S + G·Q, S + G·Q]``, 0 where a token sees another and −inf elsewhere.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor


@dataclass
class Weights:
    """The linear layers of R models.

    Attributes:
        matrices: type -> ``[L, R, d_out, d_in]``.
        biases: type -> ``[L, R, d_out]``.
    """

    matrices: dict[str, Tensor]
    biases: dict[str, Tensor]


class SharedParts:
    """What all replicas of one base have in common: embedding, norms, head and positions.

    Attributes:
        layers, heads, kv_heads, head_dim: L, and of the attention.
        matrices: the base's own linear layers, type -> ``[L, d_out, d_in]``.
        biases: type -> ``[L, d_out]``.
    """

    def __init__(self, model: torch.nn.Module, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the weights of a plain ``Qwen2ForCausalLM``.

        Args:
            model: the base.
            positions: S, tokens that go into the model.
            device, dtype: of the copies.
        """
        config: Any = model.config
        self.layers, self.heads, self.kv_heads = (
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps

        def copied(values: Tensor) -> Tensor:
            return values.detach().to(device, dtype).clone()

        def stacked(attribute: str, type_: str) -> Tensor:
            modules = [model.get_submodule(module_name(layer, type_)) for layer in range(self.layers)]
            return torch.stack([copied(getattr(module, attribute)) for module in modules])

        self.matrices = {type_: stacked("weight", type_) for type_ in TYPES}
        self.biases = {type_: stacked("bias", type_) for type_ in BIASED}
        blocks = model.model.layers
        self.before_attention = [copied(block.input_layernorm.weight) for block in blocks]
        self.before_mlp = [copied(block.post_attention_layernorm.weight) for block in blocks]
        self.last_norm = copied(model.model.norm.weight)
        self.embedding, self.head = copied(model.model.embed_tokens.weight), copied(model.lm_head.weight)
        with torch.no_grad():
            # In float32 whatever the dtype, as transformers has it.
            cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
        self.cos, self.sin = copied(cos[0]), copied(sin[0])  # [S, head_dim]
        above = torch.ones(positions, positions, device=device).triu(1).bool()
        self.mask = torch.zeros(positions, positions, device=device, dtype=dtype).masked_fill(above, float("-inf"))

    @property
    def hidden_size(self) -> int:
        """Width."""
        return self.embedding.shape[1]

    def branches(self, prompt: int, continuations: int, length: int) -> Branches:
        """G continuations of up to Q tokens behind prompts of S.

        Args:
            prompt: S.
            continuations: G.
            length: Q, with S at most ``positions`` together.
        """
        device = self.cos.device
        at = torch.arange(prompt + continuations * length, device=device)
        of_prompt = at < prompt
        place = torch.where(of_prompt, at, prompt + (at - prompt) // continuations)
        which = torch.where(of_prompt, -1, (at - prompt) % continuations)
        own = of_prompt | (which[:, None] == which)
        seen = own & (place <= place[:, None])
        mask = torch.zeros(seen.shape, device=device, dtype=self.mask.dtype).masked_fill(~seen, float("-inf"))
        return Branches(self.cos[place], self.sin[place], mask)

    def logits(self, weights: Weights, tokens: Tensor, kept: int, branches: Branches | None = None) -> Tensor:
        """What R models say of the last positions.

        Args:
            weights: of the R models.
            tokens: ``[R, B, S]`` int64, S at most ``positions``; with ``branches`` the beginning of such rows.
            kept: P, positions from the end of which logits are wanted.
            branches: what the rows are, if not one text each.

        Returns:
            ``[R, B, P, V]``.
        """
        replicas, rows, length = tokens.shape
        order = branches or Branches(self.cos, self.sin, self.mask)
        order = Branches(order.cos[:length], order.sin[:length], order.mask[:length, :length])
        matrices = {type_: stack.unbind(0) for type_, stack in weights.matrices.items()}
        biases = {type_: stack.unbind(0) for type_, stack in weights.biases.items()}
        x = functional.embedding(tokens.reshape(replicas, rows * length), self.embedding)  # [R, B·S, H]
        for layer in range(self.layers):

            def project(type_: str, values: Tensor, layer: int = layer) -> Tensor:
                matrix = matrices[type_][layer].transpose(1, 2)
                if type_ in biases:
                    return torch.baddbmm(biases[type_][layer].unsqueeze(1), values, matrix)
                return torch.bmm(values, matrix)

            y = functional.rms_norm(x, (x.shape[-1],), self.before_attention[layer], self.epsilon)
            attended = self._attention(*(project(type_, y) for type_ in BIASED), rows, order)
            x = x + project("o_proj", attended)
            y = functional.rms_norm(x, (x.shape[-1],), self.before_mlp[layer], self.epsilon)
            x = x + project("down_proj", functional.silu(project("gate_proj", y)) * project("up_proj", y))
        x = x.view(replicas, rows, length, -1)[:, :, -kept:]
        x = functional.rms_norm(x, (x.shape[-1],), self.last_norm, self.epsilon)
        # One product a replica, so that none depends on how many there are.
        flat = x.reshape(replicas, rows * kept, -1)
        return torch.bmm(flat, self.head.T.expand(replicas, -1, -1)).view(replicas, rows, kept, -1)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, rows: int, order: Branches) -> Tensor:
        """Attention of ``[R, B·S, heads · D]`` to what ``order`` lets each see; ``[R, B·S, heads · D]``."""
        replicas, length = q.shape[0], len(order.mask)

        def split(values: Tensor, heads: int) -> Tensor:
            return values.view(replicas * rows, length, heads, self.head_dim).transpose(1, 2)

        def rotated(values: Tensor) -> Tensor:
            first, second = values.chunk(2, dim=-1)
            return values * order.cos + torch.cat((-second, first), dim=-1) * order.sin

        def repeated(values: Tensor) -> Tensor:
            return values.repeat_interleave(self.heads // self.kv_heads, dim=1)

        q, k, v = rotated(split(q, self.heads)), rotated(split(k, self.kv_heads)), split(v, self.kv_heads)
        if self.heads != self.kv_heads:
            k, v = repeated(k), repeated(v)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.head_dim**-0.5 + order.mask
        mixed = torch.matmul(scores.softmax(dim=-1), v)  # [R·B, heads, S, D]
        return mixed.transpose(1, 2).reshape(replicas, rows * length, self.heads * self.head_dim)


def answer_log_probs(logits: Tensor, answers: Tensor) -> Tensor:
    """Log-probabilities of given tokens, ``[R, B, P]`` in nats, from ``logits`` ``[R, B, P, V]``."""
    return logits.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
