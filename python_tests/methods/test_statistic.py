"""Sums over tokens: what they are, that they never change, and where they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wanda_ext.methods import statistic
from wanda_ext.methods.statistic import InputStatistic, drift_of, full_precision, gram_of


def statistic_of(*sumsq: float, gram: bool = False) -> InputStatistic:
    sums = torch.tensor(sumsq, dtype=torch.float64)
    return InputStatistic(sums, 2, gram=sums.float().diag() if gram else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistic, "TOKENS_AT_ONCE", 7)
    rows = torch.randn(17, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = gram_of(rows)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(
        gram.double(), rows.double().t() @ rows.double(), rtol=1e-5, atol=1e-5
    )


def test_sums_are_new() -> None:
    one, two = statistic_of(1.0, 4.0, gram=True), statistic_of(8.0, 5.0, gram=True)
    both = one + two
    assert both.tokens == 4
    assert both.norm.tolist() == [3.0, 3.0]
    assert both.norm.dtype == torch.float32
    assert both.gram is not None and both.gram.tolist() == [[9.0, 0.0], [0.0, 9.0]]
    assert one.sumsq.tolist() == [1.0, 4.0]
    assert (one + statistic_of(1.0, 1.0)).gram is None  # no sum over all tokens


def test_devices() -> None:
    one = statistic_of(1.0, 4.0, gram=True)
    assert one.to("cpu") is one
    moved = one.to("meta")
    assert moved.sumsq.is_meta and moved.gram is not None and moved.gram.is_meta
    assert moved.tokens == one.tokens


def test_products_are_of_full_precision_inside() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_gram_matrix_of_several_strips() -> None:
    rows = torch.randn(30, 600, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = rows.double().t() @ rows.double()
    gram = gram_of(rows)
    torch.testing.assert_close(gram.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram[256:, :256], gram[:256, 256:].t())


def test_drift_is_of_what_both_saw() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, rows = (torch.randn(5000, 8, generator=generator) for _ in range(2))
    drift = drift_of(dense, rows)
    exact = (dense - rows).double().t() @ rows.double()
    torch.testing.assert_close(drift.double(), exact, rtol=1e-4, atol=1e-2)
    one = replace(statistic_of(1.0, 4.0, gram=True), drift=drift)
    both = one + one
    assert both.drift is not None and torch.equal(both.drift, 2 * drift)
    assert (one + statistic_of(1.0, 4.0, gram=True)).drift is None
    moved = one.to("meta").drift
    assert moved is not None and moved.is_meta
