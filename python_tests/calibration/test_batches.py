"""Every calibration source, and one clear error for each that cannot be used."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TEXTS, VOCAB, WINDOWS, ids_of, tiny_tokenizer, token_ids
from torch.utils.data import DataLoader

from wanda_ext.calibration.batches import calibration_batches


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


# --- Tokens --------------------------------------------------------------------------------------


def test_token_sources():
    ids = token_ids(6, 16)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    given = [{"input_ids": ids[:4].int(), "labels": ids[:4]}, {"input_ids": ids[4:]}]
    pairs = [(i, i) for i in ids]  # (ids, targets)
    for source in (ids, given, DataLoader(pairs, batch_size=2), DataLoader(ids, batch_size=4)):
        got = calibration_batches(source)
        assert torch.equal(ids_of(got), ids)
        assert all(list(batch) == ["input_ids"] for batch in got)
    masked = calibration_batches(DataLoader(rows, batch_size=4), nsamples=5)
    assert [list(batch["attention_mask"].shape) for batch in masked] == [[4, 16], [1, 16]]
    assert torch.equal(ids_of(masked), ids[:5])


def test_a_cut_batch_keeps_what_is_not_one_entry_a_sequence():
    def collate(rows):
        return {"input_ids": torch.stack(rows), "position_ids": torch.arange(16)[None]}

    loader = DataLoader(token_ids(6, 16), batch_size=4, collate_fn=collate)
    cut = calibration_batches(loader, nsamples=5)[1]
    assert (len(cut["input_ids"]), len(cut["position_ids"])) == (1, 1)
    loader = DataLoader(token_ids(6, 16), collate_fn=lambda rows: {**collate(rows), "size": 1})
    with pytest.raises(TypeError, match="'size' must be a tensor, not int"):
        calibration_batches(loader, nsamples=2)


# --- What cannot be used -------------------------------------------------------------------------


@pytest.mark.parametrize("calib", [3, None, {"a": "b"}, [1, 2], ["text", 3], [[1, 2]]])
def test_wrong_type(calib, tokenizer):
    with pytest.raises(TypeError, match="calib must be a list of texts"):
        calibration_batches(calib, tokenizer=tokenizer)


def test_too_little_text(tokenizer):
    match = "found 2 windows of 32 tokens, need 6"
    with pytest.raises(ValueError, match=match):
        calibration_batches(["x" * 80], tokenizer=tokenizer, **WINDOWS)
    with pytest.raises(ValueError, match="found 0 windows"):
        calibration_batches([], tokenizer=tokenizer, **WINDOWS)


@pytest.mark.parametrize(
    ("calib", "options", "match"),
    [
        (TEXTS, {"seqlen": 65}, "seqlen=65 is over the model's context of 64"),
        (TEXTS, {"seqlen": 0}, "seqlen must be a positive whole number, not 0"),
        (TEXTS, {"nsamples": 1.5}, "nsamples must be a positive whole number, not 1.5"),
        (TEXTS, {"batch_size": -1}, "batch_size must be"),
        (TEXTS, {"seed": None}, "seed must be a whole number, not None"),
        (token_ids(2, 65), {}, "batch 0 has sequences of 65 tokens, over the limit of 64"),
        (token_ids(2, 33), {"seqlen": 32}, "33 tokens, over the limit of 32"),
        (token_ids(2, 32)[0], {}, r"must be \[nsamples, seqlen\], not \[32\]"),
        (token_ids(2, 32)[:0], {}, "holds no batch"),
        (token_ids(2, 32) + VOCAB, {}, f"but the model's vocabulary has {VOCAB}"),
        (token_ids(2, 32) - 99, {}, "token ids from -"),
        (token_ids(2, 32).float(), {}, "must be whole numbers"),
        ([{"input_ids": token_ids(2, 8)}, {"ids": token_ids(2, 8)}], {}, "batch 1 has no 'input_"),
        ([{"input_ids": token_ids(2, 8)[0]}], {}, r"\[batch, tokens\], not torch.int64 \[8\]"),
        (
            [{"input_ids": token_ids(2, 8), "attention_mask": torch.ones(2, 9)}],
            {},
            "must have the shape of 'input_ids'",
        ),
        (
            [{"input_ids": token_ids(2, 8), "attention_mask": torch.zeros(2, 8)}],
            {},
            "keep at least one token",
        ),
        ("missing.txt", {}, "'missing.txt': there is no such file"),
        ("/missing/dir", {}, "there is no such file"),
    ],
)
def test_bad_values(calib, options, match, tokenizer):
    options = {"nsamples": 2, **options}
    with pytest.raises(ValueError, match=match):
        calibration_batches(calib, tokenizer=tokenizer, context=64, vocab_size=VOCAB, **options)


def test_batches_that_are_not_tensors():
    with pytest.raises(TypeError, match="'input_ids' must be a tensor, not list"):
        calibration_batches([{"input_ids": [[1, 2]]}])
    with pytest.raises(TypeError, match="must be a dict of tensors with 'input_ids', not str"):
        calibration_batches(DataLoader(TEXTS, batch_size=None))
