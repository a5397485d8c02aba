"""What the report says of a saved model: its files and formats, and what will run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_24 import wide_model

import wanda_ext
from wanda_ext.report import page
from wanda_ext.report.report import LinearReport, PruneReport
from wanda_ext.report.saved import note_saved, what_runs


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


def test_saving_enters_what_was_written(tmp_path: Path):
    model = wide_model("mixed", "llama")
    modules = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    report = PruneReport(
        [LinearReport(n, tuple(m.weight.shape), "bfloat16", "50%", 0.5) for n, m in modules.items()]
    )
    report.linears[0].name = "an expert"  # which is no module
    wanda_ext.save_pretrained(model, tmp_path, packed=True)
    written = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of something else")
    note_saved(report, tmp_path, Path("final name"), packed=True)
    kinds = ["" if "q_proj" in n else "2:4" if "mlp" in n else "bitmap" for n in modules]
    assert [line.stored for line in report.linears] == kinds and len(kinds) == 7
    assert report.swap == (
        "saved 6 of 7 pruned linears packed; an expert: a part of a fused weight, which stays dense"
    )
    assert report.saved == {"directory": "final name", "packed": True, "bytes": sum(written)}
    assert PruneReport.load(tmp_path / "report.json") == report
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.html(report)
    assert not list(tmp_path.glob(".*.partial"))
