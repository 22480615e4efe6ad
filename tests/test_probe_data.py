"""The probe's data: tokens, the fixed split, loss on the response only, no more rows read than needed."""

import pickle
import weakref

import pytest
import torch

from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data import rows as rows_module
from hybrid_lora_plugin.probing.data.batches import ProbeData
from hybrid_lora_plugin.probing.data.rows import Row, row_of
from hybrid_lora_plugin.probing.data.tokens import RowTokenizer
from hybrid_lora_plugin.probing.forward import IGNORED
from tests.support.tiny_models import make_char_tokenizer, sums, write_jsonl


def test_all_row_forms_give_the_same_tokens_with_loss_on_the_response_and_its_end():
    tokenizer = make_char_tokenizer()
    turns = [{"role": "user", "content": "1+1="}]
    files = [
        {"messages": [*turns, {"role": "assistant", "content": "2"}]},
        {"messages": [*turns, {"role": "assistant", "content": "2"}, {"role": "user", "content": "thanks"}]},
        {"prompt": turns, "response": "2"},
        {"prompt": "1+1=", "response": "2"},
    ]
    examples = [RowTokenizer(tokenizer)(row_of(value, "row")) for value in files]
    assert all(example == examples[0] for example in examples)
    ids, start = examples[0].input_ids, examples[0].response_start
    assert tokenizer.decode(ids[:start]) == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[start:]) == "2<|im_end|>"
    assert ids[-1] == tokenizer.eos_token_id


def test_without_a_chat_template_texts_are_verbatim_and_chats_are_refused():
    tokenizer = make_char_tokenizer()
    tokenizer.chat_template = None
    example = RowTokenizer(tokenizer)(Row("ab", "c"))
    assert tokenizer.decode(example.input_ids) == "abc<|im_end|>" and example.response_start == 2
    with pytest.raises(ProbeError, match="no chat template"):
        RowTokenizer(tokenizer)(Row([{"role": "user", "content": "ab"}], "c"))


def write_parquet(file, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)
    return str(file)


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


def test_too_few_rows_are_refused_with_the_number_needed(tmp_path):
    with pytest.raises(ProbeError, match="15 usable rows .* but 16 are needed"):
        data_of(tmp_path, count=15)
    with pytest.raises(ProbeError, match="probe.max_length: 8 tokens cut away the response of all 40 rows"):
        data_of(tmp_path, max_length=8)
    with pytest.raises(ProbeError, match="3 usable rows .* but 12 are needed: 3 validation batches of 4;"):
        data_of(tmp_path, count=3, warmup_steps=0)


def test_rows_one_token_too_long_are_refused_and_one_more_token_admits_them(tmp_path):
    rows = [{"prompt": f"{i}+10=", "response": "2"} for i in range(10, 50)]
    prompt = RowTokenizer(make_char_tokenizer())(Row("11+10=", "2")).response_start

    def of_length(length):
        file = write_jsonl(tmp_path / "equal.jsonl", rows)
        return data_of(tmp_path, files=[file], max_length=length)

    with pytest.raises(ProbeError, match="cut away the response of all 40 rows"):
        of_length(prompt)
    assert of_length(prompt + 1).dropped == 0


def test_tokens_and_split_are_those_of_the_first_release(tmp_path):
    """Rows once read whole into memory; an artifact made then must still be reproducible."""
    rows = [row if i % 3 else {"prompt": "x" * 90, "response": "y"} for i, row in enumerate(sums(60))]
    file = write_jsonl(tmp_path / "mixed.jsonl", rows)
    data = data_of(tmp_path, files=[file])
    assert (data.dropped, data.record["validation_rows"], data.record["tokens_sha256"][:16]) == (
        17,
        [8, 28, 40, 19, 5, 52, 44, 41, 53, 49, 50, 46],
        "d542ee81a5726b5f",
    )


def test_partitions_share_a_validation_batch_if_asked_to(tmp_path):
    data = data_of(tmp_path, partitions=7, partitions_per_batch=3)
    assert data.validation_batches == 3 and len(data.record["validation_rows"]) == 12
    assert data.validation_batch(2).rows == 4
    assert data_of(tmp_path).validation_batches == 3


def test_without_warmup_only_validation_rows_are_taken(tmp_path):
    data = data_of(tmp_path, count=12, warmup_steps=0)
    assert data.record["warmup_rows"] == 0 and len(data.record["validation_rows"]) == 12


def test_only_rows_that_are_needed_are_converted_and_one_at_a_time(tmp_path, monkeypatch):
    """Of a Parquet file no row becomes a Python object unless it is used, and none outlives its tokens."""
    converted, alive = [], []  # references to rows; how many of them were alive at each tokenisation

    def counted(*arguments, row_of=rows_module.row_of):
        row = row_of(*arguments)
        converted.append(weakref.ref(row))
        return row

    def watched(self, row, tokens_of=RowTokenizer.__call__):
        alive.append(sum(reference() is not None for reference in converted))
        return tokens_of(self, row)

    monkeypatch.setattr(rows_module, "row_of", counted)
    monkeypatch.setattr(RowTokenizer, "__call__", watched)
    data_of(tmp_path, files=[write_parquet(tmp_path / "rows.parquet", sums(3000))])
    assert len(converted) == len(alive) == 3 * 4 + 5 * 4
    assert max(alive) <= 2

    converted.clear(), alive.clear()
    data_of(tmp_path, count=3000)
    assert len(converted) == 3000 + 32 and max(alive) <= 2  # JSONL: each row checked, none kept


def test_rows_that_do_not_fit_are_replaced_in_few_passes_over_the_files(tmp_path, monkeypatch):
    rows = [row if i % 10 == 0 else {"prompt": "x" * 200, "response": "y"} for i, row in enumerate(sums(2000))]
    requests = []

    def counted(self, indices, read=rows_module.Rows.read):
        requests.append(indices)
        return read(self, indices)

    monkeypatch.setattr(rows_module.Rows, "read", counted)
    data = data_of(tmp_path, files=[write_jsonl(tmp_path / "long.jsonl", rows)])
    assert len(data.record["validation_rows"]) + data.record["warmup_rows"] == 32
    assert len(requests) <= 4 and data.dropped > 100


def test_the_object_sent_to_other_ranks_is_small_and_gives_the_same_batches(tmp_path):
    content = pickle.dumps(data_of(tmp_path, count=5000))
    assert len(content) < 20_000
    sent, data = pickle.loads(content), data_of(tmp_path, count=5000)
    assert torch.equal(sent.validation_batch(1).labels, data.validation_batch(1).labels)
    assert torch.equal(sent.warmup_batch(6).input_ids, data.warmup_batch(6).input_ids)


def test_jsonl_and_parquet_of_the_same_rows_give_identical_batches(tmp_path):
    parquet = data_of(tmp_path, files=[write_parquet(tmp_path / "rows.parquet", sums(40))])
    jsonl = data_of(tmp_path)
    assert parquet.record.keys() == jsonl.record.keys()
    assert parquet.record["tokens_sha256"] == jsonl.record["tokens_sha256"]
    assert torch.equal(parquet.warmup_batch(3).input_ids, jsonl.warmup_batch(3).input_ids)


def files_of(tmp_path, rows):
    return [write_jsonl(tmp_path / "counted.jsonl", rows)]


def test_what_is_cut_and_lost_is_counted_and_told(tmp_path):
    rows = [{"prompt": f"{i}+1=", "response": "x" * (30 if i % 2 else 3)} for i in range(10, 50)]
    data = data_of(tmp_path, files=files_of(tmp_path, rows), max_length=50)
    cut = [row for row in rows if len(row["response"]) == 30]
    length = len(RowTokenizer(make_char_tokenizer())(row_of(cut[0], "row")).input_ids)
    counts = data.record["counts"]
    taken = data.record["validation_rows"] + list(range(data.record["warmup_rows"]))
    assert 0 < counts["cut"] < len(taken) and counts["cut_response_tokens"] == counts["cut"] * (length - 50)
    assert f"{counts['cut']} rows cut at probe.max_length=50: {counts['cut_tokens']} tokens lost" in "\n".join(
        data.told
    )
    assert data.record["told"] == data.told and data.record["train_on"] == "last"


def test_rows_with_the_same_tokens_are_never_on_both_sides_and_are_counted(tmp_path):
    """The same row thrice, twice in another form."""
    once = [{"prompt": row["messages"][0]["content"], "response": row["messages"][1]["content"]} for row in sums(20)]
    data = data_of(tmp_path, files=files_of(tmp_path, sums(20) + once + once), warmup_steps=500)

    def texts(batches):
        return {tuple(i for i in row if i) for batch in batches for row in batch.input_ids.tolist()}

    held_out = texts(data.validation_batch(t) for t in range(3))
    trained = texts(data.warmup_batch(step) for step in range(12))
    assert len(held_out) == 12 and len(trained) == 8 and not held_out & trained
    counts = data.record["counts"]
    assert (counts["left_out_as_held_out"], data.record["warmup_rows"], counts["repeated_in_warmup"]) == (24, 24, 16)
    told = "\n".join(data.told)
    assert "24 rows left out: the same tokens are held out" in told and "16 rows of the warm-up repeat" in told
    with pytest.raises(ProbeError, match="1 usable rows .*39 more have the tokens of a held-out row"):
        data_of(tmp_path, files=files_of(tmp_path, sums(1) * 40))


def test_all_assistant_turns_are_labels_if_asked_for(tmp_path):
    rows = [{"messages": row["messages"] * 2} for row in sums(40)]
    last, every = (
        data_of(tmp_path, files=files_of(tmp_path, rows), train_on=turns, max_length=200) for turns in ("last", "all")
    )
    assert every.record["counts"]["trained_tokens"] == 2 * last.record["counts"]["trained_tokens"]
    assert every.record["tokens_sha256"] != last.record["tokens_sha256"]
    assert torch.equal(every.validation_batch(0).input_ids, last.validation_batch(0).input_ids)
    trained = every.validation_batch(0).labels != IGNORED
    assert int(trained.sum()) == 2 * int((last.validation_batch(0).labels != IGNORED).sum())


def test_padding_has_an_embedding(tmp_path):
    tokenizer = make_char_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    config = ProbeConfig(files=[write_jsonl(tmp_path / "r.jsonl", sums(40))], partitions=2, batch_size=4)
    batch = ProbeData(config, tokenizer, vocabulary=tokenizer.pad_token_id).validation_batch(0)
    assert int(batch.attention_mask.min()) == 0 and int(batch.input_ids.max()) < tokenizer.pad_token_id


def test_reading_and_tokenising_are_reported_when_they_take_long(tmp_path):
    import io

    from hybrid_lora_plugin.probing.progress import LineProgress

    config = ProbeConfig(files=files_of(tmp_path, sums(40)), partitions=2, batch_size=4, warmup_steps=5)
    said = {}
    for interval in (0.0, 60.0):
        stream = io.StringIO()
        ProbeData(config, make_char_tokenizer(), progress=LineProgress(stream, interval=interval))
        said[interval] = stream.getvalue()
    assert "reading rows: 40, 100 %" in said[0.0] and "tokenising rows: 28 of 28" in said[0.0] and not said[60.0]
