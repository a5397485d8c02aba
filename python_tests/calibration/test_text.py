"""Windows of text from every source of it."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from tiny_models import TEXTS, WINDOWS, ids_of, tiny_tokenizer, token_ids

from wanda_ext.calibration import text as calibration_text
from wanda_ext.calibration.batches import calibration_batches


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def expected(tokenizer):
    return ids_of(calibration_batches(TEXTS, tokenizer=tokenizer, **WINDOWS))


def test_windows_are_cut_from_the_joined_documents(tokenizer, expected):
    stream = []
    for text in TEXTS:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    windows = [stream[start : start + 32] for start in range(0, len(stream) - 31, 32)]
    assert expected.shape == (6, 32)
    assert expected.dtype == torch.int64
    rows = [windows.index(row) for row in expected.tolist()]
    assert rows == sorted(set(rows))  # all different


def test_seed_draws_the_windows(tokenizer, expected):
    again = calibration_batches(TEXTS, tokenizer=tokenizer, **WINDOWS)
    other = calibration_batches(TEXTS, tokenizer=tokenizer, **WINDOWS, seed=1)
    assert torch.equal(ids_of(again), expected)
    assert not torch.equal(ids_of(other), expected)


def test_a_stream_is_read_no_further_than_needed(tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": TEXTS[len(read) % 30]}

    stream = datasets.IterableDataset.from_generator(endless)
    assert len(ids_of(calibration_batches(stream, tokenizer=tokenizer, **WINDOWS))) == 6
    assert len(read) < 10


def test_files_and_datasets_give_the_windows_of_the_list(tokenizer, expected, tmp_path):
    rows = datasets.Dataset.from_dict({"id": list(range(30)), "text": TEXTS})
    rows.to_parquet(tmp_path / "t.parquet")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sources = {
        "dataset": rows,
        "iterable": rows.to_iterable_dataset(),
        "column": rows.rename_column("text", "content"),
        "parquet": str(tmp_path / "t.parquet"),
        "jsonl": str(tmp_path / "t.jsonl"),
        "tokenized": rows.map(
            lambda row: {"input_ids": [*tokenizer(row["text"])["input_ids"], 1]},
            load_from_cache_file=False,
            keep_in_memory=True,
        ),
    }
    for name, source in sources.items():
        got = ids_of(calibration_batches(source, tokenizer=tokenizer, **WINDOWS))
        assert torch.equal(got, expected), name


def test_text_file_and_builtin(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    whole = calibration_batches(["\n".join(TEXTS)], tokenizer=tokenizer, **WINDOWS)
    for source in (path, str(path)):
        from_file = calibration_batches(source, tokenizer=tokenizer, **WINDOWS)
        assert torch.equal(ids_of(from_file), ids_of(whole))
    assert ids_of(calibration_batches("builtin", tokenizer=tokenizer, **WINDOWS)).shape == (6, 32)


def test_default_length_and_batches(tokenizer):
    options = {"tokenizer": tokenizer, "nsamples": 5}
    assert [len(b["input_ids"][0]) for b in calibration_batches("builtin", **options)] == [2048] * 5
    short = calibration_batches("builtin", **options, context=256, batch_size=2)
    assert [list(b["input_ids"].shape) for b in short] == [[2, 256], [2, 256], [1, 256]]
    assert [len(b["input_ids"]) for b in calibration_batches(token_ids(10, 512))] == [2, 2, 2, 2, 2]


def test_tokenizer_from_a_directory(tokenizer, expected, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(
        ids_of(calibration_batches(TEXTS, tokenizer=str(tmp_path), **WINDOWS)), expected
    )


def test_hub_sources(monkeypatch, tokenizer, expected):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        rows = datasets.Dataset.from_dict({"text": TEXTS})
        return rows.to_iterable_dataset() if kwargs.get("streaming") else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("wikitext2", "someone/corpus"):
        got = calibration_batches(name, tokenizer=tokenizer, **WINDOWS)
        assert torch.equal(ids_of(got), expected)
    long = ids_of(calibration_batches("c4", tokenizer=tokenizer, **WINDOWS))
    assert len(long) == 6
    documents = [tokenizer(text)["input_ids"] for text in TEXTS]
    for row in long.tolist():  # each within one document
        assert any(row == d[i : i + 32] for d in documents for i in range(len(d) - 31))
    shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
        (("someone/corpus",), {"split": "train", "streaming": True}),
        (("allenai/c4",), {"split": "train", "data_files": shard, "streaming": True}),
    ]


def test_hub_failure_says_what_to_do(monkeypatch, tokenizer):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"allenai/c4' could not be loaded.*no route.*'builtin' needs no"
    ):
        calibration_batches("c4", tokenizer=tokenizer)


def test_too_few_long_documents(monkeypatch, tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["y" * 33, "x" * 32, "z" * 40]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="found 2 windows of 32 tokens, need 6"):
        calibration_batches("c4", tokenizer=tokenizer, **WINDOWS)


def test_file_and_column_that_are_unknown(tokenizer, tmp_path):
    (tmp_path / "t.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"pass a \.txt, \.jsonl, \.parquet file, not '\.pdf'"):
        calibration_batches(str(tmp_path / "t.pdf"), tokenizer=tokenizer)
    rows = datasets.Dataset.from_dict({"words": TEXTS})
    with pytest.raises(ValueError, match=r"has columns \['words'\], none of them text"):
        calibration_batches(rows, tokenizer=tokenizer, **WINDOWS)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("t.txt", b"\xff\xfe"),
        ("t.jsonl", b"{oops"),
        ("t.parquet", b"PAR1"),
        ("t.jsonl", b'{"a": 1}'),
    ],
)
def test_file_that_cannot_be_read_is_named(file, content, tokenizer, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}' cannot be read as \.{file[2:]} \("):
        calibration_batches(str(tmp_path / file), tokenizer=tokenizer, **WINDOWS)


@pytest.mark.parametrize("file", ["t.txt", "t.jsonl", "t.parquet"])
def test_empty_file(file, tokenizer, tmp_path):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match="found 0 windows"):
        calibration_batches(str(tmp_path / file), tokenizer=tokenizer, **WINDOWS)


def test_padding_of_a_tokenized_dataset_is_left_out():
    rows = {"input_ids": [[0, 0, 5, 6, 7]] * 8, "attention_mask": [[0, 0, 1, 1, 1]] * 8}
    got = calibration_batches(datasets.Dataset.from_dict(rows), nsamples=2, seqlen=12)
    assert ids_of(got).tolist() == [[5, 6, 7] * 4] * 2


def test_no_tokenizer():
    with pytest.raises(TypeError, match="text needs a tokenizer, not NoneType: pass tokenizer="):
        calibration_batches(TEXTS)
    with pytest.raises(ValueError, match="none could be loaded from ''"):
        calibration_batches(TEXTS, tokenizer="")
    with pytest.raises(TypeError, match="text needs a tokenizer, not int"):
        calibration_batches(TEXTS, tokenizer=3)


def test_keyword_list_is_complete():
    for keyword in calibration_text.KEYWORDS:
        assert repr(keyword) in calibration_text.SOURCES


# --- What a window starts with --------------------------------------------------------------------


def test_windows_start_with_the_bos_where_the_tokenizer_puts_one(tokenizer):
    plain, with_bos = tokenizer, tiny_tokenizer(bos=True)
    got = ids_of(calibration_batches(TEXTS, tokenizer=with_bos, **WINDOWS))
    body = ids_of(calibration_batches(TEXTS, tokenizer=plain, nsamples=6, seqlen=31))
    assert got.shape == (6, 32)
    assert (got[:, 0] == with_bos.bos_token_id).all()
    assert torch.equal(got[:, 1:], body)  # one BOS a window, none inside
    for one in (plain, with_bos):
        paper = calibration_batches(TEXTS, tokenizer=one, protocol="paper", **WINDOWS)
        assert torch.equal(
            ids_of(paper), ids_of(calibration_batches(TEXTS, tokenizer=plain, **WINDOWS))
        )


def test_long_documents_have_one_bos(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows.to_iterable_dataset())
    tokenizer = tiny_tokenizer(bos=True)
    bos = tokenizer.bos_token_id
    ours = ids_of(calibration_batches("c4", tokenizer=tokenizer, **WINDOWS))
    assert (ours[:, 0] == bos).all() and not (ours[:, 1:] == bos).any()
    paper = ids_of(calibration_batches("c4", tokenizer=tokenizer, protocol="paper", **WINDOWS))
    documents = [tokenizer(text)["input_ids"] for text in TEXTS]
    for row in paper.tolist():  # of the encodings as the tokenizer makes them
        assert any(row == d[i : i + 32] for d in documents for i in range(len(d) - 31))


def test_ids_that_a_user_gives_are_never_changed():
    tokenizer = tiny_tokenizer(bos=True)
    ids = token_ids(6)
    assert torch.equal(ids_of(calibration_batches(ids, tokenizer=tokenizer)), ids)
    rows = datasets.Dataset.from_dict({"input_ids": [list(range(5, 45))] * 8})
    got = ids_of(calibration_batches(rows, tokenizer=tokenizer, **WINDOWS))
    assert not (got == tokenizer.bos_token_id).any()


def test_a_protocol_or_length_that_cannot_be():
    tokenizer = tiny_tokenizer(bos=True)
    with pytest.raises(ValueError, match="protocol must be 'model' or 'paper', not 'gptq'"):
        calibration_batches(token_ids(), protocol="gptq")
    with pytest.raises(ValueError, match="seqlen=1 has no room for text beside the BOS"):
        calibration_batches(TEXTS, tokenizer=tokenizer, nsamples=2, seqlen=1)


def test_a_text_file_is_one_document_read_no_further_than_needed(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a line of text\n" * 100_000)
    seen = []

    class Counting:
        bos_token_id, eos_token_id = None, 1

        def __call__(self, text, **options):
            seen.append(len(text))
            return {"input_ids": [2] * len(text)}

    ids = ids_of(calibration_batches(str(path), tokenizer=Counting(), nsamples=6, seqlen=32))
    assert sum(seen) <= 2 * calibration_text.PIECE
    assert not (ids == 1).any()  # no end of a document inside of it
