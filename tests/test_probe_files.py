"""The forms in which people's rows come: patterns, compressed files, arrays, other columns, the hub, broken files."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data import json_files
from hybrid_lora_plugin.probing.data.files import absolute, hub_split, is_there
from hybrid_lora_plugin.probing.data.layout import Layout
from hybrid_lora_plugin.probing.data.rows import Row, file_digests, read_rows, row_of
from tests.support.fuzz_rows import one_input, seeds
from tests.support.tiny_models import sums, write_jsonl

ROWS = [*sums(30), {"prompt": "é√", "response": "b", "extra": None}]


def all_rows(*files, layout=None):
    rows, _ = read_rows([str(file) for file in files], layout)
    return [row for _, row in rows.read(range(len(rows)))]


def compressed(data, codec):
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, codec) as out:
        out.write(data)
    return stream.getvalue().to_pybytes()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False).encode()
FORMS = {
    "rows.jsonl": b"\xef\xbb\xbf" + LINES,
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "rows.jsonl.gz": gzip.compress(LINES),
    "parts.jsonl.gz": gzip.compress(LINES[:700]) + gzip.compress(LINES[700:]),
    "rows.jsonl.zst": compressed(LINES, "zstd"),
    "rows.json": ARRAY,
    "bom.json": b"\xef\xbb\xbf" + ARRAY,
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "array.jsonl": b"\n " + ARRAY + b"\n",
    "rows.json.gz": gzip.compress(ARRAY),
    "rows.json.zst": compressed(ARRAY, "zstd"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_are_read_from_every_form(tmp_path, name, monkeypatch):
    monkeypatch.setattr(json_files, "_BLOCK", 100)  # rows and characters lie across blocks
    file = tmp_path / name
    file.write_bytes(FORMS[name])
    rows, (source,) = read_rows([str(file)])
    assert all_rows(file) == [row_of(row, "row") for row in ROWS]
    assert [row.response for _, row in rows.read([30, 3, 7])] == ["9", "21", "b"]
    assert file_digests([str(file)]) == [{"name": name, "sha256": source["sha256"]}]
    assert rows.unused == ["extra"]


BROKEN = {
    "cut.json": (ARRAY[:-40], r"row 31 of .* is not JSON"),
    "open.json": (b'[{"prompt": "a", "response": "b"}', r"row 2 of .* is not JSON \(the array does not end\)"),
    "comma.json": (b'[{"prompt": "a", "response": "b"},]', r"row 2 of .* is not JSON \(a comma and no row behind it\)"),
    "no comma.json": (b'[{"prompt": "a", "response": "b"} {}]', r"row 2 of .* is not JSON \(no comma before it\)"),
    "more.json": (b'[{"prompt": "a", "response": "b"}] {}', "there is more behind the end of the array"),
    "numbers.json": (b"[1, 2]", "row 1 of .*: not an object"),
    "none.json": (b"[]", "none.json is empty"),
    "blank.jsonl": (b"", "blank.jsonl is empty"),
    "nothing.parquet": (b"", r"nothing.parquet is empty \(0 bytes\)"),
    "indented.jsonl": (b'{\n "prompt": "a",\n "response": "b"\n}', "an object is spread over several lines"),
    "windows.jsonl": ('{"prompt": "a", "response": "b"}\n'.encode("utf-16"), "is UTF-16, not UTF-8 text"),
    "latin.json": (b'["\xe9\xe8"]', "is not UTF-8 text"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-40], r"cut.jsonl.gz is not a JSONL? file \("),
    "plain.jsonl.gz": (LINES, r"plain.jsonl.gz is not a JSON file \("),
    "cut.jsonl.zst": (compressed(LINES, "zstd")[:-9], r"cut.jsonl.zst is not a JSONL? file \("),
    "lfs.parquet": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735\n",
        r"is a Git LFS pointer to 132,735 bytes and not the file; run `git lfs pull`",
    ),
    "rows.csv.gz": (b"a", r"ends in '.csv.gz'; give a .jsonl or .parquet file \(JSON also as .gz or .zst\)"),
    "deep.jsonl": (b"[" * 200_000, "nested too deep"),
    "half.jsonl": (b'{"prompt": "a", "response": "\\ud83d"}', r"row 1 of .*half a surrogate pair, U\+D83D"),
    "page.jsonl": (b"<!DOCTYPE html><html>", "row 1 of .* is not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_gets_one_line_that_names_it(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProbeError, match=message) as caught:
        read_rows([str(tmp_path / name)])
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_parquet_file_that_was_cut_off_is_named(tmp_path):
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sums(100)), file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ProbeError, match="rows.parquet is not a Parquet file .*footer"):
        read_rows([str(file)])


def test_a_link_to_nothing_and_a_file_that_may_not_be_read_are_named(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("../blobs/gone")
    for entry in (tmp_path / "link.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(ProbeError, match="link.jsonl is a link to ../blobs/gone, which is not there"):
            read_rows([str(entry)])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ProbeError, match="folder.jsonl has no .jsonl or .parquet file"):
        read_rows([str(tmp_path / "folder.jsonl")])


def test_a_pattern_gives_its_files_in_order_named_below_its_fixed_folder(tmp_path, monkeypatch):
    for name in ("b/2.jsonl", "a/1.jsonl", "a/other.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "data" / name, sums(2))
    for pattern in ("data/*/*.jsonl", "data/**/*.jsonl", "data/[ab]/?.jsonl"):
        assert [source["name"] for source in read_rows([str(tmp_path / pattern)])[1]] == ["a/1.jsonl", "b/2.jsonl"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(all_rows("data/*/*.jsonl")) == len(all_rows("~/data/**/*.jsonl")) == len(all_rows("~/data")) == 4
    with pytest.raises(ProbeError, match="'data/\\*.parquet' matches no file"):
        read_rows(["data/*.parquet"])
    # A file of that very name comes first.
    write_jsonl(tmp_path / "[ab].jsonl", sums(3))
    assert len(all_rows("[ab].jsonl")) == 3
    assert is_there("data/*/*.jsonl") and is_there("~/data") and not is_there("data/*.parquet")
    assert (
        absolute("data/*/*.jsonl") == str(tmp_path / "data/*/*.jsonl")
        and absolute("org/name:train") == "org/name:train"
    )


def test_a_hub_data_set_is_named_with_its_split():
    assert hub_split("org/name:train[:500]") == ("org/name", None, None, "train[:500]")
    assert hub_split("org/na.me/main@v1.0:train+test[10%:]") == ("org/na.me", "main", "v1.0", "train+test[10%:]")
    for entry in ("data/rows.jsonl", "/org/name:train", "C:/rows.jsonl", "org/name", "../org/name:train"):
        assert hub_split(entry) is None
    with pytest.raises(ProbeError, match="a dataset of the hub needs its split, as in org/name:train"):
        read_rows(["org/name"])


def test_a_split_is_loaded_by_datasets_itself(tmp_path, monkeypatch):
    """Of a folder that lies where the hub's name would be looked for, by the same call as of the hub."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "org" / "name" / "train.jsonl", sums(40))
    write_jsonl(tmp_path / "org" / "name" / "test.jsonl", sums(3))
    rows, (source,) = read_rows(["org/name:train[5:25]"])
    assert [row for _, row in rows.read(range(20))] == [row_of(row, "row") for row in sums(40)[5:25]]
    assert source["name"] == "org/name:train[5:25]" and source["rows"] == 20 and len(source["sha256"]) == 64
    assert read_rows(["org/name:train[5:25]"])[1] == [source] and read_rows(["org/name:train[6:26]"])[1] != [source]
    assert len(all_rows("org/name:test")) == 3
    for entry in ("org/name:validation", "org/none:train"):
        with pytest.raises(ProbeError, match=f"'{entry}' cannot be loaded from the hub .*give NAME:SPLIT"):
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
            read_rows([entry])


SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
ALPACA = {"instruction": "a", "input": "c", "output": "b"}
VERL = {
    "data_source": "s",
    "prompt": [{"role": "user", "content": "a"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 1, "answer": "b", "split": "train"},
}
USER_A = [{"role": "user", "content": "a"}]
LAYOUTS = {
    "ShareGPT": (SHAREGPT, "messages_key=conversations", Row(USER_A, "b")),
    "chats elsewhere": (
        {"dialog": [*USER_A, {"role": "assistant", "content": "b"}]},
        "messages_key=dialog",
        Row(USER_A, "b"),
    ),
    "Alpaca": (ALPACA, "prompt_key=instruction+input probe.response_key=output", Row("a\nc", "b")),
    "Alpaca without input": (
        ALPACA | {"input": ""},
        "prompt_key=instruction+input probe.response_key=output",
        Row("a", "b"),
    ),
    "question": ({"question": "a", "answer": "b"}, "prompt_key=question probe.response_key=answer", Row("a", "b")),
    "completion": ({"prompt": "a", "completion": "b"}, "response_key=completion", Row("a", "b")),
    "conversational completion": (
        {"prompt": USER_A, "completion": [{"role": "assistant", "content": "b"}]},
        "response_key=completion",
        Row(USER_A, "b"),
    ),
    "verl": (VERL, "response_key=extra_info.answer", Row(USER_A, "b")),
}


@pytest.mark.parametrize("store", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_another_layout_is_refused_with_the_option_that_reads_it(tmp_path, case, store):
    row, options, expected = LAYOUTS[case]
    file = tmp_path / f"rows.{store}"
    if store == "jsonl":
        write_jsonl(file, [row] * 3)
    elif store == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), file)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        datasets.Dataset.from_list([row] * 3).save_to_disk(file)
    with pytest.raises(ProbeError, match="row 1 of .*neither `messages` nor `prompt` and `response`") as caught:
        read_rows([str(file)])
    assert f"give probe.{options}" in str(caught.value)
    assert ("objective=policy" in str(caught.value)) == (case == "verl")
    config = ProbeConfig(**dict(option.split("=") for option in options.replace("probe.", "").split()))
    assert all_rows(file, layout=Layout.of(config)) == [expected] * 3


def test_a_layout_without_a_name_is_asked_for_its_columns():
    with pytest.raises(ProbeError, match="has no prompt and no response; split it"):
        row_of({"text": "a"}, "row 1")
    with pytest.raises(ProbeError, match="name its columns by probe.messages_key, or by probe.prompt_key"):
        row_of({"a": 1}, "row 1")
    with pytest.raises(ProbeError, match="probe.prompt_key: '' is no column"):
        Layout.of(ProbeConfig(prompt_key=""))
    with pytest.raises(ProbeError, match="row 1: no response in `extra_info.answer`"):
        row_of({"prompt": "a", "extra_info": {}}, "row 1", Layout(response="extra_info.answer"))


def test_the_fields_that_arrow_adds_to_turns_are_none_and_tools_may_be_text(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "find", "arguments": {"where": "x"}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"required": ["a"]}}}]
    rows = [
        {"messages": [*USER_A, {"role": "assistant", "content": None, "tool_calls": [each]}], "tools": tools}
        for each in (call, other)
    ] + sums(3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = [row_of(row, "row") for row in rows]
    assert all_rows(tmp_path / "rows.parquet") == all_rows(write_jsonl(tmp_path / "rows.jsonl", rows)) == expected
    assert expected[0].fields == {"tool_calls": [call]} and expected[0].options == {"tools": tools}
    texts = [row | {"tools": json.dumps(tools)} for row in rows[:2]]
    assert all_rows(write_jsonl(tmp_path / "texts.jsonl", texts)) == expected[:2]
    for value, message in (("{", "is a text that is not JSON"), ("{}", "give a list of objects"), ([1], "give a list")):
        with pytest.raises(ProbeError, match=f"row 1: `tools` .*{message}"):
            row_of(rows[0] | {"tools": value}, "row 1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["", " ", "a", "user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "prompt", "response", "role", "content", "tool_calls", "from", "value", "tools"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"])}, optional={"content": JSON, "tool_calls": JSON, "x": JSON}
)
ROW = st.dictionaries(st.sampled_from(["messages", "prompt", "response", "tools"]), st.lists(TURN, max_size=3) | JSON)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ROW | JSON)
def test_any_row_is_read_or_refused_in_one_line(value):
    try:
        row = row_of(value, "row 1")
    except ProbeError as error:
        assert str(error).startswith("row 1") and "\n" not in str(error)
    else:
        assert row.prompt and ((row.response or "").strip() or row.fields)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(seeds()),
    st.lists(st.tuples(st.integers(1, 4000), st.binary(max_size=6), st.integers(0, 40)), max_size=4),
)
def test_any_damage_to_a_file_is_read_or_refused_in_one_line(content, damages):
    """The inputs of the coverage-guided fuzz, damaged at random."""
    for place, added, removed in damages:
        place %= len(content) + 1
        content = content[:place] + added + content[place + removed :]
    one_input(content)
