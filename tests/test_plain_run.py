"""With the plugin installed and ``hybrid_lora`` absent, verl does what it does without the plugin, bit for bit."""

from __future__ import annotations

import json
import sys

import pandas
import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run, run_engine, torchrun  # noqa: E402

pytestmark = pytest.mark.verl

#: verl without the plugin; on a machine without a GPU verl itself still needs a platform to stand on
WITHOUT = {
    "VERL_USE_EXTERNAL_PLUGINS": "none",
    "VERL_USE_EXTERNAL_MODULES": "hybrid_lora_plugin.verl_backend.cpu.platform",
}


def test_importing_verl_loads_no_more_with_the_plugin():
    loaded = "import sys, verl; print('loaded:', *sys.modules)"
    found, plain = (
        set(run(["-c", loaded], **environment).stdout.rpartition("loaded:")[2].split()) for environment in ({}, WITHOUT)
    )
    more = {name.partition(".")[0] for name in found - plain}
    assert "hybrid_lora_plugin.verl_backend.registration" in found - plain
    assert more <= {"hybrid_lora_plugin", "packaging", "wrapt"} | set(sys.stdlib_module_names), sorted(found - plain)


def test_loss_and_advantage_are_there_where_verl_looks_for_them():
    look = (
        "import verl\nfrom verl.trainer.ppo import core_algos\n"
        "print(core_algos.get_policy_loss_fn('hybrid_gspo').__name__, "
        "core_algos.get_adv_estimator_fn('hybrid_group').__name__)"
    )
    assert run(["-c", look]).stdout.split()[-2:] == ["hybrid_gspo", "hybrid_group"]
    # Somebody else's advantage of that name: a plain run goes on, and says so.
    taken = look.replace(
        "from verl", "import hybrid_lora_plugin.verl_backend.advantages as a\na.register = lambda: 1 / 0\nfrom verl"
    )
    said = run(["-c", taken], check=False)
    assert "loss and advantage are not registered: division by zero" in said.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_qwen2(tmp_path_factory.mktemp("plain") / "model", tie_word_embeddings=False)


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "verl-lora"])
def test_verl_sft_run_has_the_same_losses(lora_rank, model, tmp_path):
    """verl's own SFT trainer from its command line, three steps, same seed."""
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(4)
        for b in range(6)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")

    def metrics(name, **environment):
        torchrun(
            1,
            [
                "-m", "verl.trainer.sft_trainer", f"model.path={model}",
                f"data.train_files={tmp_path / 'rows.parquet'}",
                "data.train_batch_size=8", "data.micro_batch_size_per_gpu=4", "data.use_dynamic_bsz=false",
                "data.num_workers=0", "data.max_length=64", f"model.lora_rank={lora_rank}",
                "model.use_remove_padding=false",
                "+model.override_config.attn_implementation=sdpa", "engine.strategy=fsdp2",
                "engine.use_torch_compile=false",
                "optim.lr=1e-3", "trainer.total_training_steps=3", "trainer.device=cpu",
                "trainer.logger=[console,file]",
                "engine.full_determinism=true", "engine.seed=1",  # verl draws LoRA's A without a seed otherwise
                "trainer.resume_mode=disable", f"trainer.default_local_dir={tmp_path / name}",
                f"hydra.run.dir={tmp_path / 'hydra'}",
            ],
            VERL_FILE_LOGGER_PATH=str(tmp_path / f"{name}.jsonl"),
            **environment,
        )  # fmt: skip
        lines = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        return [{k: v for k, v in line["data"].items() if k in ("train/loss", "train/grad_norm")} for line in lines]

    with_plugin = metrics("with")
    assert len(with_plugin) >= 3 and with_plugin[0]["train/loss"] > 0
    assert with_plugin == metrics("without", **WITHOUT)


def test_plain_policy_gradient_engine_is_verls_own_and_trains_the_same_weights(model, tmp_path):
    """Even where the engine registration was imported, a model without the ``hybrid`` node gets verl's class."""
    ours = run_engine(tmp_path / "with", 1, model=model, loss="vanilla", import_engine_registration=True)
    plain = run_engine(tmp_path / "without", 1, WITHOUT, model=model, loss="vanilla")
    assert ours["engine"] == plain["engine"] == "verl.workers.engine.fsdp.transformer_impl.FSDPEngineWithLMHead"
    assert ours["steps"] == plain["steps"]
    assert all(torch.equal(tensor, plain["trained"][name]) for name, tensor in ours["trained"].items())
    assert any(not torch.equal(tensor, ours["start"][name]) for name, tensor in ours["trained"].items())
