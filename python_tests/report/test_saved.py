"""What the report says will run: a row a shape, from the dispatch that runs it."""

from __future__ import annotations

import pytest
import torch

from wanda_ext.report.report import LinearReport, PruneReport
from wanda_ext.report.saved import what_runs


def linear(name, shape=(32, 64), stored=""):
    return LinearReport(name, shape, "bfloat16", "2:4", 0.5, stored=stored)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_shapes_are_counted_and_told():
    lines = [linear("a", stored="2:4"), linear("b", stored="2:4"), linear("c", (32, 40), "bitmap")]
    rows = what_runs(PruneReport([*lines, linear("d")]), tokens=(1, 2048))
    assert [(row["shape"], row["linears"], row["m"], row["path"]) for row in rows] == [
        ([32, 64], 2, 1, "cpu"),
        ([32, 64], 2, 2048, "cpu"),
        ([32, 40], 1, 1, "cpu"),
        ([32, 40], 1, 2048, "cpu"),
        ([32, 64], 1, None, "dense"),
    ]
    assert all(row["packed_us"] is None and row["dense_us"] is None for row in rows)
    assert rows[0]["why"] == "packed, on the CPU" and rows[2]["why"] == "a bitmap, on the CPU"


def test_what_is_saved_dense_runs_dense():
    rows = what_runs(PruneReport([linear("a"), linear("b")]))
    assert [(row["linears"], row["path"]) for row in rows] == [(2, "dense")]
