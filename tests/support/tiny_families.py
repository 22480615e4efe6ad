"""A tiny random model of every family in ``model_families.FAMILIES``, and of kinds that are refused."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.tiny_models import make_char_tokenizer

#: what every text model here has; vLLM's attention on the CPU takes heads of 32 and no smaller ones
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
    # Large for this width: with nearly uniform predictions a wrong weight would hardly show.
    initializer_range=0.15,
)
#: whose packed projection vLLM's own loader of adapters knows by its parts only, or by all of its parts together; a
#: sync hands it those
NO_ADAPTER_FILES = ("glm", "glm4", "qwen3_5_text")
#: which vLLM computes on the CPU in bfloat16 alone
NO_FLOAT32 = ("qwen3_5_text",)
#: model_type -> class of its config in transformers and what makes it differ from Llama
SPECIAL = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "gemma2": (
        "Gemma2Config",
        {"query_pre_attn_scalar": 24, "sliding_window": 16, "final_logit_softcapping": 5.0},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "seed_oss": ("SeedOssConfig", {}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 256}),
    "glm": ("GlmConfig", {"attention_bias": True}),
    "glm4": ("Glm4Config", {"attention_bias": True}),
    "falcon_h1": (
        "FalconH1Config",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_chunk_size": 16,
            "attention_in_multiplier": 0.9,
            "key_multiplier": 0.8,
            "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7],
            "ssm_out_multiplier": 0.6,
            "mlp_multipliers": [0.9, 0.8],
            "lm_head_multiplier": 0.7,
        },
    ),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        {
            # Of each kind one layer with an even number and one with an odd one.
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 2 + ["full_attention"] * 2,
            # As its checkpoints have it: vLLM takes the type of the recurrent state from here.
            "mamba_ssm_dtype": "float32",
            # vLLM's kernel on the CPU takes no other.
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 2,
            # As many rows as in_proj_b and in_proj_a have: more than the rank.
            "linear_num_value_heads": 8,
        },
    ),
}


def make_family(model_type: str, folder: str | Path, tokenizer=None, **fields) -> Path:
    """Save a random model of a family and a tokenizer for it to ``folder``, one of characters unless one is given.

    Biases and the weights of norms are random too, so that one that is lost or transformed shows. ``fields`` are of
    the config, in place of those above.
    """
    import transformers

    folder, tokenizer = Path(folder), tokenizer or make_char_tokenizer()
    kind, changes = SPECIAL[model_type]
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **SIZES | tokens | changes | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif "norm" in name or name.endswith((".A_log", ".D", ".dt_bias")):
                parameter.data += 0.2 * torch.randn_like(parameter)
            # As most checkpoints: of other weights a rollout in 16 bits begins with a rounding.
            parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
