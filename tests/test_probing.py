"""The probe: Eq. 7 and Algorithm 1 against slow references, data handling, resuming, reproducibility."""

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import make_char_tokenizer, tiny_qwen2_config
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.allocation import AllocationError, load_allocation
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import AdapterConfig, BudgetConfig, ModelConfig, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.probing import runner
from hybrid_lora_plugin.probing.data import ProbeData, tokenize
from hybrid_lora_plugin.probing.errors import ProbeError
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted
from hybrid_lora_plugin.probing.loss import IGNORED, Batch, response_loss
from hybrid_lora_plugin.probing.progress import LineProgress, Progress, clock
from hybrid_lora_plugin.probing.rows import Row, read_rows
from hybrid_lora_plugin.probing.runner import run_probe
from hybrid_lora_plugin.probing.score import batch_sensitivities, draw_partition, prepare_scoring
from hybrid_lora_plugin.probing.seeding import generator
from hybrid_lora_plugin.probing.svd_lora import SvdLoraLinear, attach, detach
from hybrid_lora_plugin.probing.warmup import Warmup, check_trained

RANK = 3


def randomised(layer, seed=0):
    """Give all parameters of a layer values that no initialisation would."""
    rng = generator(seed, "test")
    for parameter in (layer.A, layer.B, layer.e, layer.alpha):
        parameter.data = torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter)
    return layer


def make_layer(dtype=torch.float64, seed=0):
    layer = randomised(SvdLoraLinear(nn.Linear(5, 4), RANK, generator(seed, "init")), seed).to(dtype)
    layer.base.requires_grad_(False)
    return layer


def tiny_model(dtype=torch.float64, seed=0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_qwen2_config(40, **changes)).to(dtype)


def random_batch(rows=3, length=9, seed=0):
    rng = generator(seed, "batch")
    batch = Batch(
        torch.randint(0, 40, (rows, length), generator=rng),
        torch.ones(rows, length, dtype=torch.long),
        torch.full((rows, length), IGNORED),
    )
    for row in range(rows):
        start, end = 2 + row, length - row
        batch.labels[row, start:end] = batch.input_ids[row, start:end]
        batch.attention_mask[row, end:] = 0
    return batch


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sums(count):
    return [
        {"messages": [{"role": "user", "content": f"{i}+{2 * i}="}, {"role": "assistant", "content": str(3 * i)}]}
        for i in range(count)
    ]


# ---------------------------------------------------------------------------------------------- Eq. 7


def test_branch_is_eq_7_component_by_component():
    layer = make_layer()
    x = torch.randn(2, 3, 5, generator=generator(1, "x"), dtype=torch.float64)
    got = layer(x).detach()
    for index in ((0, 0), (1, 2)):
        for o in range(4):
            value = sum(float(x[index][i] * layer.base.weight[o, i]) for i in range(5)) + float(layer.base.bias[o])
            for j in range(RANK):
                component = sum(float(x[index][i] * layer.A[i, j].detach()) for i in range(5))
                value += float((layer.alpha * layer.e[j] * layer.B[j, o]).detach()) * component
            assert float(got[index][o]) == pytest.approx(value, rel=1e-12)


def test_disabled_branch_leaves_the_base_output_exactly():
    layer = make_layer()
    x = torch.randn(2, 5, dtype=torch.float64)
    layer.active = False
    assert torch.equal(layer(x), layer.base(x))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_e_times_its_gradient_equals_the_same_sum_over_a_and_over_b(seed):
    layer = make_layer(seed=seed)
    x = torch.randn(6, 5, generator=generator(seed, "x"), dtype=torch.float64)
    layer(x).square().sum().backward()
    over_e = layer.e * layer.e.grad
    torch.testing.assert_close(over_e, (layer.A * layer.A.grad).sum(dim=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(over_e, (layer.B * layer.B.grad).sum(dim=1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(over_e.sum(), layer.alpha * layer.alpha.grad, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_sensitivity_does_not_change_when_scale_moves_between_alpha_e_a_and_b(seed):
    layer = make_layer(seed=seed)
    x = torch.randn(6, 5, generator=generator(seed, "x"), dtype=torch.float64)

    def sensitivity():
        layer.zero_grad()
        layer(x).square().sum().backward()
        return (layer.e * layer.e.grad).detach().abs()

    before = sensitivity()
    a, b, c = (torch.rand(RANK, generator=generator(seed, name), dtype=torch.float64) + 0.5 for name in "abc")
    with torch.no_grad():
        layer.A.mul_(a)
        layer.B.mul_(b[:, None])
        layer.e.mul_(c[0] / (a * b))
        layer.alpha.div_(c[0])
    torch.testing.assert_close(sensitivity(), before, rtol=1e-9, atol=1e-12)


def test_initial_adapters_change_nothing_and_parameters_stay_float32_on_a_bfloat16_base():
    layer = SvdLoraLinear(nn.Linear(64, 8).bfloat16(), RANK, generator(0, "init"))
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == torch.bfloat16
    assert {p.dtype for p in (layer.A, layer.B, layer.e, layer.alpha)} == {torch.float32}
    assert layer.B.abs().max() == 0 and torch.equal(layer.e, torch.ones(RANK)) and layer.alpha == 1
    assert 0 < layer.A.abs().max() <= 1 / math.sqrt(64)


def test_detach_restores_the_very_modules_that_were_there():
    model = tiny_model()
    candidates = find_candidates(model)
    before = {c.name: model.get_submodule(c.name) for c in candidates}
    layers = attach(model, candidates, RANK, seed=0)
    assert list(layers) == [c.name for c in candidates]
    assert all(isinstance(model.get_submodule(c.name), SvdLoraLinear) for c in candidates)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{c.name}.{which}" for c in candidates for which in ("A", "B", "e", "alpha")
    }
    detach(model, layers)
    assert all(model.get_submodule(name) is module for name, module in before.items())


# ---------------------------------------------------------------------------------------------- loss and score


def reference_loss(model, batch):
    """One response token at a time, from the full logits."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
    terms = []
    for row in range(batch.labels.shape[0]):
        for position in range(1, batch.labels.shape[1]):
            label = int(batch.labels[row, position])
            if label != IGNORED:
                terms.append(-functional.log_softmax(logits[row, position - 1], dim=-1)[label])
    return torch.stack(terms).sum() / len(terms)


def test_loss_is_the_mean_over_response_tokens_of_the_whole_batch():
    model, batch = tiny_model(), random_batch()
    torch.testing.assert_close(response_loss(model, batch), reference_loss(model, batch), rtol=1e-9, atol=0)


def test_padding_does_not_change_the_loss():
    model, batch = tiny_model(), random_batch(rows=1)
    padded = Batch(
        *(
            functional.pad(t, (0, 4), value=v)
            for t, v in ((batch.input_ids, 0), (batch.attention_mask, 0), (batch.labels, IGNORED))
        )
    )
    torch.testing.assert_close(response_loss(model, padded), response_loss(model, batch))


def test_algorithm_1_agrees_with_two_separate_autograd_passes_in_float64():
    model, batch = tiny_model(), random_batch()
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for index, layer in enumerate(layers.values()):
        randomised(layer, index).to(torch.float64)
    prepare_scoring(model, layers)
    bucket_a = draw_partition(0, 0, len(layers))
    got, loss = batch_sensitivities(model, layers, batch, bucket_a)
    assert all(layer.active for layer in layers.values())

    es = [layer.e for layer in layers.values()]
    gradients, losses = [torch.zeros_like(e) for e in es], []
    for disabled in (True, False):
        for layer, in_a in zip(layers.values(), bucket_a.tolist(), strict=False):
            layer.active = in_a is not disabled
        value = reference_loss(model, batch)
        losses.append(float(value.detach()))
        for total, gradient in zip(gradients, torch.autograd.grad(value, es, allow_unused=True), strict=False):
            if gradient is not None:
                total += gradient
    want = [
        sum(abs(float((e[j] * g[j]).detach())) for j in range(RANK)) / RANK for e, g in zip(es, gradients, strict=False)
    ]
    # Qwen2 normalises in float32 whatever its weights are, which bounds the agreement.
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    assert got.dtype == torch.float64 and loss == pytest.approx(sum(losses) / 2, rel=1e-9)


def test_masks_are_complementary_and_every_module_is_active_in_exactly_one_pass():
    model, batch = tiny_model(torch.float32), random_batch()
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for layer in layers.values():
        randomised(layer)
    prepare_scoring(model, layers)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append([layer.active for layer in layers.values()]))
    bucket_a = draw_partition(0, 3, len(layers))
    batch_sensitivities(model, layers, batch, bucket_a)
    assert len(passes) == 2
    assert passes[0] == (~bucket_a).tolist() and passes[1] == bucket_a.tolist()
    assert all(first != second for first, second in zip(*passes, strict=False))


def test_a_bucket_that_holds_everything_still_scores_every_module():
    model, batch = tiny_model(torch.float32), random_batch()
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for layer in layers.values():
        randomised(layer)
    prepare_scoring(model, layers)
    sensitivities, _ = batch_sensitivities(model, layers, batch, torch.ones(len(layers), dtype=torch.bool))
    assert (sensitivities > 0).all()


def test_only_e_receives_a_gradient_while_scoring():
    model, batch = tiny_model(torch.float32), random_batch()
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for layer in layers.values():
        randomised(layer)
    prepare_scoring(model, layers)
    batch_sensitivities(model, layers, batch, draw_partition(0, 0, len(layers)))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {"e"}
    assert not model.training


def test_partitions_follow_the_seed_and_are_fair():
    assert torch.equal(draw_partition(1, 2, 50), draw_partition(1, 2, 50))
    assert not torch.equal(draw_partition(1, 2, 50), draw_partition(1, 3, 50))
    assert not torch.equal(draw_partition(1, 2, 50), draw_partition(2, 2, 50))
    share = torch.stack([draw_partition(0, t, 196).double() for t in range(200)]).mean()
    assert abs(float(share) - 0.5) < 0.01


# ---------------------------------------------------------------------------------------------- warm-up


def test_warmup_learns_and_reloading_it_continues_bit_for_bit():
    def fresh():
        model = tiny_model(torch.float32)
        layers = attach(model, find_candidates(model), RANK, seed=0)
        return Warmup(model, layers, lr=1e-2), layers

    straight, layers = fresh()
    losses = [straight.run(random_batch()) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.01
    first, _ = fresh()
    for _ in range(3):
        first.run(random_batch())
    second, other = fresh()
    second.load(first.step, {name: tensor.clone() for name, tensor in first.tensors().items()})
    assert [second.run(random_batch()) for _ in range(3)] == losses[3:]
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    check_trained(layers)


def test_untrained_or_vanished_adapters_are_refused():
    model = tiny_model(torch.float32)
    layers = attach(model, find_candidates(model), RANK, seed=0)
    with pytest.raises(ProbeError, match=r"probe.warmup_steps: max\|B\| is 0"):
        check_trained(layers)
    for layer in layers.values():
        layer.B.data.fill_(1.0)
        layer.e.data.zero_()
    with pytest.raises(ProbeError, match=r"max\|e\| is 0"):
        check_trained(layers)
    next(iter(layers.values())).B.data.fill_(float("nan"))
    with pytest.raises(ProbeError, match="left nan in B"):
        check_trained(layers)


def test_a_loss_that_is_not_a_number_stops_the_warmup_with_its_step():
    model = tiny_model(torch.float32)
    layers = attach(model, find_candidates(model), RANK, seed=0)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ProbeError, match="probe.lr: the loss is nan at warm-up step 1;"):
        Warmup(model, layers, lr=1e-3).run(random_batch())


# ---------------------------------------------------------------------------------------------- data


def test_all_row_forms_give_the_same_tokens_with_loss_on_the_response_and_its_end():
    tokenizer = make_char_tokenizer()
    turns = [{"role": "user", "content": "1+1="}]
    files = [
        {"messages": [*turns, {"role": "assistant", "content": "2"}]},
        {"messages": [*turns, {"role": "assistant", "content": "2"}, {"role": "user", "content": "thanks"}]},
        {"prompt": turns, "response": "2"},
        {"prompt": "1+1=", "response": "2"},
    ]
    examples = [tokenize(row, tokenizer, 100) for row in _rows(files)]
    assert all(example == examples[0] for example in examples)
    ids, start = examples[0].input_ids, examples[0].response_start
    assert tokenizer.decode(ids[:start]) == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[start:]) == "2<|im_end|>"
    assert ids[-1] == tokenizer.eos_token_id


def _rows(values):
    from hybrid_lora_plugin.probing.rows import _row

    return [_row(value, "row") for value in values]


def test_without_a_chat_template_texts_are_verbatim_and_chats_are_refused():
    tokenizer = make_char_tokenizer()
    tokenizer.chat_template = None
    example = tokenize(Row("ab", "c"), tokenizer, 10)
    assert tokenizer.decode(example.input_ids) == "abc<|im_end|>" and example.response_start == 2
    with pytest.raises(ProbeError, match="no chat template"):
        tokenize(Row([{"role": "user", "content": "ab"}], "c"), tokenizer, 10)


def test_jsonl_and_parquet_of_the_same_rows_are_the_same_data(tmp_path):
    import pyarrow
    import pyarrow.parquet

    jsonl = write_jsonl(tmp_path / "rows.jsonl", sums(12))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sums(12)), tmp_path / "rows.parquet")
    rows, (source,) = read_rows([jsonl])
    assert rows == read_rows([str(tmp_path / "rows.parquet")])[0]
    assert source["name"] == "rows.jsonl" and source["rows"] == 12 and len(source["sha256"]) == 64


def data_of(tmp_path, count=40, **changes):
    file = write_jsonl(tmp_path / "rows.jsonl", sums(count))
    values = dict(files=[file], partitions=3, batch_size=4, warmup_steps=5, max_length=64)
    return ProbeData(ProbeConfig(**(values | changes)), make_char_tokenizer())


def test_validation_rows_are_fixed_by_the_seed_recorded_and_never_trained_on(tmp_path):
    data = data_of(tmp_path)
    assert data.record == data_of(tmp_path).record
    assert data.record["validation_rows"] != data_of(tmp_path, seed=1).record["validation_rows"]
    assert len(set(data.record["validation_rows"])) == 12

    def rows(batch):
        return {tuple(row) for row in batch.input_ids.tolist()}

    def texts(batches):
        return {tuple(i for i in row if i) for batch in batches for row in rows(batch)}

    held_out = texts(data.validation_batch(t) for t in range(3))
    assert len(held_out) == 12
    assert not held_out & texts(data.warmup_batch(step) for step in range(20))


def test_a_warmup_batch_depends_on_its_number_alone_and_an_epoch_shows_every_row_once(tmp_path):
    data = data_of(tmp_path, count=20, warmup_steps=100)
    assert torch.equal(data.warmup_batch(7).input_ids, data.warmup_batch(7).input_ids)
    first, second = (
        [tuple(i for i in r if i) for s in steps for r in data.warmup_batch(s).input_ids.tolist()]
        for steps in ((0, 1), (2, 3))
    )
    assert len(set(first)) == 8 and set(first) == set(second) and first != second


def test_labels_cover_response_and_end_token_only(tmp_path):
    batch = data_of(tmp_path).validation_batch(0)
    tokenizer = make_char_tokenizer()
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=False):
        answer = tokenizer.decode(labels[labels != IGNORED])
        prompt = tokenizer.decode(ids[(labels == IGNORED) & (mask == 1)])
        assert answer.endswith("<|im_end|>") and answer.removesuffix("<|im_end|>").isdigit()
        assert prompt.endswith("<|im_start|>assistant\n")


def test_rows_cut_by_max_length_are_left_out_and_counted(tmp_path):
    rows = sums(30) + [{"prompt": "x" * 200, "response": "y"}] * 5
    data = ProbeData(
        ProbeConfig(
            files=[write_jsonl(tmp_path / "r.jsonl", rows)], partitions=2, batch_size=4, warmup_steps=500, max_length=64
        ),
        make_char_tokenizer(),
    )
    assert data.dropped == 5 and data.record["rows"] == 35


GOOD = {"prompt": "a", "response": "b"}
BAD_ROWS = {
    "no response": ([GOOD, {"prompt": "a", "response": " "}], "row 2 of .*: no response"),
    "response of another type": ([{"prompt": "a", "response": 3}], "row 1 of .*: no response"),
    "no prompt": ([{"prompt": "", "response": "b"}], "row 1 of .*: no prompt"),
    "other columns": ([GOOD, GOOD, {"text": "a"}], r"row 3 of .*neither .*\['text'\]"),
    "no assistant": ([{"messages": [{"role": "user", "content": "a"}]}], "row 1 of .*no assistant turn"),
    "assistant first": ([{"messages": [{"role": "assistant", "content": "a"}]}], "row 1 of .*no assistant turn after"),
    "turn without text": ([{"messages": [{"role": "user"}]}], "row 1 of .*without text"),
    "messages as text": ([{"messages": "a"}], "row 1 of .*messages is str"),
    "not an object": ([[1]], "row 1 of .*not an object"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_an_unusable_row_is_named_by_its_number(tmp_path, case):
    rows, message = BAD_ROWS[case]
    with pytest.raises(ProbeError, match=message):
        read_rows([write_jsonl(tmp_path / "rows.jsonl", rows)])


def test_files_that_cannot_be_rows_are_refused(tmp_path):
    cases = {
        "empty.jsonl": (b"\n", "is empty"),
        "broken.jsonl": (b'{"prompt"\n', "row 1 of .* is not JSON"),
        "binary.jsonl": (b"\xff\xfe\x00", "not UTF-8"),
        "rows.csv": (b"a,b", "ends in '.csv'"),
        "rows.parquet": (b"abc", "not a Parquet file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProbeError, match=message):
            read_rows([str(tmp_path / name)])
    with pytest.raises(ProbeError, match="is not a file"):
        read_rows([str(tmp_path / "none.jsonl")])
    with pytest.raises(ProbeError, match="no file given"):
        read_rows([])


def test_too_few_rows_are_refused_with_the_number_needed(tmp_path):
    with pytest.raises(ProbeError, match="15 usable rows .* but 16 are needed"):
        data_of(tmp_path, count=15)
    with pytest.raises(ProbeError, match="probe.max_length: 8 tokens cut away the response of all 40 rows"):
        data_of(tmp_path, max_length=8)


# ---------------------------------------------------------------------------------------------- the whole run


def probe_config(model, tmp_path, name="out", rows=60, **probe):
    values = dict(warmup_steps=8, partitions=4, batch_size=4, max_length=64, lr=5e-3)
    return ProbeCommandConfig(
        model=ModelConfig(path=str(model)),
        output_dir=str(tmp_path / name),
        budget=BudgetConfig(ratio=0.3),
        lora=AdapterConfig(rank=RANK),
        probe=ProbeConfig(files=[write_jsonl(tmp_path / "rows.jsonl", sums(rows))], **(values | probe)),
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class InterruptAt(Progress):
    """Sends this process a real signal after so many steps in all."""

    def __init__(self, steps, signum=signal.SIGINT):
        self.left, self.signum, self.losses, self.notes = steps, signum, [], []

    def note(self, text):
        self.notes.append(text)

    def advance(self, done, loss):
        self.losses.append(loss)
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.signum)


@pytest.fixture(scope="module")
def uninterrupted(tiny_qwen2, tmp_path_factory):
    return run_probe(probe_config(tiny_qwen2, tmp_path_factory.mktemp("uninterrupted")))


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(tiny_qwen2, uninterrupted, tmp_path):
    again = run_probe(probe_config(tiny_qwen2, tmp_path))
    assert contents(again) == contents(uninterrupted)
    other = run_probe(probe_config(tiny_qwen2, tmp_path, "other", seed=1))
    assert contents(other)["sensitivities.safetensors"] != contents(again)["sensitivities.safetensors"]


@pytest.mark.parametrize("stops", [(1,), (5,), (8,), (10,), (3, 3, 4)], ids=str)
def test_an_interrupted_run_continues_to_the_bytes_of_an_uninterrupted_one(tiny_qwen2, uninterrupted, tmp_path, stops):
    config = probe_config(tiny_qwen2, tmp_path)
    for stop, signum in zip(stops, (signal.SIGINT, signal.SIGTERM, signal.SIGINT), strict=False):
        with pytest.raises(ProbeInterrupted) as caught:
            run_probe(config, InterruptAt(stop, signum))
        assert caught.value.folder == tmp_path / "out.partial" and caught.value.signum == signum
    last = InterruptAt(0)
    assert contents(run_probe(config, last)) == contents(uninterrupted)
    assert len(last.losses) == 12 - sum(stops)
    assert any("continuing" in note for note in last.notes)
    assert not (tmp_path / "out.partial").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_state_is_saved_by_time_as_well(tiny_qwen2, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SAVE_EVERY_SECONDS", 0.0)
    config = probe_config(tiny_qwen2, tmp_path)

    class Crash(Progress):
        def advance(self, done, loss):
            if done == 4:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_probe(config, Crash())
    from safetensors import safe_open

    with safe_open(tmp_path / "out.partial" / "warmup.safetensors", framework="pt") as saved:
        assert saved.metadata() == {"step": "3"}


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(lr=1e-3), "probe.lr: .*begun with 0.005, this run has 0.001"),
        (dict(seed=4), "probe.seed"),
        (dict(warmup_steps=9), "probe.warmup_steps"),
        (dict(rows=61), "probe.files"),
    ],
    ids=["lr", "seed", "steps", "data"],
)
def test_a_changed_setting_does_not_continue_another_run(tiny_qwen2, tmp_path, change, field):
    with pytest.raises(ProbeInterrupted):
        run_probe(probe_config(tiny_qwen2, tmp_path), InterruptAt(2))
    with pytest.raises(ProbeError, match=f"{field}.*delete .*out.partial"):
        run_probe(probe_config(tiny_qwen2, tmp_path, **change))


def test_a_damaged_state_is_refused(tiny_qwen2, tmp_path):
    config = probe_config(tiny_qwen2, tmp_path)
    with pytest.raises(ProbeInterrupted):
        run_probe(config, InterruptAt(2))
    for file in ("warmup.safetensors", "settings.json"):
        (tmp_path / "out.partial" / file).write_bytes(b"{")
        with pytest.raises(ProbeError, match=f"{file} is damaged .*delete"):
            run_probe(config)


def test_the_artifact_belongs_to_the_model_that_was_probed(tiny_qwen2, uninterrupted):
    allocation = load_allocation(uninterrupted)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    allocation.check_model(model.config, find_candidates(model))
    assert allocation.model.candidate_parameters == sum(c.parameters for c in find_candidates(model))
    assert allocation.full_names and allocation.lora_names
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| frozen | {total - allocation.budget.used:,} |" in (uninterrupted / "report.md").read_text()
    assert load_file(uninterrupted / "sensitivities.safetensors")["sensitivities"].shape == (4, 14)


def test_direction_highest_takes_the_other_end(tiny_qwen2, tmp_path):
    lowest, highest = (
        load_allocation(run_probe(replace(probe_config(tiny_qwen2, tmp_path, name), direction=name)))
        for name in ("lowest", "highest")
    )
    ranked = sorted(lowest.modules, key=lambda module: module.score)
    assert ranked[0].name in lowest.full_names and ranked[0].name not in highest.full_names
    assert ranked[-1].name in highest.full_names and highest.criterion.direction == "highest"


def test_a_probe_in_bfloat16_runs(tiny_qwen2, tmp_path):
    config = probe_config(tiny_qwen2, tmp_path)
    config.model.dtype = "bfloat16"
    assert load_allocation(run_probe(config)).criterion.dtype == "bfloat16"


def test_an_existing_artifact_is_refused_before_anything_is_loaded(uninterrupted, tmp_path):
    config = probe_config(tmp_path / "no-model", tmp_path)
    with pytest.raises(AllocationError, match="holds an allocation already"):
        run_probe(replace(config, output_dir=str(uninterrupted)))


def test_lines_state_step_loss_and_remaining_time(capsys):
    progress = LineProgress(interval=0.0)
    progress.stage("warm-up", 3, 1)
    progress.advance(2, 1.5)
    progress.advance(3, 1.25)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("warm-up 2/3  loss 1.5000") and lines[1].endswith("ETA 0:00")
    assert clock(3725) == "1:02:05" and clock(65) == "1:05"
