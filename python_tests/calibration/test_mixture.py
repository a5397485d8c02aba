"""Several sources of text and their shares of the windows."""

from __future__ import annotations

import pytest
from tiny_models import TEXTS, WINDOWS, ids_of, tiny_tokenizer, token_ids

from wanda_ext.calibration import mixture
from wanda_ext.calibration.batches import calibration_batches


def test_sources_share_the_windows(tmp_path):
    tokenizer = tiny_tokenizer()
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(f"{letter}" * 2000)
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    for calib in ({a: 3, b: 1}, [(a, 0.75), (b, 0.25)]):
        ids = ids_of(calibration_batches(calib, tokenizer=tokenizer, nsamples=8, seqlen=32))
        firsts = tokenizer.decode(ids[:, 0])
        assert firsts.replace(" ", "") == "aaaaaabb"
    listed = [(["a" * 2000], 1), (b, 1)]  # of texts, too
    assert len(ids_of(calibration_batches(listed, tokenizer=tokenizer, nsamples=3, seqlen=32))) == 3
    for share in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="each must be a number over 0"):
            calibration_batches({a: share, b: 1}, tokenizer=tokenizer, **WINDOWS)
    with pytest.raises(ValueError, match="mixes 2 sources, and only 1 windows"):
        calibration_batches({a: 1, b: 1}, tokenizer=tokenizer, nsamples=1, seqlen=32)


@pytest.mark.parametrize("windows", (3, 4, 5, 17, 78, 200))
def test_every_window_is_given_to_a_source(windows):
    shares = [("a", 0.1), ("b", 5), ("c", 2.7)]
    counts = dict(mixture.split(shares, windows))
    assert sum(counts.values()) == windows and min(counts.values()) >= 1
    if windows >= 78:
        assert all(abs(counts[n] - s / 7.8 * windows) < 1 for n, s in shares)


def test_a_mixture_is_told_source_by_source():
    assert mixture.calib_told({"a.txt": 3, "b.txt": 1}) == [["a.txt", 3], ["b.txt", 1]]
    assert mixture.calib_told([(TEXTS, 1), ("c4", 1)]) == [["list", 1], ["c4", 1]]
    assert mixture.calib_told("c4") == "c4" and mixture.calib_told(token_ids()) == "Tensor"
