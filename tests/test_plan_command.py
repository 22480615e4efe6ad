"""``hybrid-lora-plan``: recipes and pasted commands of verl's, composed and never started."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin.cli.plan import main, split  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.plan.live_bytes import LiveBytes  # noqa: E402
from hybrid_lora_plugin.plan.logits import logits_bytes  # noqa: E402
from hybrid_lora_plugin.plan.run import CHUNKED, COMPILED, EAGER, FULL, HYBRID, LORA, Pass, Run  # noqa: E402
from hybrid_lora_plugin.verl_backend.planned_command import (  # noqa: E402
    compose,
    parse_command,
    planned_run,
    recipe_command,
)
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.verl_processes import ROOT  # noqa: E402

PPO = "python3 -m verl.trainer.main_ppo"
GRPO = [
    "algorithm.adv_estimator=grpo", "data.train_batch_size=64", "data.max_prompt_length=100",
    "data.max_response_length=156", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8", "actor_rollout_ref.actor.use_kl_loss=true",
    "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.n=5", "trainer.n_gpus_per_node=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
]  # fmt: skip


def planned(words, model):
    command = parse_command([*words, f"actor_rollout_ref.model.path={model}"])
    return planned_run(compose(command), command)[0]


def test_recipe_of_the_repository_is_planned_as_its_page_starts_it(tiny_qwen2):
    command = recipe_command("qwen2_5_1_5b_gspo_8xa800", str(ROOT / "recipes"), ["data.max_response_length=2048"])
    run, config, name = planned_run(compose(command), command, str(tiny_qwen2))
    assert (run.training, run.gpus, run.shard_ranks, run.strategy, name) == (HYBRID, 8, 8, "fsdp2", str(tiny_qwen2))
    assert (run.prompt_tokens, run.response_tokens, run.sequences, run.mini_batches) == (1024, 2048, 1024, 4)
    assert run.update == Pass(20480) and run.log_probs == Pass(40960, COMPILED) and run.reference == Pass(40960)
    assert not run.reference_model and run.steps == 500 and run.checkpointing and run.lora_rank == 16
    assert (run.rollout.dtype, run.rollout.memory_share, run.rollout.sleep_level) == ("float16", 0.6, 2)
    assert config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("extra", "training"),
    [([], FULL), (["actor_rollout_ref.model.lora_rank=8"], LORA), (["+hybrid_lora=enabled"], HYBRID)],
)
def test_pasted_command_is_what_it_trains(tiny_qwen2, extra, training):
    run = planned([*PPO.split(), *GRPO, *extra], tiny_qwen2)
    assert (run.training, run.gpus, run.sequences, run.mini_batches) == (training, 4, 320, 4)
    assert run.update == Pass(512) and run.log_probs == Pass(1024, COMPILED) and run.padded_by_rows
    # With adapters the actor is its own reference, in its own micro-batches.
    assert run.reference == Pass(2048 if training == FULL else 1024) and run.reference_model == (training == FULL)
    assert run.strategy == ("fsdp2" if training == HYBRID else "fsdp")
    assert run.held_dtype == "float32" and run.stored_dtype == "float32"
    assert (run.rollout.adapter, run.rollout.sleep_level) == ((True, 1) if training == LORA else (False, 2))
    assert run.rollout.tensor_parallel == 2 and run.rollout.max_model_len == 256


def test_settings_that_change_what_is_held_are_read(tiny_qwen2):
    base = [*PPO.split(), *GRPO, "+hybrid_lora=enabled"]
    actor, model, rollout = (f"actor_rollout_ref.{part}." for part in ("actor", "model", "rollout"))
    run = planned(
        [
            *base, f"{actor}use_dynamic_bsz=true", f"{actor}ppo_max_token_len_per_gpu=700", f"{actor}entropy_coeff=0.1",
            f"{actor}entropy_from_logits_with_chunking=true", f"{actor}fsdp_config.param_offload=true",
            f"{actor}fsdp_config.optimizer_offload=true", f"{actor}fsdp_config.fsdp_size=2",
            f"{model}enable_gradient_checkpointing=false", f"{rollout}temperature=0.7",
            f"{rollout}free_cache_engine=false", "hybrid_lora.sync=adapter", f"{model}use_remove_padding=false",
            f"+{model}override_config.attn_implementation=sdpa", "trainer.nnodes=2", "trainer.total_training_steps=7",
        ],
        tiny_qwen2,
    )  # fmt: skip
    assert run.update == Pass(700, CHUNKED) and run.log_probs.tokens == 700, "verl's own follows the actor's"
    assert run.param_offload and run.optimizer_offload and not run.checkpointing and not run.unit_temperature
    assert (run.shard_ranks, run.gpus, run.steps) == (2, 8, 7) and not run.fused_cross_entropy
    assert run.keeps_padding and not planned(GRPO, tiny_qwen2).keeps_padding
    assert run.rollout.adapter and run.rollout.sleep_level == 1 and not run.rollout.sleeps


def test_supervised_run_under_torchrun_is_planned(tiny_qwen2):
    words = (
        "torchrun --standalone --nnodes=1 --nproc_per_node=4 -m verl.trainer.sft_trainer +hybrid_lora=enabled "
        "data.train_batch_size=32 data.max_length=400 data.use_dynamic_bsz=true data.max_token_len_per_gpu=900 "
        f"hybrid_lora.criterion=spread model.path={tiny_qwen2}"
    ).split()
    command = parse_command(words)
    run = planned_run(compose(command), command)[0]
    assert (run.training, run.gpus, run.update, run.rollout) == (HYBRID, 4, Pass(900), None)
    assert run.response_tokens == 400 and run.log_probs is None and run.sequences == 32


def test_recipes_of_the_search_path_and_a_primary_file_of_ones_own(tiny_qwen2, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\ndata:\n  train_batch_size: 48\n")
    command = parse_command(
        [*PPO.split(), "--config-dir", str(tmp_path), "+recipe=mine", *(w for w in GRPO if "train_batch" not in w)]
    )
    assert compose(command).data.train_batch_size == 48
    (tmp_path / "own.yaml").write_text(
        "defaults:\n  - ppo_trainer\n  - _self_\ndata:\n  train_batch_size: 24\n"
        "hydra:\n  searchpath: [pkg://verl.trainer.config]\n"
    )
    command = parse_command([*PPO.split(), f"--config-path={tmp_path}", "--config-name", "own"])
    assert compose(command).data.train_batch_size == 24


MISTAKES = {
    "no program": ("ls -l", "paste it as python -m verl.trainer.main_ppo"),
    "another program": ("python -m verl.trainer.main_eval x=1", "verl.trainer.main_eval: cannot be planned"),
    "an option": (f"{PPO} --multirun x=1,2", "--multirun: this option"),
    "no value": (f"{PPO} --config-dir", "--config-dir: no value"),
    "a typo": (f"{PPO} data.train_batch_sise=4", "train_batch_sise"),
    "no folder": (f"{PPO} --config-dir /nowhere/at/all", "/nowhere/at/all"),
    "no recipe": (f"{PPO} --config-dir {ROOT}/recipes +recipe=nothing", "nothing"),
    "strategy": (
        f"{PPO} +hybrid_lora=enabled actor_rollout_ref.actor.strategy=veomni actor_rollout_ref.model.path=x",
        "actor_rollout_ref.actor.strategy",
    ),
    "no config": (f"{PPO} {' '.join(GRPO)} actor_rollout_ref.model.path=/nowhere/model", "model=FOLDER"),
    "no size": (f"{PPO} actor_rollout_ref.rollout.name=vllm", "ppo_micro_batch_size_per_gpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(mistake, capsys, tiny_qwen2):
    words, said = MISTAKES[mistake]
    extra = [f"actor_rollout_ref.model.path={tiny_qwen2}"] if mistake == "no size" else []
    assert main(["--", *words.split(), *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("hybrid-lora-plan: ") and said in error[0], error


def test_options_that_contradict_are_refused(capsys, tmp_path):
    for own, said in (
        (["recipe=demo", "--", *PPO.split()], "recipe: given together"),
        (["recipe=demo", "reserve=90"], "reserve: 90.0 leaves nothing"),
        (["recipe=demo", f"output_dir={tmp_path}"], "is there already"),
        (["recipe=demo", f"recipes={tmp_path}"], "has no folder recipe"),
        (["utilisation=2", "recipe=demo"], "utilisation"),
    ):
        assert main(own) == 2 and said in capsys.readouterr().err
    assert split(["a=1", "--", "b", "--", "c"]) == (["a=1"], ["b", "--", "c"])
    with pytest.raises(ConfigurationError, match="has no folder recipe"):
        recipe_command("x", str(tmp_path), [])


def test_command_writes_its_files_and_a_change_gives_what_it_promised(tiny_qwen2, tmp_path, capsys):
    allocation = make_allocation(tiny_qwen2, tmp_path / "allocation")
    words = [
        *PPO.split(), *GRPO, "+hybrid_lora=enabled", f"actor_rollout_ref.model.path={tiny_qwen2}",
        f"hybrid_lora.allocation={allocation}", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4096",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1", "actor_rollout_ref.rollout.max_num_seqs=4",
    ]  # fmt: skip
    own = ["gpu_memory=0.3", "reserve=0"]
    assert main([*own, f"output_dir={tmp_path / 'plan'}", "--", *words]) == 1
    said = capsys.readouterr().out
    assert "of the allocation" in said and "What to change" in said and f"written to {tmp_path / 'plan'}" in said
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["plan.json", "plan.png", "plan.txt"]
    changes = found["changes"]
    assert changes and found["problems"] and not found["parameters"]["allocation_drawn"]
    overrides = [override for change in changes for override in change["overrides"]]
    status = main([*own, f"output_dir={tmp_path / 'again'}", "--", *words, *overrides])
    again = json.loads((tmp_path / "again" / "plan.json").read_text())
    assert (status == 0) == found["fits_with_changes"] == (not again["problems"])
    last = changes[-1]
    assert last["total"] == {p["name"]: p["total"] for p in again["phases"]}[last["phase"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("entropy", ["", EAGER, CHUNKED])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_are_what_verls_own_functions_hold(dtype, gradient, entropy, temperature):
    """On a CPU, so with torch's cross entropy."""
    from verl.utils import torch_functional as verls

    tokens, vocabulary, chunk = 64, 2048, 16
    weight = torch.randn(vocabulary, 8, dtype=dtype)
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    live = LiveBytes([weight])
    with torch.set_grad_enabled(gradient), live:
        given = hidden @ weight.T
        logits = given if temperature == 1 else given / torch.full((tokens, 1), temperature).to(dtype)
        loss = 0
        if entropy == CHUNKED:
            loss = verls.entropy_from_logits_with_chunking(logits, chunk_size=chunk).float().sum()
        elif entropy:
            loss = verls.entropy_from_logits(logits).float().sum()
        loss = loss + verls.logprobs_from_logits(logits, torch.zeros(tokens, dtype=torch.int64)).float().sum()
        if gradient:
            loss.backward()
    run = Run(
        FULL, 1, 1, 1, "fsdp2", "bfloat16", "float32", "bfloat16", "float32", Pass(tokens), 1, 1, 1, 1,
        fused_cross_entropy=False, unit_temperature=temperature == 1, entropy_chunk=chunk,
    )  # fmt: skip
    planned_bytes = logits_bytes(run, Pass(tokens, entropy), vocabulary, dtype.itemsize, gradient)
    # What is not of the vocabulary's size is small beside it, but not nothing.
    assert live.peak == pytest.approx(planned_bytes, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("entropy", ["", EAGER])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_of_padded_rows_are_what_verls_own_engine_holds(dtype, gradient, entropy, temperature):
    """verl copies the tokens out of the rows: two tensors more in an update, which the first run on a GPU showed."""
    from verl.utils import tensordict_utils
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    rows, length, vocabulary = 4, 16, 2048
    weight = torch.randn(vocabulary, 8, dtype=dtype)
    hidden = torch.randn(rows, length, 8, dtype=dtype, requires_grad=True)
    ids = torch.nested.nested_tensor([torch.zeros(length, dtype=torch.int64)] * rows, layout=torch.jagged)
    batch = tensordict_utils.get_tensordict(
        {"input_ids": ids},
        {"use_remove_padding": False, "use_fused_kernels": False, "calculate_entropy": bool(entropy)},
    )
    given = {
        "temperature": torch.full((rows,), temperature),
        "temperature_is_one": temperature == 1,
        "input_ids_rmpad_rolled": torch.zeros(rows * length, dtype=torch.int64),
    }
    engine = SimpleNamespace(engine_config=SimpleNamespace(entropy_checkpointing=False))
    live = LiveBytes([weight])
    with torch.set_grad_enabled(gradient), live:
        output = SimpleNamespace(logits=hidden @ weight.T)
        found = FSDPEngineWithLMHead.prepare_model_outputs(engine, output, given, batch, None)
        del output
        if gradient:
            sum(found[name].values().float().sum() for name in ("log_probs", "entropy") if name in found).backward()
    run = Run(
        FULL, 1, 1, 1, "fsdp2", "bfloat16", "float32", "bfloat16", "float32", Pass(rows * length), 1, 1, 1, 1,
        fused_cross_entropy=False, unit_temperature=temperature == 1, keeps_padding=True,
    )  # fmt: skip
    planned_bytes = logits_bytes(run, Pass(rows * length, entropy), vocabulary, dtype.itemsize, gradient)
    assert live.peak == pytest.approx(planned_bytes, rel=0.05)
