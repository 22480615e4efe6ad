"""The probe's rows: every form, the fixed split, loss on the response only, and what is refused."""

import pytest
import torch
from tiny_models import make_char_tokenizer, sums, write_jsonl

from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.probing.data import ProbeData, tokenize
from hybrid_lora_plugin.probing.errors import ProbeError
from hybrid_lora_plugin.probing.loss import IGNORED
from hybrid_lora_plugin.probing.rows import Row, read_rows


def test_all_row_forms_give_the_same_tokens_with_loss_on_the_response_and_its_end():
    tokenizer = make_char_tokenizer()
    turns = [{"role": "user", "content": "1+1="}]
    files = [
        {"messages": [*turns, {"role": "assistant", "content": "2"}]},
        {"messages": [*turns, {"role": "assistant", "content": "2"}, {"role": "user", "content": "thanks"}]},
        {"prompt": turns, "response": "2"},
        {"prompt": "1+1=", "response": "2"},
    ]
    examples = [tokenize(row, tokenizer, 100) for row in _rows(files)]
    assert all(example == examples[0] for example in examples)
    ids, start = examples[0].input_ids, examples[0].response_start
    assert tokenizer.decode(ids[:start]) == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[start:]) == "2<|im_end|>"
    assert ids[-1] == tokenizer.eos_token_id


def _rows(values):
    from hybrid_lora_plugin.probing.rows import _row

    return [_row(value, "row") for value in values]


def test_without_a_chat_template_texts_are_verbatim_and_chats_are_refused():
    tokenizer = make_char_tokenizer()
    tokenizer.chat_template = None
    example = tokenize(Row("ab", "c"), tokenizer, 10)
    assert tokenizer.decode(example.input_ids) == "abc<|im_end|>" and example.response_start == 2
    with pytest.raises(ProbeError, match="no chat template"):
        tokenize(Row([{"role": "user", "content": "ab"}], "c"), tokenizer, 10)


def test_jsonl_and_parquet_of_the_same_rows_are_the_same_data(tmp_path):
    import pyarrow
    import pyarrow.parquet

    jsonl = write_jsonl(tmp_path / "rows.jsonl", sums(12))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sums(12)), tmp_path / "rows.parquet")
    rows, (source,) = read_rows([jsonl])
    assert rows == read_rows([str(tmp_path / "rows.parquet")])[0]
    assert source["name"] == "rows.jsonl" and source["rows"] == 12 and len(source["sha256"]) == 64


def data_of(tmp_path, count=40, **changes):
    file = write_jsonl(tmp_path / "rows.jsonl", sums(count))
    values = dict(files=[file], partitions=3, batch_size=4, warmup_steps=5, max_length=64)
    return ProbeData(ProbeConfig(**(values | changes)), make_char_tokenizer())


def test_validation_rows_are_fixed_by_the_seed_recorded_and_never_trained_on(tmp_path):
    data = data_of(tmp_path)
    assert data.record == data_of(tmp_path).record
    assert data.record["validation_rows"] != data_of(tmp_path, seed=1).record["validation_rows"]
    assert len(set(data.record["validation_rows"])) == 12

    def rows(batch):
        return {tuple(row) for row in batch.input_ids.tolist()}

    def texts(batches):
        return {tuple(i for i in row if i) for batch in batches for row in rows(batch)}

    held_out = texts(data.validation_batch(t) for t in range(3))
    assert len(held_out) == 12
    assert not held_out & texts(data.warmup_batch(step) for step in range(20))


def test_a_warmup_batch_depends_on_its_number_alone_and_an_epoch_shows_every_row_once(tmp_path):
    data = data_of(tmp_path, count=20, warmup_steps=100)
    assert torch.equal(data.warmup_batch(7).input_ids, data.warmup_batch(7).input_ids)
    first, second = (
        [tuple(i for i in r if i) for s in steps for r in data.warmup_batch(s).input_ids.tolist()]
        for steps in ((0, 1), (2, 3))
    )
    assert len(set(first)) == 8 and set(first) == set(second) and first != second


def test_labels_cover_response_and_end_token_only(tmp_path):
    batch = data_of(tmp_path).validation_batch(0)
    tokenizer = make_char_tokenizer()
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=False):
        answer = tokenizer.decode(labels[labels != IGNORED])
        prompt = tokenizer.decode(ids[(labels == IGNORED) & (mask == 1)])
        assert answer.endswith("<|im_end|>") and answer.removesuffix("<|im_end|>").isdigit()
        assert prompt.endswith("<|im_start|>assistant\n")


def test_rows_cut_by_max_length_are_left_out_and_counted(tmp_path):
    rows = sums(30) + [{"prompt": "x" * 200, "response": "y"}] * 5
    data = ProbeData(
        ProbeConfig(
            files=[write_jsonl(tmp_path / "r.jsonl", rows)], partitions=2, batch_size=4, warmup_steps=500, max_length=64
        ),
        make_char_tokenizer(),
    )
    assert data.dropped == 5 and data.record["rows"] == 35


GOOD = {"prompt": "a", "response": "b"}
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


def test_too_few_rows_are_refused_with_the_number_needed(tmp_path):
    with pytest.raises(ProbeError, match="15 usable rows .* but 16 are needed"):
        data_of(tmp_path, count=15)
    with pytest.raises(ProbeError, match="probe.max_length: 8 tokens cut away the response of all 40 rows"):
        data_of(tmp_path, max_length=8)
