"""Trials of real hybrid models: paired, reproducible to the byte, resumable, on one process and on several."""

import contextlib
import dataclasses
import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import distributed

from hybrid_lora_plugin.allocation import load_allocation
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.cli.allocate import main as allocate
from hybrid_lora_plugin.cli.probe import main
from hybrid_lora_plugin.config import AdapterConfig, BudgetConfig, ModelConfig, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing import stages
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted
from hybrid_lora_plugin.probing.loading import parameter_count
from hybrid_lora_plugin.probing.provenance import model_identity
from hybrid_lora_plugin.probing.runner import run_probe
from hybrid_lora_plugin.probing.trial import runner as trial_runner
from hybrid_lora_plugin.probing.trial.contender import ContenderModel, allocation_of
from hybrid_lora_plugin.probing.trial.in_memory import trial_in_memory
from hybrid_lora_plugin.probing.trial.options import settled
from hybrid_lora_plugin.probing.trial.portfolio import Contender
from tests.support.served_ranks import run_ranks
from tests.support.tiny_models import sums, write_jsonl
from tests.support.tiny_probe import ragged_batch, tiny_model
from tests.test_probe_run import InterruptAt, contents

pytestmark = pytest.mark.usefixtures("few_objects")
PORTFOLIO = ["hybrid", "spread:up_proj+down_proj"]


def trial_config(model, folder, name="out", rows=140, **trial):
    values = dict(portfolio=PORTFOLIO, draws=1, steps=3, rounds=2, held_out_rows=10, batch_size=4)
    values |= dict(full_lr=1e-3, lora_lr=5e-3) | trial
    config = ProbeCommandConfig(
        criterion="trial",
        model=ModelConfig(path=str(model)),
        output_dir=str(folder / name),
        budget=BudgetConfig(ratio=0.3, overflow="skip"),
        lora=AdapterConfig(rank=2, alpha=4),
        probe=ProbeConfig(
            files=[write_jsonl(folder / "rows.jsonl", sums(rows))],
            warmup_steps=3, partitions=2, batch_size=4, max_length=64, lr=5e-3,
        ),
    )  # fmt: skip
    config.trial = replace(config.trial, **values)
    return config


@pytest.fixture(scope="module")
def straight(tiny_qwen2, tmp_path_factory):
    return run_probe(trial_config(tiny_qwen2, tmp_path_factory.mktemp("straight")))


# -- one model in training --------------------------------------------------------------------------------------------


def contender(model, modules, ranks=None, probe=None, settings=None, rank=2):
    candidates = find_candidates(model)
    one = Contender("one", (), tuple(modules), rank)
    identity = model_identity("", model, candidates, parameter_count(model))
    return ContenderModel(
        model,
        candidates,
        allocation_of(one, identity, candidates),
        rank=rank,
        settings=settings or trained_as(),
        probe=probe or ProbeConfig(),
        ranks=ranks or Ranks(torch.device("cpu")),
    )


def trained_as(**changes):
    config = ProbeCommandConfig(lora=AdapterConfig(rank=2, alpha=4))
    config.trial = replace(config.trial, full_lr=1e-3, lora_lr=5e-3)
    return replace(settled(config), **changes)


FULL = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]


def by_hand(model, batches, settings):
    """The same steps in float64 by autograd, AdamW written out, on weights and factors that are plain tensors."""
    from torch.func import functional_call

    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    names = [one.name for one in find_candidates(model)]
    rank, scale = 2, settings.scale
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    start = contender(tiny_model(torch.float32, layers=2), FULL, settings=settings)
    drawn = {key: tensor.double() for key, tensor in start.tensors().items()}
    trained = {}
    for name in names:
        if name in FULL:
            for part in ("weight", "bias"):
                if f"{name}.{part}" in weights:
                    trained[f"{name}.{part}"] = (weights[f"{name}.{part}"].clone(), settings.full_lr)
        else:
            out_features, in_features = shapes[name]
            a = next(value for key, value in drawn.items() if key == f"parameter/{name}.lora_A.default.weight")
            assert a.shape == (rank, in_features)
            trained[f"{name}.A"] = (a.clone(), settings.lora_lr)
            trained[f"{name}.B"] = (torch.zeros(out_features, rank, dtype=torch.float64), settings.lora_lr)
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, (value, _) in trained.items()}
    model, losses = model.double(), []
    for step, batch in enumerate(batches, start=1):
        values = {name: value.requires_grad_(True) for name, (value, _) in trained.items()}
        merged = dict(weights)
        for name in names:
            if name in FULL:
                merged |= {key: value for key, value in values.items() if key.startswith(name + ".")}
            else:
                merged[f"{name}.weight"] = weights[f"{name}.weight"] + scale * values[f"{name}.B"] @ values[f"{name}.A"]
        logits = functional_call(
            model, merged, kwargs=dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        ).logits
        total, tokens = 0, 0
        for row in range(batch.rows):
            for place in range(1, batch.input_ids.shape[1]):
                if batch.labels[row, place] != -100:
                    total = total - logits[row, place - 1].log_softmax(-1)[batch.labels[row, place]]
                    tokens += 1
        loss = total / tokens
        losses.append(float(loss))
        gradients = torch.autograd.grad(loss, list(values.values()))
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        factor = min(1.0, settings.clip_grad / (float(norm) + 1e-6))
        for (name, (value, rate)), gradient in zip(list(trained.items()), gradients, strict=True):
            mean, square = moments[name]
            gradient = gradient * factor
            mean = settings.betas[0] * mean + (1 - settings.betas[0]) * gradient
            square = settings.betas[1] * square + (1 - settings.betas[1]) * gradient.square()
            moments[name] = (mean, square)
            step_size = (mean / (1 - settings.betas[0] ** step)) / (
                (square / (1 - settings.betas[1] ** step)).sqrt() + 1e-8
            )
            moved = value.detach() * (1 - rate * settings.weight_decay) - rate * step_size
            trained[name] = (moved, rate)
    return losses, {name: value for name, (value, _) in trained.items()}


def test_a_contender_trains_as_plain_arithmetic_says():
    settings = trained_as(clip_grad=0.3, weight_decay=0.1, betas=(0.8, 0.99))
    batches = [ragged_batch(rows=4, seed=step) for step in range(4)]
    wanted, trained = by_hand(tiny_model(torch.float32, layers=2), batches, settings)
    one = contender(tiny_model(torch.float32, layers=2), FULL, settings=settings)
    assert [one.train(batch) for batch in batches] == pytest.approx(wanted, rel=2e-5)
    for key, tensor in one.tensors().items():
        if key.startswith("parameter/"):
            name = key.removeprefix("parameter/")
            name = name.replace(".lora_A.default.weight", ".A").replace(".lora_B.default.weight", ".B")
            torch.testing.assert_close(tensor.double(), trained[name], rtol=2e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_contender_goes_on_from_its_tensors_bit_for_bit_and_trains_in_float32(dtype):
    batches = [ragged_batch(rows=4, seed=step) for step in range(4)]
    whole = contender(tiny_model(dtype, layers=2), FULL)
    losses = [whole.train(batch) for batch in batches]
    first = contender(tiny_model(dtype, layers=2), FULL)
    for batch in batches[:2]:
        first.train(batch)
    second = contender(tiny_model(dtype, layers=2), FULL)
    second.load(first.step, {key: tensor.clone() for key, tensor in first.tensors().items()})
    assert [second.train(batch) for batch in batches[2:]] == losses[2:]
    for key, tensor in whole.tensors().items():
        assert tensor.dtype == torch.float32 and torch.equal(second.tensors()[key], tensor), key
    rows = second.row_losses(ragged_batch(rows=5, seed=9))
    assert rows == whole.row_losses(ragged_batch(rows=5, seed=9)) and len(rows) == 5
    seen, fresh = batches[-1], contender(tiny_model(dtype, layers=2), FULL)
    assert sum(whole.row_losses(seen)) < sum(fresh.row_losses(seen))


def test_rows_add_up_to_the_loss_and_contenders_begin_alike():
    batch = ragged_batch(rows=5, seed=3)
    one, other = (
        contender(tiny_model(torch.float32, layers=2), FULL),
        contender(tiny_model(torch.float32, layers=2), ["model.layers.1.mlp.down_proj"]),
    )
    assert one.row_losses(batch) == pytest.approx(other.row_losses(batch), rel=1e-6)
    assert sum(one.row_losses(batch)) / batch.response_tokens == pytest.approx(one.train(batch), rel=1e-6)
    mine, theirs = one.tensors(), other.tensors()
    fresh = contender(tiny_model(torch.float32, layers=2), FULL).tensors()
    shared = [key for key in fresh if ".lora_A." in key and key in theirs]
    assert len(shared) > 5 and all(torch.equal(fresh[key], theirs[key]) for key in shared)
    assert mine.keys() != theirs.keys()


def test_a_factor_of_a_type_scales_how_far_its_weights_move():
    batch = ragged_batch(rows=4, seed=0)
    plain = contender(tiny_model(torch.float32, layers=2), FULL, settings=trained_as(weight_decay=0.0))
    start = plain.tensors()
    plain.train(batch)
    scaled = contender(
        tiny_model(torch.float32, layers=2),
        FULL,
        settings=trained_as(weight_decay=0.0, full_lr_factors=("o_proj:0.1", "k_proj:3")),
    )
    scaled.train(batch)
    for name, factor in ((FULL[0], 1.0), (FULL[1], 0.1)):
        key = f"parameter/{name}.weight"
        moved, wanted = scaled.tensors()[key] - start[key], factor * (plain.tensors()[key] - start[key])
        torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-8)


# -- several ranks ----------------------------------------------------------------------------------------------------


def _ranks(rank, ranks, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            mine = Ranks(torch.device("cpu"))
            probe = ProbeConfig(micro_batch_size=1, gradient_checkpointing=ranks == 4)
            one = contender(tiny_model(dtype, layers=2), FULL, mine, probe)
            # Neither 2 nor 4 divides 5: some ranks have a row less, or none.
            losses = [one.train(ragged_batch(rows=5, seed=step)) for step in range(2)]
            kept = one.tensors()
            other = contender(tiny_model(dtype, layers=2), FULL, mine, probe)
            other.load(2, kept)
            losses += [other.train(ragged_batch(rows=5, seed=step)) for step in range(2, 4)]
            again = [one.train(ragged_batch(rows=5, seed=step)) for step in range(2, 4)]
            found[str(dtype)] = (losses, again == losses[2:], other.row_losses(ragged_batch(rows=5, seed=9)))
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_contenders_train_and_resume_as_one_process_does(tmp_path, ranks):
    run_ranks(_ranks, (ranks, str(tmp_path)), ranks)
    found = torch.load(tmp_path / "found.pt")
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        one = contender(tiny_model(dtype, layers=2), FULL)
        losses = [one.train(ragged_batch(rows=5, seed=step)) for step in range(4)]
        sharded, resumed_alike, rows = found[str(dtype)]
        assert sharded == pytest.approx(losses, rel=close) and resumed_alike
        assert rows == pytest.approx(one.row_losses(ragged_batch(rows=5, seed=9)), rel=close)


def _command(rank, ranks, folder, config):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        for stop in (9, 4, 0):
            # A signal that one rank gets ends all of them, once what they had is kept.
            with contextlib.suppress(ProbeInterrupted):
                run_probe(config, InterruptAt(stop if rank == 0 else 0), Ranks(torch.device("cpu")))
    finally:
        distributed.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_stop_resume_and_choose_as_one_does(tiny_qwen2, straight, tmp_path):
    run_ranks(_command, (2, str(tmp_path), trial_config(tiny_qwen2, tmp_path)), 2)
    one, two = load_allocation(straight).trial, load_allocation(tmp_path / "out").trial
    assert (one.chosen, one.alike, one.rounds, one.tokens) == (two.chosen, two.alike, two.rounds, two.tokens)
    for mine, theirs in zip([*one.candidates, one.lora], [*two.candidates, two.lora], strict=True):
        assert (mine.name, mine.modules, mine.dropped) == (theirs.name, theirs.modules, theirs.dropped)
        assert theirs.losses == pytest.approx(mine.losses, rel=1e-4)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_artifact_is_of_the_candidate_that_the_trial_chose(straight):
    allocation = load_allocation(straight)
    trial = allocation.trial
    assert [one.name for one in trial.candidates] == ["hybrid", "spread:up_proj+down_proj", "random:0"]
    assert trial.rounds == [3, 6] and trial.rows == 10 and trial.batch_size == 4
    left = [one for one in trial.candidates if not one.dropped]
    assert sorted(len(one.losses) for one in trial.candidates) == [1, 2, 2] and len(left) == 2
    assert all(loss < trial.start for one in trial.candidates for loss in one.losses[-1:])
    assert trial.chosen in trial.alike and set(trial.alike) <= {one.name for one in left}
    chosen = next(one for one in trial.candidates if one.name == trial.chosen)
    assert allocation.full_names == chosen.modules and allocation.budget.used <= allocation.budget.limit
    worst = max(trial.candidates, key=lambda one: one.losses[0])
    assert worst.dropped == 1 and worst.difference.mean > 0
    assert trial.lora.losses and len(trial.lora.losses) == 2 and trial.lora.rank >= 2
    assert trial.steps == 3 * 3 + 2 * 3 + 6
    assert allocation.probe.options["trial"]["full_lr"] == 1e-3
    report = (straight / "report.md").read_text()
    assert "## The trial" in report and "| spread:up_proj+down_proj |" in report and (straight / "trial.png").exists()
    assert json.loads((straight / "allocation.json").read_text())["trial"]["chosen"] == trial.chosen


def test_the_same_trial_gives_the_same_bytes_also_where_candidates_begin_anew(tiny_qwen2, straight, tmp_path):
    class Notes(InterruptAt):
        pass

    notes = Notes(0)
    again = run_probe(trial_config(tiny_qwen2, tmp_path, max_state_gb=0.0), notes)
    said = "\n".join(notes.notes)
    assert "candidates begin anew in each round" in said and "trial.max_state_gb=0" in said
    left = contents(again)
    wanted = contents(straight)
    # More steps, and the same numbers.
    before, after = (json.loads(files.pop("allocation.json")) for files in (wanted, left))
    assert after["trial"].pop("steps") == 3 * 3 + 2 * 6 + 3 + 6 and before["trial"].pop("steps") == 21
    assert after == before
    assert left.pop("report.md") != wanted.pop("report.md") and left == wanted


@pytest.mark.parametrize("stops", [(2,), (7,), (14,), (8, 6, 9)], ids=str)
def test_an_interrupted_trial_ends_with_the_bytes_of_an_uninterrupted_one(tiny_qwen2, straight, tmp_path, stops):
    config = trial_config(tiny_qwen2, tmp_path)
    for stop, signum in zip(stops, (signal.SIGTERM, signal.SIGINT, signal.SIGTERM), strict=False):
        with pytest.raises(ProbeInterrupted) as caught:
            run_probe(config, InterruptAt(stop, signum))
        assert caught.value.folder == tmp_path / "out.partial" and caught.value.signum == signum
    assert contents(run_probe(config)) == contents(straight)
    assert not (tmp_path / "out.partial").exists()


def test_the_cost_is_said_before_anything_is_read_and_again_before_candidates_are_trained(tiny_qwen2, tmp_path):
    notes = InterruptAt(0)
    run_probe(trial_config(tiny_qwen2, tmp_path, run_steps=420), notes)
    said = notes.notes
    first = next(n for n, line in enumerate(said) if line.startswith("trial: 3 candidates (hybrid"))
    assert first < next(n for n, line in enumerate(said) if "held out" in line and line.startswith("140 rows"))
    assert "at most 21 optimizer steps of 4 rows = 84 rows (5 % as many steps as the 420 of the run" in said[first]
    assert any("1 probe (hybrid)" in line for line in said)
    exact = next(line for line in said if line.startswith("trial: 3 candidates, 2 rounds to 3, 6 steps"))
    assert "21 optimizer steps of 4 rows = 84 rows, about" in exact and "tokens" in exact and "loaded 7 times" in exact
    assert any("survivors go on from their state; at most 4 states are on disk" in line for line in said)
    assert any(line.startswith("trial: rates 0.001 (full modules) and 0.005 (LoRA)") for line in said)


def test_a_changed_budget_or_rate_does_not_continue_another_trial(tiny_qwen2, tmp_path):
    config = trial_config(tiny_qwen2, tmp_path)
    with pytest.raises(ProbeInterrupted):
        run_probe(config, InterruptAt(7))
    with pytest.raises(ProbeError, match="budget.ratio: .*begun with 0.3, this run has 0.2"):
        run_probe(replace(config, budget=BudgetConfig(ratio=0.2, overflow="skip")))
    with pytest.raises(ProbeError, match="trial.lora_lr: .*begun with 0.005"):
        run_probe(replace(config, trial=replace(config.trial, lora_lr=1e-3)))
    (tmp_path / "out.partial" / "trial.json").write_text("{")
    with pytest.raises(ProbeError, match="trial.json is damaged .*delete"):
        run_probe(config)


def test_the_state_is_saved_by_time_as_well(tiny_qwen2, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_runner, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(stages, "SAVE_EVERY_SECONDS", 0.0)

    class Crash(InterruptAt):
        def advance(self, done, loss):
            self.losses.append(loss)
            if len(self.losses) == 7:
                raise RuntimeError("power cut")

    config = trial_config(tiny_qwen2, tmp_path)
    with pytest.raises(RuntimeError):
        run_probe(config, Crash(0))
    # Three warm-up steps and two scored rows came before.
    with safe_open(tmp_path / "out.partial" / "candidate_hybrid.safetensors", framework="pt") as saved:
        assert saved.metadata() == {"step": "1"}
    last = InterruptAt(0)
    assert contents(run_probe(config, last)) == contents(straight) and len(last.losses) == 20


def test_rates_that_are_far_too_high_are_told_of_and_never_chosen(tiny_qwen2, tmp_path):
    config = trial_config(tiny_qwen2, tmp_path, full_lr=1e30, lora_lr=1e30, lora=False)
    with pytest.raises(ProbeError, match="trial.full_lr: the loss of every candidate was no number"):
        run_probe(config)


def test_candidates_that_choose_the_same_modules_are_not_trained(tiny_qwen2, tmp_path):
    notes = InterruptAt(0)
    config = trial_config(tiny_qwen2, tmp_path, portfolio=["spread:o_proj", "spread:o_proj@all"], draws=0)
    allocation = load_allocation(run_probe(config, notes))
    assert allocation.trial is None and not notes.losses and allocation.full_names
    assert any("nothing is trained" in line for line in notes.notes)
    assert "nothing was trained" in (tmp_path / "out" / "report.md").read_text()


def test_the_command_prints_the_table_and_another_budget_of_the_artifact_is_refused(tiny_qwen2, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(140))
    out = tmp_path / "out"
    options = [
        f"model.path={tiny_qwen2}", f"probe.files={rows}", f"output_dir={out}", "criterion=trial",
        "model.dtype=bfloat16", "lora.rank=2", "lora.alpha=4", "budget.ratio=0.3", "budget.overflow=skip",
        "probe.max_length=64",
        "trial.portfolio=[spread:o_proj,spread:up_proj+down_proj]", "trial.draws=0", "trial.steps=2", "trial.rounds=1",
        "trial.held_out_rows=10", "trial.batch_size=4", "trial.full_lr=1e-3", "trial.lora_lr=5e-3",
    ]  # fmt: skip
    assert main(options) == 0
    said = capsys.readouterr()
    table = [line for line in said.out.splitlines() if line.startswith(("candidate", "spread", "lora "))]
    assert len(table) == 4 and "loss after 2" in table[0]
    assert "trial: " in said.out and "trial.png" in said.out and "no candidate needs a probe" in said.err
    allocation = load_allocation(out)
    assert allocation.probe.dtype == "bfloat16" and allocation.probe.data["validation_rows"]
    same = ["criterion=trial", "budget.ratio=0.3", "budget.overflow=skip"]
    assert allocate([f"artifact={out}", f"output_dir={tmp_path / 'same'}", *same]) == 0
    assert load_allocation(tmp_path / "same").trial == allocation.trial
    assert allocate([f"artifact={out}", f"output_dir={tmp_path / 'less'}", "criterion=trial", "budget.ratio=0.08"]) == 2
    assert "which nobody trained" in capsys.readouterr().err
    assert main([*options, "trial.draws=2", "probe.warmup_steps=5"]) == 2
    assert "probe.warmup_steps: 5 has no effect" in capsys.readouterr().err


def test_a_trial_in_memory_compares_the_same_way_and_leaves_the_model_alone():
    model = tiny_model(torch.float32, layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = ProbeCommandConfig(criterion="trial", budget=BudgetConfig(ratio=0.3, overflow="skip"))
    config.lora = AdapterConfig(rank=2, alpha=4)
    config.trial = dataclasses.replace(
        config.trial, portfolio=["spread:o_proj", "spread:down_proj"], draws=1, steps=2, rounds=2, held_out_rows=8,
        batch_size=4, full_lr=1e-3, lora_lr=5e-3,
    )  # fmt: skip
    modules, record = trial_in_memory(
        model, find_candidates(model), config, lambda entry: {},
        lambda step, rows: ragged_batch(rows=rows, seed=step), lambda n, rows: ragged_batch(rows=rows, seed=90 + n),
    )  # fmt: skip
    assert record.rows == 8 and len(record.candidates) == 3 and record.lora is not None
    assert list(modules) == next(one.modules for one in record.candidates if one.name == record.chosen)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
