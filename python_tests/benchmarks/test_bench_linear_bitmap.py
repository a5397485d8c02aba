"""bench_linear_bitmap on the CPU: with --small, and a GPU that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from fake_cuda import run_small

import bench_linear_bitmap

pytestmark = pytest.mark.usefixtures("calm")


def test_runs_small_and_resumes(tmp_path, monkeypatch):
    out = tmp_path / "new" / "bitmap.json"
    run_small(bench_linear_bitmap, monkeypatch, "--out", out, "--m", "1,8", "--dtype", "fp16")
    cells = json.loads(out.read_text())["cells"]
    names = ["64x64 m 1", "64x64 m 8", "96x160 m 1", "96x160 m 8"]
    assert [cell["name"] for cell in cells] == names
    for cell in cells:
        assert all(0 < error < 6e-4 for error in cell["relative_error"].values())
        ours = cell["timings"]["linear_bitmap"]["median_ms"]
        assert cell["ratios"] == {
            f"{name} / linear_bitmap": pytest.approx(
                cell["timings"][name]["median_ms"] / ours, abs=1e-4
            )
            for name in ("torch.mm", "exact 50 %", "linear_24")
        }
        small = cell["bytes_of_dense"]
        whole = (-cell["k"] % 128 + cell["k"]) / cell["k"]  # records lie in tiles of 128 columns
        assert small["linear_bitmap"] == pytest.approx(9 / 16 * whole, abs=1e-4)
        assert small["linear_24"] == 9 / 16 and small["exact 50 %"] > small["linear_bitmap"]
    run_small(bench_linear_bitmap, monkeypatch, "--out", out, "--m", "1,3,8", "--dtype", "fp16")
    found = json.loads(out.read_text())["cells"]
    assert found[:4] == cells and [cell["m"] for cell in found[4:]] == [3, 3]


def test_with_graphs(tmp_path, monkeypatch, on_fake_gpu):
    out = tmp_path / "bitmap.json"
    run_small(bench_linear_bitmap, monkeypatch, "--out", out, "--m", "1,20", "--seconds", 0)
    for cell in json.loads(out.read_text())["cells"]:
        assert {timing["repeats"] for timing in cell["timings"].values()} == {30}
    weights = bench_linear_bitmap.Weights(64, 64, torch.bfloat16, torch.device("cpu"))
    assert weights.count == (1 << 15) // weights.bytes["linear_bitmap"] + 1
    assert {len(copies) for copies in weights.forms.values()} == {weights.count}


@pytest.mark.parametrize("name", ["torch.mm", "linear_bitmap", "exact 50 %", "linear_24"])
def test_a_wrong_product_is_recorded_and_the_others_are_timed(name):
    w = bench_linear_bitmap.Weights(64, 64, torch.bfloat16, torch.device("cpu"))
    w.forms[name][-1][0].view(-1)[5] += 9
    cell = bench_linear_bitmap.measure(w, 3, 0)
    assert cell["wrong"].keys() == {name} and cell["timings"].keys() == w.forms.keys() - {name}
    others = cell["timings"].keys() - {"linear_bitmap"}
    expected = {f"{other} / linear_bitmap" for other in others if name != "linear_bitmap"}
    assert cell["ratios"].keys() == expected


def test_summary_takes_the_lowest_of_few_tokens():
    def cell(m, ratio, n=22016, k=4096):
        return {"n": n, "k": k, "m": m, "ratios": {"torch.mm / linear_bitmap": ratio}}

    found = bench_linear_bitmap.summary(
        [
            *(cell(m, 1.3 if m == 2 else 1.6) for m in (1, 2, 3, 4, 8)),
            *(cell(m, 1.29 if m == 8 else 1.6, n=28672) for m in (1, 2, 3, 4, 8)),
            *(cell(m, 1.6, n=57344, k=8192) for m in (1, 2, 4, 8)),
            cell(16, 0.5),
            cell(1, 9.0, n=64),
        ]
    )
    told = {
        shape: tuple(found[shape][key] for key in ("cells", "lowest", "reached", "goal reached"))
        for shape in ("22016x4096", "28672x4096", "57344x8192", "4096x11008")
    }
    assert told == {
        "22016x4096": (5, 1.3, True, False),
        "28672x4096": (5, 1.29, False, False),
        "57344x8192": (4, 1.6, None, None),  # m 3 is missing
        "4096x11008": (0, None, None, None),
    }
    assert "64x4096" not in found
