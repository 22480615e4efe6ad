"""A user who meets an error finds it: messages end with a reference, and the page has an entry for each."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hybrid_lora_plugin.allocation.storage import load_allocation
from hybrid_lora_plugin.errors import (
    TROUBLESHOOTING,
    AllocationError,
    ConfigurationError,
    WeightSyncError,
    explained,
    split_reference,
    with_reference,
)
from hybrid_lora_plugin.probing.resume import PartialState
from hybrid_lora_plugin.sync.wire import HEADER, OutgoingWeights, SyncHeader, packed, read_header, rows_of
from hybrid_lora_plugin.training.checkpoint import CheckpointDescription, require_same_setting, save_trained
from tests.support.allocations import make_allocation
from tests.support.verl_processes import ROOT

PACKAGE = ROOT / "hybrid_lora_plugin"
PAGE = (ROOT / TROUBLESHOOTING).read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
#: files whose refusals stop a resume or a preflight, each of them with a reference
REFUSING = (
    "training/best_checkpoint.py",
    "training/checkpoint.py",
    "probing/resume.py",
    "verl_backend/engine.py",
    "verl_backend/engine_checkpoints.py",
    "verl_backend/checkpoint_writing.py",
    "verl_backend/preflight.py",
    "verl_backend/model_check.py",
    "model_families.py",
    "base_checkpoint.py",
    "verl_backend/requirement_rules.py",
    "verl_backend/requirements.py",
    "verl_backend/zeroth_order_requirements.py",
    "verl_backend/zeroth_order.py",
    "verl_backend/surrogate.py",
    "training/zeroth_order/choice.py",
    "verl_backend/optimizer_settings.py",
    "verl_backend/packed_rows.py",
    "verl_backend/run_settings.py",
    "verl_backend/vllm_arguments.py",
    "verl_backend/checkpoint_files.py",
    "verl_backend/doctor/gate.py",
    "verl_backend/earlier_checkpoint.py",
    "verl_backend/probe/policy.py",
    "verl_backend/probe/policy_engine.py",
    "verl_backend/probe/resume.py",
)


def calls_of(*files):
    """Every call in the sources, as (where, name called, node)."""
    for file in files or sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file}:{node.lineno}", ast.unparse(node.func), node


def references_of(node, name):
    """What a call gives as an anchor."""
    given = [keyword.value for keyword in node.keywords if keyword.arg in ("see", "otherwise")]
    return given + (node.args[1:2] if name == "with_reference" else [])


def anchors():
    """Anchor by the places in the package that name it."""
    found: dict[str, list[str]] = {}
    for where, name, node in calls_of():
        for value in references_of(node, name):
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.setdefault(value.value, []).append(where)
    return found


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def reference(text: str) -> str:
    """The anchor at the end of a message of one line, where it must be, and which must be its only one."""
    assert "\n" not in text and text.count(TROUBLESHOOTING) == 1, text
    rest, anchor = split_reference(text)
    assert anchor and text == with_reference(rest, anchor), text
    assert anchor in {slug(heading) for heading, _ in ENTRIES}
    return anchor


# -- sources and page -------------------------------------------------------------------------------------------------


def test_every_weight_sync_error_has_a_reference_of_its_own_or_of_the_error_it_relays():
    made = [(where, name, node) for where, name, node in calls_of() if name.startswith("WeightSyncError")]
    assert {name for _, name, _ in made} == {"WeightSyncError", "WeightSyncError.relayed"} and len(made) > 50
    wanted = {"WeightSyncError": "see", "WeightSyncError.relayed": "otherwise"}
    bare = [w for w, name, node in made if wanted[name] not in {keyword.arg for keyword in node.keywords}]
    assert bare == []


def test_every_refusal_of_a_resume_or_a_preflight_has_a_reference():
    errors = ("ConfigurationError", "ProbeError", "AllocationError")
    made = [(where, node) for where, name, node in calls_of(*REFUSING) if name in errors]
    assert len(made) > 25
    assert [where for where, node in made if "see" not in {keyword.arg for keyword in node.keywords}] == []


def test_every_rule_of_a_setting_has_a_reference():
    pytest.importorskip("omegaconf")
    from hybrid_lora_plugin.verl_backend import requirement_rules

    slugs = {slug(heading) for heading, _ in ENTRIES}
    tables = [table for name, table in vars(requirement_rules).items() if name.endswith("RULES")]
    assert len(tables) == 7 and all(rule.see in slugs for table in tables for rule in table.values())


def test_an_anchor_is_written_out_or_handed_on():
    for where, name, node in calls_of():
        for value in references_of(node, name):
            handed_on = ast.unparse(value).split(".")[-1] in ("see", "anchor or otherwise", "otherwise")
            assert isinstance(value, ast.Constant) or handed_on, f"{where}: {ast.unparse(value)}"


def test_every_anchor_is_an_entry_of_the_page_and_every_entry_is_used():
    slugs = [slug(heading) for heading, _ in ENTRIES]
    assert len(slugs) == len(set(slugs))
    used = anchors()
    assert {anchor: used[anchor] for anchor in used.keys() - set(slugs)} == {}
    assert set(slugs) - used.keys() == set()


def test_every_entry_has_a_message_a_cause_and_a_way_out():
    assert re.findall(r"^## (.+)$", PAGE, re.M) == ["A weight sync", "A resume", "A preflight"]
    for heading, text in ENTRIES:
        message, cause, way_out = text.strip().split("\n\n")
        assert message.startswith("`") and cause.startswith("**Cause.** ") and way_out.startswith("**Way out.** "), (
            heading
        )


def test_every_excerpt_on_the_page_is_of_a_message_in_the_code():
    """Its words between two … are words of one text, or the whole of it is one with values filled in."""
    texts, filled = [], []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if any(isinstance(word, str) for word in words):
                texts.append("…".join("" if word is None else str(word) for word in words))
                if len(words) > 1 and sum(len(word or "") for word in words) > 12:
                    filled.append("".join(".+?" if word is None else re.escape(word) for word in words))
    known, filled = "\n".join(texts), re.compile("|".join(filled))
    for heading, text in ENTRIES:
        for excerpt in re.findall(r"`([^`]+)`", text.strip().split("\n\n")[0]):
            words = [part.strip(" .:,'()") for part in excerpt.split("…")]
            unknown = [part for part in words if len(part.split()) >= 3 and part not in known]
            assert not unknown or filled.search(excerpt), f"{heading}: {unknown}"


def test_nothing_tells_the_user_to_switch_the_proof_off():
    switch = re.compile(r"sync_check ?= ?off")
    told = [
        w
        for w, _, node in calls_of()
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and switch.search(str(part.value))
    ]
    assert told == [] and not switch.search(PAGE)


# -- through the real objects -----------------------------------------------------------------------------------------


def test_a_refused_header_names_its_entry():
    with pytest.raises(WeightSyncError) as caught:
        read_header("model.norm.weight", torch.ones(2))
    assert reference(str(caught.value)) == "sync-with-parts-missing-or-repeated"
    with pytest.raises(WeightSyncError) as caught:
        read_header(HEADER, packed({"version": 0}))
    assert reference(str(caught.value)) == "another-format-version"


def test_a_resume_with_another_rank_names_its_entry(tiny_qwen2, tmp_path):
    artifact = make_allocation(tiny_qwen2, tmp_path / "allocation")
    text = (artifact / "allocation.json").read_text()
    description = CheckpointDescription(base_model=str(tiny_qwen2), rank=4, alpha=8, global_step=1)
    kept = save_trained(tmp_path / "actor", {"w": torch.ones(1)}, description, text)
    allocation = load_allocation(artifact)
    require_same_setting(kept, allocation, 4, 8)
    with pytest.raises(ConfigurationError) as caught:
        require_same_setting(kept, allocation, 16, 8)
    assert reference(str(caught.value)) == "checkpoint-of-another-setting"
    (kept / "allocation.json").write_text("{ not json")
    with pytest.raises(AllocationError) as caught:
        require_same_setting(kept, allocation, 4, 8)
    assert reference(str(caught.value)) == "checkpoint-cannot-be-read"


def test_an_unfinished_probe_of_another_seed_names_its_entry(tmp_path):
    PartialState(tmp_path / "out", {"seed": 1})
    with pytest.raises(ConfigurationError) as caught:
        PartialState(tmp_path / "out", {"seed": 2})
    assert reference(str(caught.value)) == "unfinished-probe-of-other-settings"
    (tmp_path / "out.partial" / "settings.json").write_text(json.dumps({"seed": 1})[:-1])
    with pytest.raises(ConfigurationError) as caught:
        PartialState(tmp_path / "out", {"seed": 1})
    assert reference(str(caught.value)) == "unfinished-probe-cannot-be-used"


def test_explained_keeps_an_error_and_the_reference_it_has():
    for see, wanted in ((None, "stale-weights"), ("other-side-failed", "other-side-failed")):
        error = ConfigurationError("field: 1; give 2", see=see)
        with pytest.raises(ConfigurationError) as caught, explained(otherwise="stale-weights"):
            raise error
        assert caught.value is error and reference(str(error)) == wanted


# -- through verl's own classes ---------------------------------------------------------------------------------------

CAUSE = WeightSyncError("weight3: does not fit", see="engine-cannot-load-a-weight")


@pytest.fixture(scope="module")
def server_adapter():
    pytest.importorskip("verl", reason="verl is not installed")
    from hybrid_lora_plugin.verl_backend.sender import server_adapter

    return server_adapter


def failed_sync(server_adapter, stream) -> str:
    """What the sending end raises on a rank without an engine of its own."""
    adapter = server_adapter.HybridLoraServerAdapter.__new__(server_adapter.HybridLoraServerAdapter)
    adapter.model_config = SimpleNamespace(lora={"hybrid": {"sync_timeout": 5.0, "first_sync_timeout": 5.0}})
    adapter._has_server = False
    with pytest.raises(WeightSyncError) as caught:
        asyncio.run(adapter.update_weights(stream, global_steps=3))
    return str(caught.value)


def failing(error):
    raise error
    yield


def test_an_error_of_the_stream_is_wrapped_and_ends_with_one_reference(server_adapter):
    text = failed_sync(server_adapter, iter([("model.norm.weight", torch.ones(2))]))
    assert reference(text) == "sync-with-parts-missing-or-repeated"
    assert "failed on rank 0: the sync begins with 'model.norm.weight'" in text
    assert "continue from the last checkpoint [docs/" in text


def test_an_error_of_another_package_is_wrapped_with_a_general_reference(server_adapter):
    text = failed_sync(server_adapter, failing(MemoryError("no memory for weight5")))
    assert reference(text) == "error-from-outside-the-plugin" and "MemoryError: no memory for weight5" in text


def test_an_error_that_ray_brought_keeps_its_reference_through_two_wrappings(server_adapter):
    from ray.exceptions import RayTaskError

    # As Ray makes it of an actor's error: a traceback whose last line is the error.
    lines = ["Traceback (most recent call last):", "  …", f"{WeightSyncError.__module__}.WeightSyncError: {CAUSE}"]
    brought = RayTaskError("end_weight_sync", "\n".join(lines), CAUSE).as_instanceof_cause()
    assert isinstance(brought, WeightSyncError)
    text = failed_sync(server_adapter, failing(brought))
    assert reference(text) == "engine-cannot-load-a-weight" and "rank 0: weight3: does not fit. The run ends" in text
    assert reference(str(WeightSyncError.relayed(f"again: {text}", otherwise="stale-weights"))) == reference(text)


def test_an_acknowledged_error_ends_with_one_reference_whoever_it_came_from(server_adapter):
    from hybrid_lora_plugin.verl_backend.receiver.worker import _text
    from hybrid_lora_plugin.verl_backend.transport import LimitedReceiver
    from tests.test_sync_transport import in_thread, send

    for number, (error, wanted) in enumerate(
        [(CAUSE, "engine-cannot-load-a-weight"), (KeyError("weight3"), "error-from-outside-the-plugin")]
    ):
        handle = f"ipc:///tmp/hl-see-{torch.randint(1 << 40, ()).item()}-{number}.sock"

        def receive(handle=handle, error=error):
            receiver = LimitedReceiver(handle, torch.device("cpu"), True, limit=10.0)
            receiver.receive_weights(lambda weights, is_last: receiver.answer({"error": _text(error)}))

        wait = in_thread(receive)
        with pytest.raises(WeightSyncError) as caught:
            send(handle)
        wait()
        assert reference(str(caught.value)) == wanted


def test_a_report_of_other_weights_or_of_another_step_names_its_entry(server_adapter):
    header = SyncHeader(run="r", number=4, mode="merge", dtype="float32", digests=True)
    sent, other = (OutgoingWeights(header, [("weight", torch.full((2,), value))]) for value in (1.0, 2.0))
    for stream in (sent, other):
        list(stream)
    passing = server_adapter.PassingWeights(iter([]), server_adapter.waits.Limits(5.0, 5.0, ""))
    passing.header, passing.manifest = header, sent.entries
    compare = server_adapter.HybridLoraServerAdapter._compare
    report = {"run": "r", "number": 4, "step": 3, "tensors": rows_of(sent.entries)}
    compare(passing, report, 3)
    for change, wanted in (
        ({"tensors": rows_of(other.entries)}, "engine-holds-other-weights"),
        ({"step": 2}, "stale-weights"),
    ):
        with pytest.raises(WeightSyncError) as caught:
            compare(passing, report | change, 3)
        assert reference(str(caught.value)) == wanted


@pytest.fixture
def stopped(tiny_qwen2, tmp_path):
    """The line with which the preflight ends a run, one mistake added to a configuration that it accepts."""
    pytest.importorskip("verl", reason="verl is not installed")
    from hybrid_lora_plugin.verl_backend.preflight import Preflight, RunRefused
    from tests.test_verl_configuration import composed

    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "response": "2"}\n')

    def line(*mistake: str) -> str:
        config = composed(
            "+hybrid_lora=enabled",
            f"actor_rollout_ref.model.path={tiny_qwen2}",
            f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
            "actor_rollout_ref.rollout.name=vllm",
            f"hybrid_lora.probe.files=[{tmp_path / 'rows.jsonl'}]",
            "hybrid_lora.lora.rank=4",
            "hybrid_lora.budget.ratio=0.3",
            *mistake,
        )
        with pytest.raises(RunRefused) as ended:
            Preflight().on_run_start(config)
        assert ended.value.code == 2 and ended.value.line.startswith("hybrid_lora: ")
        return ended.value.line

    return line


@pytest.mark.parametrize(
    ("mistake", "wanted"),
    [
        (["actor_rollout_ref.rollout.quantization=fp8"], "rollout-not-supported"),
        (["hybrid_lora.sync=adapter", "hybrid_lora.lora.rank=513"], "setting-does-not-fit-the-sync-mode"),
        (["hybrid_lora.full_lr=0"], "option-not-usable"),
        (["+hybrid_lora.warp=9"], "option-not-usable"),
        (["hybrid_lora.allocation=/nowhere/at/all"], "allocation-cannot-be-read"),
        (["hybrid_lora.probe.files=[]"], "nothing-to-probe-with"),
        (["hybrid_lora.lora.rank=30"], "rank-or-budget-does-not-fit-the-model"),
        (["hybrid_lora.budget.ratio=1e-5"], "rank-or-budget-does-not-fit-the-model"),
        (["hybrid_lora.probe.objective=policy", "hybrid_lora.criterion=snip"], "policy-probe-not-possible"),
    ],
)
def test_the_line_that_ends_a_refused_run_ends_with_its_reference(mistake, wanted, stopped):
    assert reference(stopped(*mistake)) == wanted


def test_a_folder_in_the_artifacts_place_names_its_entry(stopped, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train.log").touch()
    assert reference(stopped(f"hybrid_lora.output_dir={tmp_path / 'full'}")) == "output-folder-in-use"


def test_an_allocation_of_another_model_names_its_entry(stopped, tmp_path):
    from tests.support.tiny_models import make_tiny_qwen2

    other = make_tiny_qwen2(tmp_path / "other", layers=3)
    artifact = make_allocation(other, tmp_path / "allocation")
    assert reference(stopped(f"hybrid_lora.allocation={artifact}")) == "allocation-of-another-model"


def test_an_error_that_nobody_foresaw_has_the_general_reference(stopped, tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.ones(1)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("[]")
    assert reference(stopped(f"actor_rollout_ref.model.path={tmp_path / 'model'}")) == "configuration-not-checked"


def test_an_unsupported_verl_names_its_entry():
    pytest.importorskip("verl", reason="verl is not installed")
    from hybrid_lora_plugin.verl_backend.registration import require_supported_verl

    with pytest.raises(ImportError) as caught:
        require_supported_verl("0.8.0")
    assert reference(str(caught.value)) == "verl-version-not-supported"
