"""Falcon-H1's norm of the recurrent output and its gate: in which order transformers and vLLM compute them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("vllm", reason="vLLM is not installed")

from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated  # noqa: E402
from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated  # noqa: E402

from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.model_families import refuse_config  # noqa: E402

WIDTH, EPSILON = 12, 1e-5


def reference(values, gates, weights, groups: int, norm_first: bool) -> list[float]:
    """One token's output in float64, number by number: gate g of value v multiplies by g / (1 + exp(-g))."""
    gate = [g / (1 + math.exp(-g)) for g in gates]
    inner = list(values) if norm_first else [v * g for v, g in zip(values, gate, strict=True)]
    out, size = [], len(inner) // groups
    for start in range(0, len(inner), size):
        part = inner[start : start + size]
        scale = 1 / math.sqrt(sum(v * v for v in part) / size + EPSILON)
        out += [v * scale * weights[start + place] for place, v in enumerate(part)]
    return [v * g for v, g in zip(out, gate, strict=True)] if norm_first else out


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm_first", [False, True])
def test_vllm_gates_first_and_a_config_that_says_otherwise_is_refused(groups, norm_first):
    generator = torch.Generator().manual_seed(0)
    values, gates = torch.randn(2, 3, WIDTH, generator=generator)
    weights = 1 + 0.2 * torch.randn(WIDTH, generator=generator)
    theirs = FalconH1RMSNormGated(WIDTH, eps=EPSILON, n_groups=groups, norm_before_gate=norm_first)
    theirs.weight.data = weights
    # What its method reads; to be built it needs an engine.
    rollout = SimpleNamespace(use_rms_norm=True, n_groups=groups, group_size=WIDTH // groups, tp_size=1)
    rollout.variance_epsilon, rollout.weight = EPSILON, weights
    found = {
        "transformers": theirs(values[None], gates[None])[0],
        "vllm": Mixer2RMSNormGated.forward_native(rollout, values, gates),
    }
    tokens = list(zip(values.tolist(), gates.tolist(), strict=True))
    wanted = {
        order: torch.tensor(
            [reference(*token, weights.tolist(), groups, order) for token in tokens], dtype=torch.float64
        )
        for order in (False, True)
    }
    assert (wanted[False] - wanted[True]).abs().max() > 0.1
    torch.testing.assert_close(found["transformers"].double(), wanted[norm_first], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["vllm"].double(), wanted[False], rtol=1e-5, atol=1e-6)
    config = transformers.FalconH1Config(
        mamba_rms_norm=True, mamba_norm_before_gate=norm_first, mamba_n_groups=groups, mamba_n_heads=128
    )
    if norm_first:
        with pytest.raises(
            ConfigurationError, match="before the gate .*give a Falcon-H1 with mamba_norm_before_gate=F"
        ):
            refuse_config(config)
    else:
        refuse_config(config)
    # Without the norm there is no order.
    config.mamba_rms_norm = False
    refuse_config(config)
