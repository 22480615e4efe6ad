"""The reader of artifacts on whatever a file may hold: an allocation that is consistent, or one refusal of its own."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.allocation.storage import allocation_text, parse_allocation
from hybrid_lora_plugin.allocation.strict_json import read_json
from hybrid_lora_plugin.allocation.validate import validate_allocation
from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig
from hybrid_lora_plugin.errors import AllocationError
from tests.support.allocations import decide_for, draw_measurements
from tests.support.tiny_models import tiny_qwen2_config

CONFIG = tiny_qwen2_config(50)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def payload():
    settings = AllocateCommandConfig(budget=BudgetConfig(ratio=0.3))
    return json.loads(allocation_text(decide_for(CONFIG, draw_measurements(14), settings)))


def places(value, place=()):
    """Every place in a JSON value, as keys and indices from its top."""
    yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*place, key))


def is_read(content):
    """Whether the reader takes it; anything but its own refusal is an error of the test."""
    try:
        allocation = parse_allocation("allocation.json", content)
    except AllocationError as error:
        assert "\n" not in str(error) and "; " in str(error), str(error)
        return False
    validate_allocation(allocation, "again")
    # A key that came later may be absent, and is then at its default.
    written = json.loads(allocation_text(allocation))["modules"]
    assert all(
        one[key] == value
        for one, given in zip(written, content["modules"], strict=True)
        for key, value in given.items()
    )
    return True


def test_what_is_written_is_read(payload):
    assert is_read(payload)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_value_is_refused_or_another_allocation_that_holds_together(payload, data):
    content = copy.deepcopy(payload)
    place = data.draw(st.sampled_from([place for place in places(content) if place]))
    *path, last = place
    parent = content
    for key in path:
        parent = parent[key]
    change = data.draw(st.sampled_from(["value", "remove", "twice", "more"]))
    if change == "value":
        parent[last] = data.draw(VALUES)
    elif change == "remove":
        del parent[last]
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(parent[last]) if change == "twice" else data.draw(VALUES))
    else:
        parent[data.draw(st.text(max_size=6))] = data.draw(VALUES)
    is_read(content)


@settings(max_examples=200, deadline=None)
@given(content=VALUES)
def test_any_json_is_refused_in_its_own_words(content):
    assert not is_read(content)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_refused_or_json(payload, tmp_path_factory, data):
    """A file that was cut, overwritten in the middle, or is of another kind."""
    text = json.dumps(payload).encode()
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 40)))
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(text[:begin] + data.draw(st.binary(max_size=6)) + text[end:])
    try:
        content = read_json(file, "artifact")
    except AllocationError:
        return
    is_read(content)


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.05, 1.0),
    mode=st.sampled_from(["parameters", "modules"]),
    overflow=st.sampled_from(["stop", "skip"]),
    criterion=st.sampled_from(["hybrid", "random", "lora_ffn", "spread"]),
    seed=st.integers(0, 50),
)
def test_whatever_was_selected_is_written_and_read_as_it_is(ratio, mode, overflow, criterion, seed):
    budget = BudgetConfig(ratio=ratio, mode=mode, overflow=overflow)
    try:
        allocation = decide_for(
            CONFIG, draw_measurements(14, seed=seed), AllocateCommandConfig(criterion=criterion, budget=budget)
        )
    except AllocationError:
        return  # a budget for no module at all
    assert parse_allocation("allocation.json", json.loads(allocation_text(allocation))) == allocation
