"""PruneReport: file, totals, table."""

from __future__ import annotations

import json
import time

import pytest

from wanda_ext.report.report import LinearReport, PruneReport


def two_linears() -> PruneReport:
    done = LinearReport(
        name="layers.0.up",
        shape=(8, 16),
        dtype="float32",
        asked="50%",
        reached=0.5,
        status="pruned",
        score_kept=3.0,
        score_lost=1.0,
        tokens=64,
        seconds=0.002,
        path="cpu",
        packed_us=10.25,
        dense_us=17.0,
    )
    idle = LinearReport("layers.0.gate", (8, 16), "float32", None, 0.25, status="ignored")
    return PruneReport(
        [done, idle],
        block_weights=10**6,
        swap="swapped nothing: swap=False",
        status="complete",
        seconds=1.25,
        peak_memory={"cpu": 2**30},
        arguments={"sparsity": "50%", "ignore": ["*.gate"]},
        versions={"torch": "2"},
    )


def test_round_trip(tmp_path):
    report = two_linears()
    report.save(tmp_path / "report.json")
    assert PruneReport.load(tmp_path / "report.json") == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"linears": [{"shape": 3}]}', '{"linears": 1}'])
def test_foreign_file(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json is not a prune report"):
        PruneReport.load(tmp_path / "report.json")


def test_reports_of_earlier_versions(tmp_path):
    report = two_linears()
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    for new in ("timings", "saved", "kernels", "repair", "gate"):
        del data[new]
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert PruneReport.load(tmp_path / "report.json") == report


def test_phases_add_up():
    report = PruneReport()
    for _ in range(2):
        with report.timed("blocks"):
            time.sleep(0.01)
    with pytest.raises(ValueError, match="stop"), report.timed("gate"):
        raise ValueError("stop")
    assert report.timings.keys() == {"blocks", "gate"} and report.timings["blocks"] >= 0.02


def test_totals_count_pruned_linears_only():
    report = two_linears()
    assert report.sparsity == 0.5
    assert [linear.name for linear in report.pruned] == ["layers.0.up"]
    assert report.pruned[0].lost == 0.25
    assert PruneReport().sparsity == 0.0
    assert report.linears[1].lost == 0.0


def test_table():
    lines = str(two_linears()).splitlines()
    assert lines[0] == "swapped nothing: swap=False"
    cells = [" ".join(line.split()) for line in lines[2:4]]
    assert cells[0] == "layers.0.up 8x16 float32 50% 50.00% 25.00% 64 2.0 10.2 17.0 cpu"
    assert cells[1] == "layers.0.gate 8x16 float32 - 25.00% - - - - - ignored"
    totals = "complete: 1 of 2 linears pruned, 0.0 of the blocks' 1.0 M weights, 50.00% zeros, 1.2"
    assert lines[4].startswith(totals)
    assert "peak memory cpu 1.00 GiB" in lines[4]
    assert len({line.find("float32") for line in lines[2:4]}) == 1  # columns are aligned
