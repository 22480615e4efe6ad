"""Replicas that train at once: each equals the one model that training/ would train, whatever is beside it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.config_evidence import EvidenceCommandConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.protocol import Arm, Choice, Run, Start
from hybrid_lora_plugin.evidence.replicas import SftProtocol
from hybrid_lora_plugin.evidence.replicas.base import answer_logits, random_base
from hybrid_lora_plugin.evidence.replicas.flops import trainable_parameters
from hybrid_lora_plugin.evidence.replicas.forward import SharedParts, answer_log_probs
from hybrid_lora_plugin.evidence.replicas.selection import batch_of
from hybrid_lora_plugin.evidence.replicas.settings import ReplicaSettings, read_settings
from hybrid_lora_plugin.evidence.replicas.tasks import TASKS, Layout, Problems, renaming
from hybrid_lora_plugin.evidence.replicas.updates import BETAS, EPSILON, Replicas, adapter_init
from hybrid_lora_plugin.evidence.stages import run_stages
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.probing.provenance import model_identity
from hybrid_lora_plugin.training.apply import apply_allocation, trainable_groups
from hybrid_lora_plugin.training.zeroth_order.two_point import two_point_step
from hybrid_lora_plugin.training.zeroth_order.weights import PerturbedWeights

SHAPE = {"hidden_size": 16, "layers": 2, "intermediate_size": 32, "heads": 2, "kv_heads": 1}
BASE = {"name": "tiny", **SHAPE, "steps": 30, "batch_size": 32}
BLOCK = {"bases": [BASE], "digits": 2, "batch_size": 8, "eval_every": 3, "held_out": 20, "group_size": 4}
# A rank that shares its factors with rank 4.
STEPS, RANK, SCALE, DECAY, CLIP = 7, 3, 2.0, 0.01, 1.0
FULL_LR, LORA_LR = 3e-3, 1e-2
ZEROTH_LR, ZEROTH_EPSILON, DIRECTIONS = 2e-3, 1e-3, 2


class PlainNorm(torch.nn.Module):
    """Qwen2's norm in the type of its input; transformers rounds to float32 on the way."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))


@pytest.fixture(scope="module")
def base():
    """A tiny base of float64 with biases and norms that are not what they begin as."""
    (settings,) = read_settings(ReplicaSettings, BLOCK).bases
    model = random_base(settings).eval()
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.ndim > 1 else 0.1) * torch.randn(parameter.shape, generator=draws)
    model = model.double()  # of float32 values, to which apply_allocation casts
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Qwen2RMSNorm":
                setattr(module, name, PlainNorm(child))
    return model


@pytest.fixture(scope="module")
def problems():
    return Problems(Layout(2, False), 20)


def full_names(kind: str, candidates) -> tuple[str, ...]:
    names = [candidate.name for candidate in candidates]
    kind, _, component = kind.partition(":")
    full = {"hybrid": tuple(names[i] for i in (1, 5, 9, 13)), "full": tuple(names)}.get(kind, ())
    return tuple(name for name in full if name not in frozen_names(component, candidates))


def frozen_names(component: str, candidates) -> tuple[str, ...]:
    """All of the other component, where one is named."""
    return tuple(candidate.name for candidate in candidates if component and candidate.component != component)


def one_at_a_time(kind: str, base, data, start: Start):
    """The model that training/ (PEFT for DoRA) makes, after AdamW with the groups of the engine, and its losses."""
    model, candidates = copy.deepcopy(base), find_candidates(base)
    full, frozen = full_names(kind, candidates), frozen_names(kind.partition(":")[2], candidates)
    kind, _, component = kind.partition(":")
    if kind == "hybrid":
        config = ProbeCommandConfig(criterion="explicit")
        config.control.modules, config.placement.preset = list(full), component or "all"
        identity = model_identity("tiny", model, candidates, 1)
        allocation: Allocation = select_modules(config, identity, candidates, {}, lora_rank=RANK, environment={})
        model = apply_allocation(model, allocation, rank=RANK, alpha=int(SCALE * RANK)).double()
    elif kind == "full":
        model.requires_grad_(False)
        for name in full:
            model.get_submodule(name).requires_grad_(True)
    else:
        targets = [candidate.name for candidate in candidates if candidate.name not in frozen]
        adapter = LoraConfig(
            r=RANK, lora_alpha=int(SCALE * RANK), target_modules=targets, use_dora=kind == "dora", bias="none"
        )
        model = get_peft_model(model, adapter).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                module = plain_name(name.partition(".lora_A")[0])
                parameter.copy_(adapter_init(start.seed, module, *parameter.shape))
    groups = trainable_groups(model)
    # DoRA is not the engine's; its magnitudes move at the rate of the factors.
    groups["lora"] += [pair for pair in groups["full"] if "lora_" in pair[0]]
    groups["full"] = [pair for pair in groups["full"] if "lora_" not in pair[0]]
    optimizer = torch.optim.AdamW(
        [{"params": [p for _, p in groups[which]], "lr": lr} for which, lr in (("full", FULL_LR), ("lora", LORA_LR))],
        betas=BETAS,
        eps=EPSILON,
        weight_decay=DECAY,
    )
    losses, kept = [], 3
    perturbed = PerturbedWeights(zeroth_parameters(model), ZEROTH_EPSILON) if kind == "zeroth_order" else None
    for step, batch in enumerate(data.long()):

        def measure(batch=batch):
            logits = answer_logits(model, batch, kept)
            return functional.cross_entropy(logits.flatten(0, 1), batch[:, -kept:].flatten()).item()

        loss = functional.cross_entropy(answer_logits(model, batch, kept).flatten(0, 1), batch[:, -kept:].flatten())
        optimizer.zero_grad()
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        losses.append(loss.item())
        if perturbed is not None:
            two_point_step(perturbed, measure, seed=start.seed, step=step, rate=ZEROTH_LR, directions=DIRECTIONS)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        return losses, answer_logits(model, data[0].long(), kept), count


def zeroth_parameters(model):
    """The weights under adapters."""
    return [(name, p) for name, p in model.named_parameters() if name.endswith(".base_layer.weight")]


@pytest.mark.parametrize(
    "kind",
    ["hybrid", "lora", "dora", "full", "zeroth_order", "hybrid:mlp", "lora:attention", "dora:mlp", "full:attention"],
)
def test_a_replica_is_the_model_that_is_trained_alone(kind, base, problems):
    start, other = Start("tiny", "double_add", 5), Start("tiny", "subtract", 6)
    candidates = find_candidates(base)
    plain, _, component = kind.partition(":")
    rank, frozen = 0 if plain == "full" else RANK, frozen_names(component, candidates)
    choice = Choice(full_names(kind, candidates), rank, plain == "dora", kind == "zeroth_order", frozen)
    zeroth = ZEROTH_LR if choice.zeroth else 0.0
    # With all modules adapted or tuned, and nothing frozen.
    full = full_names("full", candidates)
    beside = dataclasses.replace(choice, full={"hybrid": full[:3], "full": full}.get(plain, ()), frozen=())
    runs = [
        Run("other", other, dataclasses.replace(beside, rank=rank and 4), 1e-2, 1e-3, STEPS, 3 * zeroth),
        Run(kind, start, choice, FULL_LR, LORA_LR, STEPS, zeroth),
    ]
    data = torch.stack([problems.drawn(r.start.task, r.start.seed, "train", STEPS, 8) for r in runs])
    expected, logits, count = one_at_a_time(kind, base, data[1], start)

    shared = SharedParts(base, 8, torch.device("cpu"), torch.float64)
    replicas = Replicas(shared, runs, SCALE, DECAY, CLIP, ZEROTH_EPSILON, DIRECTIONS)
    losses = []
    for step in range(STEPS):
        batch = data[:, step].long()

        def losses_of(weights, batch=batch):
            return -answer_log_probs(shared.logits(weights, batch[..., :-1], 3), batch[..., -3:]).mean(dim=(1, 2))

        loss = losses_of(replicas.weights())
        replicas.step(loss)
        replicas.zeroth_step(losses_of)
        losses.append(loss[1].item())
    assert losses == pytest.approx(expected, rel=1e-10)
    assert losses[-1] != losses[0]
    found = shared.logits(replicas.weights(), data[:, 0].long()[..., :-1], 3)[1]
    torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-10)
    assert trainable_parameters(candidates, choice) == count
    if kind == "zeroth_order":
        moved = [(replicas.frozen.held[t][:, 1] - shared.matrices[t]).abs().max().item() for t in shared.matrices]
        assert min(moved) > 10 * ZEROTH_LR * 1e-3, "it would be LoRA alone"
    # What does not train has not moved.
    held = replicas.weights().matrices
    for name in frozen:
        layer, type_ = int(name.split(".")[2]), name.rpartition(".")[2]
        assert torch.equal(held[type_][layer, 1], shared.matrices[type_][layer]), name
        assert not torch.equal(held[type_][layer, 0], shared.matrices[type_][layer]), "of the run beside it"
    if plain == "hybrid":
        for (type_, which), tensor in replicas.trained.items():
            if which == "weight":
                still = tensor.mask[:, 1].flatten() == 0
                torch.testing.assert_close(tensor.value[still, 1], shared.matrices[type_][still], rtol=0, atol=0)


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    """The protocol on a base that was trained a little."""
    made = SftProtocol(BLOCK, tmp_path_factory.mktemp("replicas"), "cpu", ["tiny"], ["double_add", "subtract"])
    made.prepare(lambda text: None)
    return made


def make_run(arm: str, seed: int = 0, task: str = "subtract", full: int = 2, rank: int = RANK, **changes) -> Run:
    names = full_names("full", make_run.candidates)[:full]
    values = dict(full_lr=FULL_LR, lora_lr=LORA_LR, steps=STEPS)
    return Run(arm, Start("tiny", task, seed), Choice(names, rank), **(values | changes))


def outcomes(protocol, runs) -> dict[str, object]:
    found = {}
    protocol.train(runs, lambda run, outcome: found.update({run.arm: outcome}))
    return found


def test_an_outcome_does_not_depend_on_the_runs_beside_it(protocol):
    make_run.candidates = protocol.candidates("tiny")
    asked = make_run("asked", seed=3)
    alone = outcomes(protocol, [asked])["asked"]
    assert [step for step, _ in alone.curve] == [0, 3, 6, 7]
    assert not alone.diverged and 0 <= alone.measures["exact_match"] <= 1
    others = [make_run(f"other{i}", seed=i, task="double_add", full=1 + i, full_lr=1e-2) for i in range(6)]
    for place in (0, 2, 3, 5):
        assert outcomes(protocol, [*others[:place], asked, *others[place:]])["asked"] == alone
    longer = outcomes(protocol, [asked, make_run("longer", seed=3, steps=STEPS + 4)])
    assert longer["asked"] == alone
    assert [step for step, _ in longer["longer"].curve] == [0, 3, 6, 9, 11]
    assert longer["longer"].curve[:3] == alone.curve[:3]
    # Runs that cannot train together, and one that is no number, change nothing either.
    wild = make_run("wild", seed=3, full_lr=1e30)
    mixed = outcomes(
        protocol, [make_run("full", full=14, rank=0), wild, asked, make_run("rank", rank=4), make_run("wide", rank=5)]
    )
    assert mixed["asked"] == alone
    assert mixed["wild"].diverged and mixed["wild"].curve[0] == alone.curve[0]
    assert math.isfinite(mixed["wild"].curve[-1][1]) and len(mixed["wild"].curve) < 4


def test_processes_train_to_the_same_bits_as_one(tmp_path):
    """The command of a user: two bases and kinds of arms, trained in one process and then in two."""
    plan = {
        "name": "processes", "protocol": "sft", "settings": BLOCK, "bases": ["tiny"], "tasks": ["subtract"], "steps": 4,
        "arms": ["random", "lora", "full"], "seeds": {"tune": [100], "compare": [0, 1, 2]}, "draws": 2,
        "rates": {"full": [1e-3, 3e-3], "lora": [1e-2]}, "primary": [{"arm": "random", "against": ["lora"]}],
        "resamples": 1000,
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, workers in (("one", 1), ("two", 2)):
            run_stages(
                EvidenceCommandConfig(
                    plan=str(tmp_path / "plan.yaml"), output_dir=str(tmp_path / name), workers=workers, device="cpu"
                )
            )
    finally:
        torch.set_num_threads(threads)
    one, two = ((tmp_path / name / "runs.jsonl").read_text().splitlines() for name in ("one", "two"))
    # 12 of the starts that are compared, and 6 at two rates; adapters alone have one rate and are not tuned.
    assert len(one) == 18 and sorted(one) == sorted(two)
    assert (tmp_path / "one/report.md").read_bytes() == (tmp_path / "two/report.md").read_bytes()


def test_every_step_of_the_runs_that_were_asked_for_is_told_as_it_is_taken(protocol, monkeypatch):
    make_run.candidates = protocol.candidates("tiny")
    told, kept = [], []
    monkeypatch.setattr(protocol, "stepped", told.append)
    runs = [make_run(f"run{i}", seed=i, steps=STEPS + i) for i in range(6)] + [make_run("full", full=14, rank=0)]
    protocol.train(runs, lambda run, outcome: kept.append(sum(told)))
    assert sum(told) == sum(run.steps for run in runs) and max(told) == 4
    assert 0 < kept[0] < sum(told), "the first group is told before it is kept, and the others after"


def test_the_curve_begins_at_the_base_and_learns(protocol):
    make_run.candidates = protocol.candidates("tiny")
    runs = [make_run(task, task=task, full=14, rank=0, steps=30) for task in ("double_add", "subtract", "add")]
    found, model = outcomes(protocol, runs), protocol.model("tiny")
    for run in runs:
        held_out, kept = protocol.problems.held_out(run.start.task).long(), protocol.layout.answer_tokens
        with torch.no_grad():
            logits = answer_logits(model, held_out, kept)
        loss = functional.cross_entropy(logits.flatten(0, 1), held_out[:, -kept:].flatten()).item()
        assert found[run.arm].curve[0][1] == pytest.approx(loss, rel=1e-5)
        right = (logits.argmax(-1) == held_out[:, -kept:]).all(-1).double().mean().item()
        unmoved = outcomes(protocol, [dataclasses.replace(run, full_lr=0.0, steps=1)])[run.arm]
        assert unmoved.measures["exact_match"] == pytest.approx(right)
    assert found["double_add"].curve[-1][1] < found["double_add"].curve[0][1]
    assert found["subtract"].curve[-1][1] < found["subtract"].curve[0][1]


def test_zeroth_order_beside_other_runs_and_what_it_costs(protocol):
    make_run.candidates = protocol.candidates("tiny")
    asked = make_run("asked", full=0, seed=3, zeroth_lr=1e-3)
    asked = dataclasses.replace(asked, choice=dataclasses.replace(asked.choice, zeroth=True))
    alone = outcomes(protocol, [asked])["asked"]
    lora = dataclasses.replace(asked, arm="lora", choice=Choice((), RANK), zeroth_lr=0.0)
    others = [
        dataclasses.replace(asked, arm=f"other{i}", start=Start("tiny", "subtract", i), zeroth_lr=1e-2)
        for i in range(5)
    ]
    found = outcomes(protocol, [*others[:3], lora, asked, *others[3:]])
    assert found["asked"] == alone and found["other3"].curve != alone.curve
    # A rate of 0 is LoRA alone, at the price of two forward passes more a step.
    still = outcomes(protocol, [dataclasses.replace(asked, zeroth_lr=0.0)])["asked"]
    assert dict(still.curve) == pytest.approx(dict(found["lora"].curve)) and found["lora"].curve != alone.curve
    assert still.trainable_parameters == found["lora"].trainable_parameters
    config, candidates = protocol.model("tiny").config, protocol.candidates("tiny")
    rows, positions, kept = 8, protocol.layout.tokens - 1, protocol.layout.answer_tokens
    forward = sum(2 * rows * positions * (c.in_features * c.out_features + c.lora_parameters(RANK)) for c in candidates)
    forward += 4 * rows * positions**2 * config.hidden_size * config.num_hidden_layers
    forward += 2 * rows * kept * config.hidden_size * config.vocab_size
    assert (still.flops - found["lora"].flops) / STEPS == pytest.approx(2 * forward)


def test_an_epoch_has_the_same_problems_in_another_order(tmp_path):
    layout = Layout(2, False)
    problems = Problems(layout, 500)
    drawn = problems.reshuffled("subtract", 1, "train", 10, 8, 24)
    assert torch.equal(problems.reshuffled("subtract", 1, "train", 7, 8, 24), drawn[:7])
    epochs = [drawn[first : first + 3].flatten(0, 1) for first in (0, 3, 6)]
    rows = [[tuple(row) for row in epoch.tolist()] for epoch in epochs]
    assert len(set(rows[0])) == 24 and set(rows[0]) == set(rows[1]) == set(rows[2])
    assert rows[0] != rows[1] != rows[2]
    held_out = {tuple(row) for row in problems.held_out("subtract").tolist()}
    assert not held_out & set(rows[0])
    assert not torch.equal(problems.reshuffled("subtract", 2, "train", 10, 8, 24), drawn)
    with pytest.raises(ConfigurationError, match="train_problems: 9600 of the 9,500 pairs"):
        problems.reshuffled("subtract", 1, "train", 10, 8, 9600)
    protocol = SftProtocol(BLOCK | {"train_problems": 24}, tmp_path, "cpu", ["tiny"], ["subtract"])
    (steps,) = protocol._drawn("subtract", 1, 10)
    assert len({tuple(row) for row in steps.flatten(0, 1).tolist()}) == 24


PROBE = {"warmup_steps": 3, "partitions": 4, "batch_size": 8, "lr": 4e-3, "full_lr": 4e-3}


def test_arms_choose_by_the_projects_probe_and_share_it(tmp_path, monkeypatch):
    from hybrid_lora_plugin.evidence.replicas import selection

    protocol = SftProtocol(BLOCK | {"probe": PROBE}, tmp_path, "cpu")
    protocol.prepare(lambda text: None)
    candidates, before = protocol.candidates("tiny"), protocol.model("tiny").state_dict()
    before = {name: value.clone() for name, value in before.items()}
    begun = []

    class Counted(selection.Probes):
        def _probe(self, config, name):
            begun.append(name)
            return super()._probe(config, name)

    monkeypatch.setattr("hybrid_lora_plugin.evidence.replicas.sft.Probes", Counted)
    share = {"budget.ratio": 0.3, "budget.overflow": "skip"}
    trial = {"portfolio": ["hybrid", "gradient_norm"], "draws": 1, "steps": 2, "rounds": 1, "held_out_rows": 16}
    trial = {f"trial.{name}": value for name, value in (trial | {"full_lr": 1e-3, "lora_lr": 4e-3}).items()}
    criteria = ("hybrid", "gradient_norm", "snip", "full_pruning", "random", "perturbation")
    arms = [Arm(name, "hybrid", {"criterion": name, **share}, rank=RANK) for name in criteria]
    arms += [
        Arm("reversed", "hybrid", {"criterion": "hybrid", "direction": "highest", **share}, rank=RANK),
        Arm("random/1", "hybrid", {"criterion": "random", **share}, rank=RANK, draw=1),
        Arm("named", "hybrid", {"criterion": "explicit", "control.modules": [candidates[3].name]}, rank=RANK),
        Arm("longer", "hybrid", {"criterion": "hybrid", "probe.warmup_steps": 5, **share}, rank=RANK),
        Arm("trial", "hybrid", {"criterion": "trial", **trial, **share}, rank=RANK),
    ]
    start = Start("tiny", "subtract", 4)
    chosen = protocol.choose(start, arms)
    # One of its own for what a method measures for one criterion alone, and one for other settings.
    assert begun == ["svd_lora", "full_delta", "svd_lora", "svd_lora"]
    assert chosen["named"] == (candidates[3].name,)
    assert chosen["hybrid"] and chosen["hybrid"] != chosen["reversed"]
    assert chosen["random"] != chosen["random/1"]
    # Of probes that were there, and a draw with the seed of the first random arm.
    assert chosen["trial"] in {chosen["hybrid"], chosen["gradient_norm"], chosen["random"]}
    order = [candidate.name for candidate in candidates]
    sizes = {candidate.name: candidate.parameters for candidate in candidates}
    for name, modules in chosen.items():
        assert list(modules) == sorted(modules, key=order.index)
        assert name == "named" or sum(sizes[m] for m in modules) <= 0.3 * sum(sizes.values())
    assert protocol.choose(start, arms) == chosen

    # The look ahead measures what the paper's probe does, bit for bit, so one probe serves both, asked in any order.
    looking = Arm("lookahead", "hybrid", {"criterion": "lookahead", **share}, rank=RANK)
    begun.clear()
    together = protocol.choose(start, [*arms[:3], looking])
    assert begun == ["lookahead"]
    assert together == {name: chosen[name] for name in criteria[:3]} | protocol.choose(start, [looking])
    measured = []
    for asked in (arms[:3], [looking, *arms[:3]]):
        probes = Counted(
            protocol.model("tiny"),
            protocol.device,
            *(
                lambda at, rows, of=of: batch_of(protocol.problems.drawn("subtract", at, of, 1, rows)[0], 3)
                for of in "ab"
            ),
        )
        probes.choose_all(asked, protocol.settings.probe, RANK, 4)
        config = selection.selection_config(arms[0], protocol.settings.probe, RANK, 4)
        measured.append(probes.measurements(config))
    for name, values in measured[0].items():
        assert torch.equal(values, measured[1][name])

    for name, value in protocol.model("tiny").state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ConfigurationError, match="arm wrong: selection.budget.share is no option"):
        protocol.choose(start, [Arm("wrong", "hybrid", {"criterion": "hybrid", "budget.share": 1})])
    with pytest.raises(ConfigurationError, match="arm trial: trial.full_lr: nothing given"):
        protocol.choose(start, [Arm("trial", "hybrid", {"criterion": "trial"}, rank=RANK)])


def test_problems_are_what_they_say_and_held_out_ones_are_never_drawn():
    layout = Layout(2, False)
    problems, names = Problems(layout, 500), renaming().tolist()
    back = {name: digit for digit, name in enumerate(names)}
    held_out = {tuple(row[:5]) for row in problems.held_out("add").tolist()}
    for name, task in TASKS.items():
        drawn = problems.drawn(name, 1, "train", 40, 25)
        assert torch.equal(problems.drawn(name, 1, "train", 50, 25)[:40], drawn)
        assert not torch.equal(problems.drawn(name, 2, "train", 40, 25), drawn)
        for row in drawn.flatten(0, 1).tolist():
            digits = [back[token] if task.renamed and token < 10 else token for token in row]
            a, b, answer = digits[0] * 10 + digits[1], digits[3] * 10 + digits[4], digits[6:]
            right = {
                "add": a + b,
                "subtract": (a - b) % 100,
                "multiply": a * b % 100,
                "double_add": 2 * a + b,
                "renamed_digits": a + b,
            }[name]
            assert answer[0] * 100 + answer[1] * 10 + answer[2] == right
            assert name in ("subtract", "multiply", "renamed_digits") or tuple(row[:5]) not in held_out
    flipped = Problems(Layout(2, True), 500).held_out("add")
    assert torch.equal(flipped[:, 6:].flip(-1), problems.held_out("add")[:, 6:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 8}, "block.batch: unknown; give some of bases"),
        ({"batch_size": 0}, "block.batch_size: 0 is not usable; give at least 1"),
        ({"batch_size": "8"}, "block.batch_size: '8' is not usable; give int"),
        ({"tf32": 1}, "block.tf32: 1 is not usable; give bool"),
        ({"bases": []}, "block.bases: nothing given"),
        ({"bases": [BASE, BASE]}, "block.bases.1..name: 'tiny' is empty, a path or taken"),
        ({"bases": [BASE | {"heads": 3}]}, "block.bases.0..heads: 3 heads"),
        ({"bases": [BASE | {"width": 3}]}, "block.bases.0..width: unknown"),
        ({"probe": {"partitions": 1}}, "block.probe.partitions: 1 is not usable"),
        ({"digits": 5}, "block.digits: 5 makes too many pairs"),
        ({"train_problems": 20}, "block.train_problems: 20 is no multiple of batch_size, 8; give one, e.g. 24"),
        ({"zeroth_epsilon": 0}, "block.zeroth_epsilon: 0.0 is not usable; give above 0"),
    ],
)
def test_a_wrong_setting_is_named(change, said):
    with pytest.raises(ConfigurationError, match=said):
        read_settings(ReplicaSettings, BLOCK | change, "block")
