"""The memory that a probe is said to need, beside what its own passes hold on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.cli.probe import main
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.plan.live_bytes import LiveBytes
from hybrid_lora_plugin.plan.probe_memory import GIB, probe_memory, what_fits
from hybrid_lora_plugin.probing import distributed
from hybrid_lora_plugin.probing.distributed import Ranks, decoder_layers
from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.recompute import recompute_activations
from hybrid_lora_plugin.probing.runner import METHODS
from hybrid_lora_plugin.scoring import get_criterion
from tests.support.tiny_models import sums, write_jsonl

#: what was planned over what was alive, at the fullest moment
LEAST, MOST = 0.95, 1.15
#: what grows while activations go is taken to be there with them; of plop a module's copies with the largest layer's
TOO_HIGH = {"lookahead": 1.45, "full_pruning": 1.3, "plop": 1.6}
CPU = torch.device("cpu")
ROWS, TOKENS = 4, 64
MODELS = {
    "qwen2": Qwen2Config(
        vocab_size=600, hidden_size=128, intermediate_size=320, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "llama": LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, tie_word_embeddings=False,
    ),
}  # fmt: skip


def configured(criterion, **changes):
    config = ProbeCommandConfig(criterion=criterion)
    config.lora.rank = 8
    values = {"batch_size": ROWS, "max_length": TOKENS, "micro_batch_size": ROWS, "partitions": 2, "warmup_steps": 3}
    for name, value in (values | changes).items():
        setattr(config.probe, name, value)
    config.probe.lr, config.probe.lookahead.lr = 1e-3, 1e-4
    config.probe.adalora.interval = 1
    config.probe.adalora.start, config.probe.adalora.final = 0.1, 0.4
    return config


def batch(seed):
    ids = torch.randint(0, 300, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    # Padded, as rows are.
    mask[0, -1] = 0
    return Batch(ids, mask, ids.clone())


def alive(model, config):
    """Most bytes alive in a real probe of a model, by stage; the base itself is not among them."""
    candidates = find_candidates(model)
    base = [*model.parameters(), *model.buffers()]
    method = METHODS[get_criterion(config.criterion).method](model, candidates, config)
    if config.probe.gradient_checkpointing:
        recompute_activations(decoder_layers(model, candidates))
    peaks = {}

    def stage(name, action):
        live = LiveBytes(base)
        with live:
            # Touched, so that they are counted from the beginning.
            held = [parameter.view_as(parameter) for parameter in method.replicated]
            action()
        del held
        peaks[name] = live.peak

    def warm_up():
        for step in range(method.warmup_steps):
            method.warm_up(batch(step), batch(90))

    method.start(Passes(model, Ranks(CPU), config.probe.micro_batch_size, config.probe.micro_batch_tokens))
    if method.warmup_steps:
        stage("warm-up", warm_up)
    method.finish_warmup()
    method.begin_scoring(batch)
    if method.rows:
        stage("scoring", lambda: [method.score(row, batch(row)) for row in range(2)])
    return peaks


def planned(config, dtype, model_config):
    """The same by the formula."""
    memory = probe_memory(model_config, config, dtype, 1)

    def most(stages):
        return max(
            moment.total - moment.parts["base"]
            for moment in memory.moments
            if (moment.stage in ("the warm-up", "the optimizer's step")) == stages and moment.stage != "loading"
        )

    found = {"warm-up": most(True)} if any(moment.stage == "the warm-up" for moment in memory.moments) else {}
    if get_criterion(config.criterion).method not in ("adalora", "autolora"):
        found["scoring"] = most(False)
    return found


@pytest.mark.parametrize("kind, dtype, again", [("qwen2", "float32", True), ("llama", "bfloat16", False)])
@pytest.mark.parametrize(
    "criterion, changes",
    [
        ("hybrid", {"controls": False}),
        ("hybrid", {"micro_batch_size": 1}),
        ("signal_to_noise", {}),
        ("lookahead", {"controls": False}),
        ("adalora", {"warmup_steps": 6}),
        ("autolora", {}),
        ("full_pruning", {}),
        ("plop", {}),
    ],
)
def test_a_probe_holds_what_the_formula_says(kind, dtype, again, criterion, changes):
    config = configured(criterion, gradient_checkpointing=again, **changes)
    model = AutoModelForCausalLM.from_config(MODELS[kind], dtype=getattr(torch, dtype), attn_implementation="sdpa")
    said, held = planned(config, dtype, MODELS[kind]), alive(model, config)
    assert said.keys() == held.keys()
    most = TOO_HIGH.get(criterion, MOST)
    for stage in held:
        assert LEAST < said[stage] / held[stage] < most, (stage, said[stage], held[stage])


QWEN_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip


def test_a_7b_with_one_row_of_16k_fits_one_gpu_of_80_gb_without_the_controls():
    config = configured("hybrid", max_length=16384, micro_batch_size=1, gradient_checkpointing=True, batch_size=8)
    config.lora.rank = 16
    room = 79 * GIB
    with_controls = probe_memory(QWEN_7B, config, "bfloat16", 1)
    assert with_controls.fullest.stage == "the controls" and with_controls.needed > room
    assert what_fits(QWEN_7B, config, "bfloat16", 1, room).startswith("probe.controls=false (")
    assert what_fits(QWEN_7B, config, "bfloat16", 1, 20 * GIB) is None
    config.probe.controls = False
    without = probe_memory(QWEN_7B, config, "bfloat16", 1)
    assert without.needed < 50 * GIB and without.fullest.parts["base"] == 2 * without.parameters
    assert "7.6B parameters in bfloat16 on 1 × GPU: " in without.line(room) and " of 79.0 GiB on each" in without.line(
        room
    )
    # Eight hold an eighth each, and what a pass gathers.
    eight = probe_memory(QWEN_7B, config, "bfloat16", 8)
    assert eight.fullest.parts["base"] == pytest.approx(without.fullest.parts["base"] / 8, rel=1e-3)
    assert eight.host == without.host == {"the base as it is read": 2 * without.parameters}


def test_the_command_says_it_before_it_loads_and_what_makes_it_fit(tiny_qwen2, tmp_path, capsys, monkeypatch):
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(40))
    given = [
        f"model.path={tiny_qwen2}", f"probe.files=[{rows}]", "probe.warmup_steps=2", "probe.partitions=2",
        "probe.batch_size=6", "lora.rank=2", "budget.ratio=0.3", "probe.lr=5e-3",
    ]  # fmt: skip
    assert main([*given, f"output_dir={tmp_path / 'out'}"]) == 0
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if "by the formula" in line)
    assert "parameters in float32 on 1 × cpu: " in line and "too many" not in err
    assert err.index("by the formula") < err.index("candidate modules")
    monkeypatch.setattr(distributed, "device_bytes", lambda device: 1000)
    assert main([*given, f"output_dir={tmp_path / 'again'}"]) == 0
    assert "GiB too many, if every token of a row of" in capsys.readouterr().err
