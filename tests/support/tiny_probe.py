"""What the tests of the probing runs share: a tiny model, a ragged batch, a run on it, and its resumption."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.forward import IGNORED, Batch, Passes
from hybrid_lora_plugin.seeding import generator
from tests.support.tiny_models import tiny_qwen2_config

VOCABULARY = 40


def wide_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Attention whose softmax is in the type of ``query`` [B, H, S, D]; it can be differentiated twice."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    return (weights.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("wide", wide_attention)
AttentionMaskInterface.register("wide", eager_mask)


def tiny_model(dtype=torch.float64, seed=0, layers=1):
    """A random Qwen2 that computes in ``dtype`` throughout.

    transformers computes softmax and norms in float32 whatever the model's type is. Two ways of cutting a batch then
    differ by 1e-8 where a value happens to lie at the edge of two float32 numbers, which depends on the processor.
    """
    config = tiny_qwen2_config(VOCABULARY, layers=layers, hidden=16, heads=2, kv_heads=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="wide")
    for name in [name for name, _ in model.named_modules() if name.endswith("norm")]:
        model.set_submodule(name, torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return model.to(dtype)


def ragged_batch(rows=3, length=9, seed=0):
    """Rows of different lengths, responses of different lengths."""
    rng = generator(seed, "batch")
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=rng)
    batch = Batch(ids, torch.ones_like(ids), torch.full_like(ids, IGNORED))
    for row in range(rows):
        start, end = 2 + row % 3, length - row % 4
        batch.labels[row, start:end] = ids[row, start:end]
        batch.attention_mask[row, end:] = 0
    return batch


def passes_of(model, micro_batch_size=None):
    return Passes(model, Ranks(torch.device("cpu")), micro_batch_size)


def begin(run_class, config=None, dtype=torch.float64, layers=1, micro_batch_size=None):
    """A started run on a tiny model with everything in ``dtype``; returns the run and the model."""
    model = tiny_model(dtype, layers=layers)
    run = run_class(model, find_candidates(model), config or ProbeCommandConfig())
    model.to(dtype)
    run.start(passes_of(model, micro_batch_size))
    return run, model


def assert_resumes_bit_for_bit(run_class, config, before, after):
    """``before + after`` steps in one go equal ``before`` steps, saved, loaded into a new run, and ``after`` more."""

    def steps(run, first, last):
        for step in range(first, last):
            run.warm_up(ragged_batch(seed=step), ragged_batch(seed=100 + step))

    def saved(run):
        return {name: tensor.detach().clone() for name, tensor in run.tensors().items()}

    whole, _ = begin(run_class, config, torch.float32)
    steps(whole, 0, before)
    middle = saved(whole)
    steps(whole, before, before + after)
    resumed, _ = begin(run_class, config, torch.float32)
    resumed.load(before, middle)
    assert resumed.step == before
    steps(resumed, before, before + after)
    expected, got = saved(whole), saved(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert any(not torch.equal(middle[name], expected[name]) for name in middle)
    for run in (whole, resumed):
        run.finish_warmup()
    results = whole.results(), resumed.results()
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    return whole, resumed
