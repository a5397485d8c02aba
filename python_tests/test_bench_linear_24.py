"""bench_linear_24 as far as the CPU goes: with --small, and with a GPU that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from fake_cuda import one_thread, pose_with_graphs, run_small

import bench_linear_24
import gpu_harness
import shapes
import torch_24
from torch_24 import Algorithm, CuSparseLt, UnsupportedError, padded, relative_error


@pytest.fixture(autouse=True, scope="module")
def calm():
    with one_thread():
        yield


@pytest.fixture
def on_fake_gpu(monkeypatch):
    pose_with_graphs(monkeypatch)
    monkeypatch.setattr(bench_linear_24, "ROTATED_BYTES", 1 << 15)


def test_linear_24_runs_small_and_resumes(tmp_path, monkeypatch):
    out = tmp_path / "new" / "linear.json"
    run_small(bench_linear_24, monkeypatch, "--out", out, "--m", "1,8")
    cells = json.loads(out.read_text())["cells"]
    assert [cell["name"] for cell in cells] == ["64x64 m 1", "64x64 m 8", "96x32 m 1", "96x32 m 8"]
    for cell in cells:
        assert 0 < cell["relative_error"]["wanda_ext"] < 4e-3
        timings = cell["timings"]
        ratio = timings["torch.mm"]["median_ms"] / timings["wanda_ext"]["median_ms"]
        assert cell["ratios"] == {"torch.mm / wanda_ext": pytest.approx(ratio, abs=1e-4)}

    measured = []
    measure = bench_linear_24.measure
    monkeypatch.setattr(
        bench_linear_24, "measure", lambda w, m, s: measured.append(m) or measure(w, m, s)
    )
    run_small(bench_linear_24, monkeypatch, "--out", out, "--m", "1,3,8")
    assert measured == [3, 3]
    assert len(json.loads(out.read_text())["cells"]) == 6


def test_linear_24_with_graphs_and_rivals(tmp_path, monkeypatch, on_fake_gpu):
    out = tmp_path / "linear.json"
    run_small(bench_linear_24, monkeypatch, "--out", out, "--m", "1,17", "--seconds", 0)
    cells = json.loads(out.read_text())["cells"]
    assert [cell["kernel"] for cell in cells] == ["skinny/1", "wide/1"] * 2
    for cell in cells:
        assert cell["cuSPARSELt"].startswith("unsupported: ")
        assert cell["torch CUTLASS"].startswith("unsupported: ")
        assert cell["timings"]["wanda_ext"]["repeats"] == 30


def test_graphs_rotate_over_the_buffers(on_fake_gpu):
    calls = []
    entrant = gpu_harness.GpuEntrant("x", calls.append)
    case = gpu_harness.time_gpu_case("case", [entrant], 3, lambda: None, 5, 0, calls=7)
    assert calls == [0, *(0, 1, 2, 0, 1, 2, 0)]
    assert case.timings["x"].repeats == 5
    slow = gpu_harness.GpuEntrant("y", calls.append, captured=False, repeats=2)
    gpu_harness.time_gpu_case("case", [entrant, slow], 3, lambda: None, 5, 0)
    assert calls[8:] == [0, *(0, 1, 2), *(0, 1)]


def test_a_wrong_product_is_not_timed(monkeypatch):
    w = bench_linear_24.Weights(64, 64, torch.bfloat16, torch.device("cpu"))
    w.values[-1, 5, 7] += 3
    with pytest.raises(AssertionError, match=r"wanda_ext, 64x64, m 300: .* from fp64"):
        bench_linear_24.measure(w, 300, 0)


def test_results_of_another_binary_are_not_resumed(tmp_path):
    path = tmp_path / "results.json"
    first = gpu_harness.resumed(path, {"cells": []})
    first["cells"].append(1)
    gpu_harness.store(path, first)
    assert gpu_harness.resumed(path, {"cells": []})["cells"] == [1]
    gpu_harness.store(path, {**first, "binary": "another"})
    assert gpu_harness.resumed(path, {"cells": []})["cells"] == []


def test_summary_takes_geometric_means_of_the_cells_of_each_goal():
    def cell(m, dense, **more):
        ratios = {"torch.mm / wanda_ext": dense, **more}
        return {"n": 4096, "k": 4096, "m": m, "ratios": ratios}

    rival = {"cuSPARSELt / wanda_ext": 1.1}
    found = bench_linear_24.summary([cell(1, 1.0), cell(16, 4.0), cell(17, 9.0), cell(2048, 1.2)])
    assert found["m <= 16"]["torch.mm / wanda_ext"] == {
        "geomean": 2.0,
        "lowest": 1.0,
        "cells": 2,
        "goal": 1.5,
        "reached": True,
    }
    assert not found["m >= 2048"]["torch.mm / wanda_ext"]["reached"]
    assert "cuSPARSELt / wanda_ext" not in found["m >= 2048"]
    found = bench_linear_24.summary([cell(2048, 1.3, **rival)])
    assert found["m >= 2048"]["cuSPARSELt / wanda_ext"]["reached"]
    assert not found["m >= 2048"]["all cells"]
    every = [
        {**cell(m, 1.5), "n": n, "k": k}
        for part in shapes.PARTS.values()
        for n, k in part
        for m in shapes.TOKENS
    ]
    assert all(row["all cells"] for row in bench_linear_24.summary(every).values())
    assert len(every) == 18 * 17 and len({(c["n"], c["k"], c["m"]) for c in every}) == 18 * 17


# --- torch's own 2:4 ------------------------------------------------------------------------------


class FakeCuSparseLt(CuSparseLt):
    """Algorithm 0 refuses, 1 is wrong, the higher the id of another the faster it is."""

    captures = True

    def __init__(self, weight):
        self.packed = [weight]

    def _algorithms(self, x):
        yield from (Algorithm(i, 1, -1, True) for i in (2, 0, 1, 3, 2))

    def multiply(self, x, by, i):
        if by.alg_id == 0:
            raise RuntimeError("not supported")
        return padded(x)[: x.shape[0]] @ self.packed[i].t() * (2 if by.alg_id == 1 else 1)

    def _quick(self, x, algorithm, captured):
        if captured and not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 1 / algorithm.alg_id


@pytest.mark.parametrize("captures", [True, False])
def test_the_fastest_right_algorithm_is_found(captures, monkeypatch):
    monkeypatch.setattr(FakeCuSparseLt, "captures", captures)
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    found = FakeCuSparseLt(weight).screen(x, x @ weight.t(), 1e-3).record()
    fastest = {"alg_id": 3, "split_k": 1, "split_k_mode": -1, "transposed": True}
    assert found == {
        "fastest": fastest,
        "captured": captures,
        "timed": 2,
        "refused": 1,
        "wrong": 1,
    }
    with pytest.raises(UnsupportedError, match="1 refuse and 3 are wrong"):
        FakeCuSparseLt(weight).screen(x, torch.ones(3, 8), 1e-3)


def test_what_torch_lacks_is_recorded_as_unsupported():
    weights = torch.zeros(2, 32, 64, dtype=torch.bfloat16)
    for kind in (CuSparseLt, torch_24.Cutlass):
        with pytest.raises(UnsupportedError, match=r"cuSPARSELt|CUDA"):
            kind(weights)


def test_tokens_are_padded_and_errors_are_relative():
    assert padded(torch.ones(1, 16)).shape == (8, 16)
    assert padded(torch.ones(16, 16)).shape == (16, 16)
    y = torch.full((2000, 4), 3.0)
    assert relative_error(y * 1.5, y) == pytest.approx(0.5)
    assert not relative_error(y * torch.nan, y) <= 1
