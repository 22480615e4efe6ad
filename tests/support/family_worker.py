"""Runs by itself: takes tiny models all the way, from the probe over every sync mode into a real vLLM to the export.

``python -m tests.support.family_worker OUT.json FAMILY``; vLLM's engines live in this process, without Ray. What lies
between a trainer and an engine is the plugin's own stream at one end and its own reception at the other.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.transformers.base import Base

from hybrid_lora_plugin.allocation import load_allocation
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.allocation.storage import allocation_text
from hybrid_lora_plugin.candidates import TYPE_ORDER, architecture_of
from hybrid_lora_plugin.cli.arguments import parse
from hybrid_lora_plugin.config import AllocateCommandConfig, ProbeCommandConfig
from hybrid_lora_plugin.config_selection import ControlConfig
from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.names import wire_name
from hybrid_lora_plugin.probing.runner import run_probe
from hybrid_lora_plugin.report import artifact
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.received import compare_entries
from hybrid_lora_plugin.sync.wire import MANIFEST, entries_of, read_manifest
from hybrid_lora_plugin.training.apply import parts_of
from hybrid_lora_plugin.training.checkpoint import CheckpointDescription, save_trained
from hybrid_lora_plugin.training.export import export_checkpoint
from hybrid_lora_plugin.verl_backend.receiver.server import WORKER_EXTENSION
from hybrid_lora_plugin.verl_backend.receiver.vllm_model import VllmRolloutModel
from hybrid_lora_plugin.verl_backend.receiver.worker import Reception
from tests.support import names_of_torchvision
from tests.support.hybrid_model_engine import HybridModelEngine
from tests.support.tiny_families import NO_ADAPTER_FILES, NO_FLOAT32, make_family
from tests.support.tiny_models import sums, write_jsonl

RANK, ALPHA = 4, 8
#: tokens of a rollout, and those of them that are generated
LENGTH, NEW = 48, 12
#: the type of an engine and the modes it takes: exact numbers in one, every bit of a sync in the other
ENGINES = (("float32", ("adapter",)), ("bfloat16", ("merge", "sparse_merge", "receiver_merge")))

# Pictures take as long as all the rest, and show nothing of a family.
artifact.draw_heatmap = artifact.draw_scores = lambda *_: None
names_of_torchvision.provide()
# Where vLLM has no model of its own for a family, it marks the class of transformers for compiling, and that is the
# trainer's class, too, here in the same process. Nothing is compiled in eager mode.
Base._decorate_for_torch_compile = lambda _: None


def probed(model: Path, folder: Path) -> Path:
    """A probe of ``model``, and from it an artifact that tunes each type fully in one layer and not in the other."""
    rows = write_jsonl(folder / "rows.jsonl", sums(24))
    arguments = [
        f"model.path={model}", f"probe.files=[{rows}]", f"output_dir={folder / 'probe'}", f"lora.rank={RANK}",
        "probe.warmup_steps=2", "probe.partitions=2", "probe.batch_size=2", "probe.max_length=64", "budget.ratio=0.5",
    ]  # fmt: skip
    before = load_allocation(run_probe(parse(arguments, ProbeCommandConfig)))
    chosen = [m.name for m in before.modules if (m.layer + TYPE_ORDER.index(m.type)) % 2 == 0]
    settings = AllocateCommandConfig(criterion="explicit", control=ControlConfig(modules=chosen))
    after = select_modules(
        settings, before.model, before.modules, {}, lora_rank=RANK, probe=before.probe, environment=before.environment
    )
    (folder / "allocation.json").write_text(allocation_text(after))
    return folder / "allocation.json"


class Pair:
    """A hybrid model and a vLLM engine that starts from the same checkpoint."""

    def __init__(self, model: Path, allocation: Path, dtype: str, adapter: bool):
        self.trainer = HybridModelEngine(0, str(model), str(allocation), rank=RANK, alpha=ALPHA, dtype=dtype)
        # The definition of a family: torch's own attention leaves out Gemma 2's soft cap of the logits.
        self.trainer.model.get_base_model().set_attn_implementation("eager")
        # vLLM looks at a class it has not seen in a process of its own, which takes longer than all the rest.
        name = architecture_of(self.trainer.model.config)
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
        options = dict(enable_lora=True, max_loras=1, max_lora_rank=8) if adapter else {}
        self.engine = LLM(
            str(model),
            dtype=dtype,
            load_format="safetensors",
            enforce_eager=True,
            max_model_len=LENGTH + 1,
            max_num_seqs=2,
            num_gpu_blocks_override=32,
            worker_extension_cls=WORKER_EXTENSION,
            **options,
        )
        self.worker = self.engine.llm_engine.model_executor.driver_worker.worker
        self.adapter, self._last = adapter, None
        self._rollout = VllmRolloutModel(self.worker)

    def sync(self, mode: str) -> dict[str, torch.Tensor]:
        """One sync with all its proofs; returns what was sent."""
        self.trainer.configure(mode, None, False)
        reception = Reception(self._rollout, None, None, None, self._last, self._last)
        sent = [(name, tensor.clone()) for name, tensor in self.trainer._stream()]
        for bucket in _buckets(sent):
            # A transfer buffer is written again when it has been taken.
            views = [(name, tensor.clone()) for name, tensor in bucket]
            reception.take(views)
            for _, view in views:
                view.view(torch.uint8).fill_(0xA5) if view.dim() else None
        report = reception.finish()
        self._reception = reception
        content, manifest = read_manifest(dict(sent)[MANIFEST])
        compare_entries(manifest, entries_of(report["tensors"]), "sent", "loaded", see="engine-holds-other-weights")
        sync_mode(mode).check_reports(reception.header, content.get("account", {}), [report])
        self._last = reception.header.run, reception.header.number
        return dict(sent)

    def differences(self, adapter: LoRARequest | None = None) -> list[float]:
        """Of each log-probability of two rollouts, how far hybrid model and engine are apart, nats.

        Args:
            adapter: that the engine takes, in place of the one that was synced.
        """
        if self.adapter and adapter is None:
            adapter = LoRARequest(VLLM_LORA_NAME, VLLM_LORA_INT_ID, VLLM_LORA_PATH)
        self.engine.reset_prefix_cache()
        prompts = [tokens[: LENGTH - NEW] for tokens in self.trainer._prompts[:2]]
        answers = self.engine.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            SamplingParams(max_tokens=NEW, logprobs=0, temperature=1.0, ignore_eos=True, seed=0),
            use_tqdm=False,
            lora_request=adapter,
        )
        found = []
        for tokens, answer in zip(prompts, answers, strict=True):
            (rollout,) = answer.outputs
            new = list(rollout.token_ids)
            theirs = self.trainer.log_probs(tokens + new)[-NEW:]
            ours = [entry[token].logprob for token, entry in zip(new, rollout.logprobs, strict=True)]
            found += [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
        return found

    def tampered(self) -> dict[str, str | None]:
        """Of each of vLLM's parameters, its first row and its last: what the read-back says when it is not as sent."""
        found = {}
        for name, parameter in self.worker.model_runner.model.named_parameters():
            # Of an embedding and of a head the last rows are padding.
            for row in {0, len(parameter) - 1} if name.endswith("weight") and "layers" in name else {0}:
                with torch.no_grad():
                    before = parameter[row].clone()
                    parameter[row] += 0.5
                try:
                    self._reception._received.prove(self._rollout.verify())
                    found[f"{name} {row}"] = None
                except WeightSyncError as error:
                    found[f"{name} {row}"] = str(error).partition(": ")[0]
                with torch.no_grad():
                    parameter[row] = before
        self._reception._received.prove(self._rollout.verify())
        return found

    def close(self) -> None:
        """Let another engine begin in this process."""
        destroy_model_parallel()
        destroy_distributed_environment()


def _buckets(pairs: list[tuple[str, torch.Tensor]], size: int = 5) -> Iterator[list[tuple[str, torch.Tensor]]]:
    rest = iter(pairs)
    while bucket := list(islice(rest, size)):
        yield bucket


def saved(trainer: Any, model: Path, allocation: Path, folder: Path) -> Path:
    """A checkpoint of what the trainer holds."""
    state, header = trainer.model.state_dict(), trainer._source._last.header
    tensors = {wire_name(name): state[name].float().clone() for name in parts_of(trainer.model).trained}
    description = CheckpointDescription(
        str(model), RANK, ALPHA, 1, header.dtype, header.rounding_mode, header.rounding_seed, "float32"
    )
    save_trained(folder, tensors, description, allocation.read_text())
    return folder


def exported(trainer: Any, model: Path, allocation: Path, folder: Path, merged: dict[str, torch.Tensor]) -> dict:
    """Save a checkpoint, export it and load it again; ``merged`` is what mode ``merge`` sent of the same weights."""
    saved(trainer, model, allocation, folder / "step")
    seen = {}
    for dtype in ("auto", "float32"):
        export_checkpoint(folder / "step", folder / f"merged-{dtype}", dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder / f"merged-{dtype}", dtype="auto", attn_implementation="eager"
        )
        if dtype == "auto":
            plain = dict(loaded.named_parameters())
            seen["differs"] = [name for name, tensor in plain.items() if not torch.equal(tensor, merged[name])]
            seen["compared"] = len(plain)
            seen["sent"] = len(merged)
        else:
            ids = torch.tensor([trainer._prompts[0][:LENGTH]])
            with torch.no_grad():
                difference = loaded(ids).logits.log_softmax(-1) - trainer.model(ids).logits.log_softmax(-1)
            seen["difference"] = difference.abs().max().item()
    return seen


def round_trip(family: str, folder: Path) -> dict[str, Any]:
    """Everything that is seen of one family."""
    model = make_family(family, folder / "model")
    allocation = probed(model, folder)
    record = load_allocation(allocation)
    seen: dict[str, Any] = {
        "types": sorted({module.type for module in record.modules}),
        "full": sorted({module.type for module in record.modules if module.assignment == "full"}),
        "lora": sorted({module.type for module in record.modules if module.assignment == "lora"}),
        "left": sorted({module.type for module in record.modules if module.assignment == "frozen"}),
        "frozen": [one.name for one in record.model.frozen_linear],
        "differences": {},
    }
    for dtype, modes in ENGINES:
        dtype = "bfloat16" if family in NO_FLOAT32 else dtype
        pair = Pair(model, allocation, dtype, adapter="adapter" in modes)
        try:
            if not pair.adapter:
                # From the base, which the engine still holds.
                seen["unsynced"] = pair.differences()
            for number, mode in enumerate(modes):
                # Twice: in the first sync of a run nothing builds on another.
                for step in range(2):
                    pair.trainer.update(10 * number + step)
                    sent = pair.sync(mode)
                    seen["differences"][f"{dtype} {mode} {step}"] = pair.differences()
                if mode == "merge":
                    seen["tampered"] = pair.tampered()
                    seen["export"] = exported(pair.trainer, model, allocation, folder, sent)
            if pair.adapter and family not in NO_ADAPTER_FILES:
                # The engine holds the weights of full modules from the sync, and reads the adapter from the folder.
                checkpoint, adapter = saved(pair.trainer, model, allocation, folder / "float32"), folder / "adapter"
                export_checkpoint(checkpoint, adapter, format="adapter")
                seen["exported_adapter"] = pair.differences(LoRARequest("exported", VLLM_LORA_INT_ID + 1, str(adapter)))
        finally:
            pair.close()
    return seen


def main(out: str, family: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        seen = round_trip(family, Path(folder))
    Path(out).write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
