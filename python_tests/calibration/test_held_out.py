"""Held-out windows: other text than the prune's, whatever the source, and perplexity on it."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from tiny_models import padded_batches, tiny_model, tiny_tokenizer, token_ids

from wanda_ext.calibration import text as calibration_text
from wanda_ext.calibration.batches import calibration_batches
from wanda_ext.calibration.held_out import held_out_batches, perplexity_of, token_losses
from wanda_ext.models.blocks import preserved
from wanda_ext.quality.evaluate import perplexity

TEXTS = [f"document {i}: " + " ".join(f"word{40 * i + j}" for j in range(40)) for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def rows_of(batches):
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


def drawn(calib, tokenizer, **options):
    return rows_of(calibration_batches(calib, tokenizer=tokenizer, seqlen=32, **options))


@pytest.mark.parametrize("seed", range(5))
def test_no_position_of_the_text_is_seen_twice(tokenizer, seed):
    stream = [id for text in TEXTS for id in [*tokenizer(text)["input_ids"], 1]]
    windows = [tuple(stream[start : start + 32]) for start in range(0, len(stream) - 31, 32)]
    assert len(set(windows)) == len(windows)  # so a window tells where it was cut
    prunes = drawn(TEXTS, tokenizer, nsamples=12, seed=seed)
    held = rows_of(
        held_out_batches(TEXTS, 9, nsamples=12, seed=seed, tokenizer=tokenizer, seqlen=32)
    )
    assert len(held) == len(set(held)) == 9 and set(held) <= set(windows)
    assert not set(held) & set(prunes)


def test_all_that_is_left_can_be_held_out(tokenizer):
    count = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS) // 32
    options = {"nsamples": count - 3, "tokenizer": tokenizer, "seqlen": 32}
    assert len(rows_of(held_out_batches(TEXTS, 3, **options))) == 3
    with pytest.raises(ValueError, match=f"4 windows cannot be held out: .*found {count} windows"):
        held_out_batches(TEXTS, 4, **options)


def test_repeated_text_is_not_held_out(tokenizer):
    with pytest.raises(ValueError, match="beside the 2 of the prune the text has only 0 others"):
        held_out_batches(["x" * 31] * 40, 2, nsamples=2, tokenizer=tokenizer, seqlen=32)


def test_c4_gives_other_documents(tokenizer, monkeypatch):
    rows = [{"text": f"{chr(65 + i % 26)}{i} " * 30} for i in range(60)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(calibration_text, "_load", lambda *_, **__: stream)
    prunes = drawn("c4", tokenizer, nsamples=10, seed=3)
    options = {"nsamples": 10, "seed": 3, "tokenizer": tokenizer, "seqlen": 32}
    held = rows_of(held_out_batches("c4", 8, **options))

    def documents(found):
        texts = [tokenizer.decode(row).replace(" ", "") for row in found]
        whole = [row["text"].replace(" ", "") for row in rows]
        return [next(i for i, text in enumerate(whole) if found in text) for found in texts]

    assert len(held) == 8
    assert not set(documents(held)) & set(documents(prunes))


def test_tokens_are_used_as_they_are():
    ids = token_ids(5)
    assert rows_of(held_out_batches(ids, 2)) == rows_of([{"input_ids": ids}])
    assert held_out_batches(padded_batches(), 2)[1].keys() == padded_batches()[1].keys()
    loader = torch.utils.data.DataLoader(list(ids), batch_size=1)
    assert rows_of(held_out_batches(loader, 2)) == rows_of([{"input_ids": ids[:2]}])


@pytest.mark.parametrize("windows", [0, -1, 2.0])
def test_refuses_no_windows(windows):
    with pytest.raises(ValueError, match="windows must be a positive whole number"):
        held_out_batches(TEXTS, windows)


def of(model, batches, device=None):
    with preserved(model):
        return perplexity_of(model, batches, device)


def test_perplexity_is_that_of_the_protocol():
    model, ids = tiny_model(), token_ids(6)
    expected = perplexity(model, ids.flatten(), 32)
    batches = calibration_batches(ids, batch_size=4)
    assert of(model, batches) == pytest.approx(expected, rel=1e-5)
    before = [p.data_ptr() for p in model.parameters()]
    assert of(model, batches, torch.device("cpu")) == pytest.approx(expected, rel=1e-5)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_padding_is_not_predicted():
    model = tiny_model()
    found = math.log(of(model, padded_batches(lengths=(32, 20, 9, 31, 5, 32))))
    singles = []
    for batch in padded_batches(lengths=(32, 20, 9, 31, 5, 32)):
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = row[mask.bool()]
            singles.append(math.log(perplexity(model, ids, len(ids))))
    # A row's first token follows padding, and is predicted from it: the rest is as without.
    assert found == pytest.approx(sum(singles) / 6, rel=0.05)


def test_what_is_not_finite_is_infinity():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    assert of(model, calibration_batches(token_ids(2))) == math.inf


def test_windows_of_a_mixture_are_held_out_by_its_shares(tmp_path):
    for letter in "ab":
        words = (f"{letter}{i} " for i in range(2000))
        (tmp_path / f"{letter}.txt").write_text("".join(words))
    calib = {str(tmp_path / "a.txt"): 1, str(tmp_path / "b.txt"): 3}
    options = {"tokenizer": tiny_tokenizer(bos=True), "seqlen": 32}
    drawn = rows_of(calibration_batches(calib, nsamples=8, **options))
    held = rows_of(held_out_batches(calib, 4, nsamples=8, **options))
    decoded = [options["tokenizer"].decode(row) for row in held]
    assert ["a" in text for text in decoded] == [True, False, False, False]
    assert all(row[0] == options["tokenizer"].bos_token_id for row in held)
    assert not any(row in drawn for row in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_computed_a_few_tokens_at_a_time(dtype, monkeypatch):
    logits = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.arange(18).view(2, 9)
    expected = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), ids, reduction="none"
    )
    seen = []
    plain = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda x, *a, **k: seen.append(len(x)) or plain(x, *a, **k),
    )
    monkeypatch.setattr("wanda_ext.calibration.held_out.LOGITS_AT_ONCE", 200)
    torch.testing.assert_close(token_losses(logits, ids), expected)
    assert seen == [4, 4, 4, 4, 2]
