"""Rows on disk: every kind of file and folder, what is refused, and a check of columns that is never too lenient."""

import itertools
import json
import shutil

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.formats import ParquetFile
from hybrid_lora_plugin.probing.data.rows import Row, read_rows, row_of
from hybrid_lora_plugin.probing.data.screen import unproven
from tests.support.tiny_models import sums, write_jsonl

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GOOD = {"prompt": "a", "response": "b"}


def write_parquet(file, rows, row_group_size=7, schema=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file, row_group_size=row_group_size)
    return str(file)


def all_rows(*files):
    rows, _ = read_rows([str(file) for file in files])
    return [row for _, row in rows.read(range(len(rows)))]


def names(folder):
    return [source["name"] for source in read_rows([str(folder)])[1]]


def test_twenty_thousand_rows_are_equal_in_jsonl_and_parquet(tmp_path):
    jsonl = write_jsonl(tmp_path / "rows.jsonl", sums(20_000))
    parquet = write_parquet(tmp_path / "rows.parquet", sums(20_000), row_group_size=3000)
    (rows, (source,)), (others, _) = read_rows([jsonl]), read_rows([parquet])
    assert source["name"] == "rows.jsonl" and source["rows"] == 20_000 and len(source["sha256"]) == 64
    assert len(rows) == len(others) == 20_000
    assert list(rows.read(range(20_000))) == list(others.read(range(20_000)))
    some = numpy.random.default_rng(0).permutation(20_000)[:500].tolist()
    expected = [(i, Row([{"role": "user", "content": f"{i}+{2 * i}="}], str(3 * i))) for i in sorted(some)]
    assert list(rows.read(some)) == list(others.read(some)) == expected


def test_rows_are_numbered_over_all_files(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", sums(10)[:4])
    (tmp_path / "blank.jsonl").write_text("\n" + json.dumps(sums(10)[4]) + "\r\n\n")
    last = write_parquet(tmp_path / "last.parquet", sums(10)[5:], row_group_size=2)
    rows, sources = read_rows([first, str(tmp_path / "blank.jsonl"), last])
    assert [source["rows"] for source in sources] == [4, 1, 5]
    assert [row.response for _, row in rows.read([9, 4, 0, 7])] == ["0", "12", "21", "27"]


def test_each_row_group_is_decoded_once_and_only_if_it_holds_a_row(tmp_path, monkeypatch):
    rows, _ = read_rows([write_parquet(tmp_path / "rows.parquet", sums(70))])
    groups = []

    def counted(self, *, row_groups, iter_batches=pyarrow.parquet.ParquetFile.iter_batches, **options):
        groups.extend(row_groups)
        assert options["columns"] == ["messages"]
        return iter_batches(self, row_groups=row_groups, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    assert [index for index, _ in rows.read([50, 3, 51, 0, 69])] == [0, 3, 50, 51, 69]
    assert groups == [0, 7, 9]


def test_rows_are_found_in_every_batch_of_a_large_row_group(tmp_path):
    rows, _ = read_rows([write_parquet(tmp_path / "rows.parquet", sums(3000), row_group_size=3000)])
    wanted = [0, 1023, 1024, 2047, 2048, 2999]
    assert [row.response for _, row in rows.read(wanted)] == [str(3 * index) for index in wanted]


def test_parquet_rows_of_mixed_forms_extra_fields_and_verl_prompts_are_read(tmp_path):
    turn = pyarrow.struct([(name, pyarrow.string()) for name in ("content", "info", "role")])
    schema = pyarrow.schema(
        [("messages", pyarrow.list_(turn)), ("prompt", pyarrow.string()), ("response", pyarrow.string())]
    )
    mixed = [{"messages": [CHAT[0], {**CHAT[1], "info": "x"}]}, {"messages": None, **GOOD}]
    verl = [{"prompt": CHAT[:1], "response": "b", "data_source": "s", "extra_info": {"index": 1}}]
    assert all_rows(
        write_parquet(tmp_path / "mixed.parquet", mixed, schema=schema),
        write_parquet(tmp_path / "verl.parquet", verl),
    ) == [Row(CHAT[:1], "b", {"info": "x"}), Row("a", "b"), Row(CHAT[:1], "b")]


def test_a_broken_row_of_a_column_store_is_named_with_what_it_has(tmp_path):
    rows = [*sums(2000), {"messages": CHAT[:1]}]
    with pytest.raises(ProbeError, match="row 2001 of .*rows.parquet: .*no assistant turn"):
        read_rows([write_parquet(tmp_path / "rows.parquet", rows)])
    with pytest.raises(ProbeError, match=r"row 1 of .*neither .*\['label', 'text'\]"):
        read_rows([write_parquet(tmp_path / "other.parquet", [{"text": "a", "label": 1}])])


CHATS = [
    None,
    [],
    CHAT[:1],
    CHAT[1:],
    CHAT,
    [*CHAT, CHAT[0]],
    [*CHAT, {"role": "assistant", "content": " "}],
    [None, *CHAT],
]
CHATS += [[CHAT[0], {"role": None, "content": "x"}, CHAT[1]], [*CHAT, {"role": "user", "content": None}]]
TEXTS = [None, "", " \x1f\u00a0", "a", "是", "√"]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("prompts", [TEXTS, CHATS])
def test_the_check_of_whole_columns_never_passes_a_row_that_the_check_of_one_refuses(prompts, large):
    """And it leaves no good row with an ordinary response to the slow check."""
    text, listed = (pyarrow.large_string(), pyarrow.large_list) if large else (pyarrow.string(), pyarrow.list_)
    chat = listed(pyarrow.struct([("role", text), ("content", text)]))
    schema = pyarrow.schema([("messages", chat), ("prompt", text if prompts is TEXTS else chat), ("response", text)])
    keys = ("messages", "prompt", "response")
    values = [dict(zip(keys, row, strict=True)) for row in itertools.product(CHATS, prompts, TEXTS)]
    for start in (0, 5):  # a slice has offsets that the flattened turns must follow
        batch = pyarrow.RecordBatch.from_pylist(values, schema)[start:]
        left = {start + place for place in unproven(batch)}
        refused = {place for place in range(start, len(values)) if not accepted(values[place])}
        assert refused and refused < left
        assert all(values[place]["response"] == "√" for place in left - refused)


def accepted(value):
    try:
        row_of(value, "row")
    except ProbeError:
        return False
    return True


def test_columns_of_other_types_are_left_to_the_check_of_single_rows():
    encoded = pyarrow.array(["a", "b"]).dictionary_encode()
    assert unproven(pyarrow.record_batch({"prompt": encoded, "response": encoded})) == [0, 1]
    assert unproven(pyarrow.record_batch({"messages": pyarrow.array([1, 2])})) == [0, 1]


def saved(folder, rows, **splits):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = {name: datasets.Dataset.from_list(values) for name, values in splits.items()}
    whole = datasets.DatasetDict(made) if splits else datasets.Dataset.from_list(rows)
    whole.save_to_disk(folder, num_shards=dict.fromkeys(splits, 1) if splits else 3)
    return folder


def test_a_saved_dataset_is_its_rows_in_order(tmp_path):
    folder = saved(tmp_path / "saved", sums(50))
    rows, sources = read_rows([str(folder)])
    assert [source["name"] for source in sources] == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    assert sum(source["rows"] for source in sources) == len(rows) == 50
    assert all_rows(folder) == all_rows(write_jsonl(tmp_path / "rows.jsonl", sums(50)))
    assert [row.response for _, row in rows.read([49, 20])] == ["60", "147"]
    with pytest.raises(ProbeError, match=r"row 2 of .*\.arrow: no response"):
        read_rows([str(saved(tmp_path / "bad", [GOOD, {"prompt": "a", "response": " "}, GOOD, GOOD, GOOD, GOOD]))])
    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ProbeError, match="data-00001-of-00003.arrow is part of .* and is not there"):
        read_rows([str(folder)])


def test_a_saved_dataset_dict_gives_its_train_split_or_its_only_one(tmp_path):
    folder = saved(tmp_path / "both", None, test=sums(9), train=sums(4))
    assert names(folder) == ["train/data-00000-of-00001.arrow"] and len(all_rows(folder)) == 4
    assert len(all_rows(saved(tmp_path / "one", None, test=sums(9)))) == 9
    with pytest.raises(ProbeError, match="no split `train` but first, second; give the folder of one"):
        read_rows([str(saved(tmp_path / "two", None, first=sums(2), second=sums(2)))])


def test_a_folder_gives_its_files_in_sorted_order_without_hidden_and_other_ones(tmp_path):
    folder = tmp_path / "data"
    write_parquet(folder / "b" / "2.parquet", sums(3))
    write_parquet(folder / ".cache" / "0.parquet", sums(5))
    write_jsonl(folder / "a.jsonl", sums(2))
    write_jsonl(folder / ".hidden.jsonl", sums(2))
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert names(folder) == ["a.jsonl", "b/2.parquet"] and len(all_rows(folder)) == 5
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert read_rows([str(folder)])[1] == read_rows([str(tmp_path / "elsewhere")])[1]


@pytest.mark.parametrize(
    "files, taken",
    [
        (["data/train-00001-of-00002", "data/train-00000-of-00002", "data/test-00000-of-00001"], [1, 0]),
        (["train/0000", "test/0000"], [0]),
        (["train", "test"], [0]),
        (["part-1", "part-2"], [0, 1]),
        (["test-00000-of-00001"], [0]),
    ],
)
def test_of_files_named_by_split_as_on_the_hub_those_of_train_are_taken(tmp_path, files, taken):
    for file in files:
        write_parquet(tmp_path / f"{file}.parquet", sums(2))
    assert names(tmp_path) == [f"{files[index]}.parquet" for index in taken]


def test_splits_without_train_and_configurations_that_share_rows_must_be_chosen_between(tmp_path):
    """The card is that of open-r1/Mixture-of-Thoughts, whose `all` repeats the rows of the others."""
    for split in ("train_gen", "train_sft"):
        write_parquet(tmp_path / "splits" / f"{split}-00000-of-00001.parquet", sums(2))
    with pytest.raises(ProbeError, match="no files of split `train` but of train_gen, train_sft"):
        read_rows([str(tmp_path / "splits")])
    hub = tmp_path / "hub"
    write_parquet(hub / "all" / "train-00000-of-00001.parquet", sums(2))
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("all", "math")
    )
    (hub / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# Card\n")
    assert names(hub) == ["all/train-00000-of-00001.parquet"]  # only `all` was downloaded
    write_parquet(hub / "math" / "train-00000-of-00001.parquet", sums(1))
    with pytest.raises(ProbeError, match="configurations all, math, which may share rows"):
        read_rows([str(hub)])
    assert names(hub / "math") == ["train-00000-of-00001.parquet"]


def test_a_snapshot_of_links_into_the_hub_cache_is_read_but_not_the_cache_itself(tmp_path):
    blob = tmp_path / "blobs" / "0123abcd"
    write_parquet(blob, sums(3))
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "rows.parquet").symlink_to(blob)
    assert names(snapshot) == ["rows.parquet"]
    with pytest.raises(ProbeError, match="give one of its snapshots"):
        read_rows([str(tmp_path)])


def test_folders_without_rows_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ProbeError, match=r"has no .jsonl or .parquet file \(found: nothing\)"):
        read_rows([str(empty)])
    (empty / "rows.csv").write_text("a,b")
    with pytest.raises(ProbeError, match=r"\(found: \.csv\)"):
        read_rows([str(empty)])
    write_parquet(empty / "rows.parquet", [], schema=pyarrow.schema([("prompt", pyarrow.string())]))
    with pytest.raises(ProbeError, match="empty is empty; give"):
        read_rows([str(empty)])
    (empty / "state.json").write_text("[]")
    (empty / "dataset_info.json").write_text("{}")
    with pytest.raises(ProbeError, match="state.json is not what `datasets` writes"):
        read_rows([str(empty)])


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
    "null": ([GOOD, None], "row 2 of .*not an object"),
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


def test_parquet_text_that_is_not_utf8_is_refused_when_checked(tmp_path):
    column = pyarrow.array([b"a\xff"]).view(pyarrow.string())
    file = tmp_path / "latin.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "response": column}), file)
    with pytest.raises(ProbeError, match="not a Parquet file .*UTF8"):
        list(ParquetFile(file).scan())
