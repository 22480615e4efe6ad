"""Every supported family all the way, with a real vLLM: probe, apply, every sync mode, checkpoint, export, reload."""

from __future__ import annotations

import json
from statistics import mean

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin.candidates import COMPONENT_OF_TYPE, FUSED_TYPES, TYPE_ORDER  # noqa: E402
from hybrid_lora_plugin.model_families import FAMILIES  # noqa: E402
from tests.support.forking_python import ForkingPython  # noqa: E402
from tests.support.tiny_families import NO_ADAPTER_FILES, NO_FLOAT32, SPECIAL  # noqa: E402
from tests.support.verl_processes import ROOT, environment_of  # noqa: E402

pytestmark = pytest.mark.verl

each_family = pytest.mark.parametrize("family", FAMILIES)
#: types of the candidates where they are not q, k, v, o, gate, up and down
TYPES = {
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "glm": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "glm4": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "falcon_h1": {
        "q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj",
    },
    "qwen3_5_text": {
        "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj",
        "gate_proj", "up_proj", "down_proj",
    },
}  # fmt: skip
DENSE = {type_ for type_ in TYPE_ORDER if COMPONENT_OF_TYPE[type_] != "recurrent"} - FUSED_TYPES.keys()
#: linear modules that are no candidates, where there is more than the head
FROZEN = {
    "falcon_h1": ["model.layers.*.mamba.conv1d", "lm_head"],
    "qwen3_5_text": ["model.layers.*.linear_attn.conv1d", "lm_head"],
}
#: types that are fully tuned or frozen
NO_ADAPTER = {"falcon_h1": {"out_proj"}}


@pytest.fixture(scope="module")
def round_trip():
    """``family_worker`` as a function of its arguments; its imports are paid once."""
    # vLLM would compile its sampler for each.
    command = ForkingPython("tests.support.family_worker", ROOT, environment_of(TORCHDYNAMO_DISABLE="1"))
    yield command
    command.close()


@each_family
def test_a_family_goes_all_the_way(round_trip, family, tmp_path):
    done = round_trip(str(tmp_path / "seen.json"), family)
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads((tmp_path / "seen.json").read_text())
    types, without = TYPES.get(family, DENSE), NO_ADAPTER.get(family, set())
    # Each of them is a full module in one layer and has an adapter in another.
    assert set(found["types"]) == set(found["full"]) == types
    assert set(found["lora"]) == types - without and set(found["left"]) == without
    assert found["frozen"] == FROZEN.get(family, ["lm_head"])
    # In float32 the engine computes what the trainer does; in bfloat16 every bit was read back, and the policy follows.
    exact = {name: max(values) for name, values in found["differences"].items() if name.startswith("float32")}
    rounded = {name: mean(values) for name, values in found["differences"].items() if name.startswith("bfloat16")}
    unsynced = mean(found["unsynced"])
    wanted = (0, 8) if family in NO_FLOAT32 else (2, 6)
    assert (len(exact), len(rounded)) == wanted and max(exact.values(), default=0) < 1e-4, exact
    assert max(rounded.values()) < unsynced / 2, (rounded, unsynced)
    assert len(found["tampered"]) > 20 and None not in found["tampered"].values(), found["tampered"]
    # The adapter as an export writes it, read by vLLM's own loader.
    assert (family in NO_ADAPTER_FILES) or max(found["exported_adapter"]) < 1e-4
    exported = found["export"]
    # Header and manifest are sent besides.
    assert exported["differs"] == [] and exported["compared"] == exported["sent"] - 2 > 10
    # A gated delta rule adds up more.
    assert exported["difference"] < (1e-4 if family == "qwen3_5_text" else 1e-5)


def test_every_family_has_a_tiny_model():
    assert SPECIAL.keys() == FAMILIES.keys()
