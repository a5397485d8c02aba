"""bench_linear_24 on the CPU: with --small, and a GPU that is not there; both command lines."""

from __future__ import annotations

import json

import pytest
import torch
from fake_cuda import run_small

import bench_linear_24
import bench_linear_bitmap
import gpu_harness
import shapes

pytestmark = pytest.mark.usefixtures("calm")


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


def test_entrants_take_turns_in_another_order_each_round(on_fake_gpu):
    order = []
    entrants = [
        gpu_harness.GpuEntrant(name, lambda _, n=name: order.append(n), captured=False)
        for name in "abc"
    ]
    gpu_harness.time_gpu_case("case", entrants, 2, lambda: None, 4, 0)
    assert "".join(order) == "abcbcacababc"


def test_what_cannot_be_captured_is_recorded(on_fake_gpu):
    def refuse(i):
        raise RuntimeError("CUDA error: no\nmore about it")

    entrants = [gpu_harness.GpuEntrant("x", refuse), gpu_harness.GpuEntrant("y", lambda i: i)]
    case = gpu_harness.time_gpu_case("case", entrants, 2, lambda: None, 5, 0)
    assert case.wrong == {"x": "CUDA error: no"} and case.timings.keys() == {"y"}


@pytest.mark.parametrize("wrong", ["wanda_ext", "torch.mm"])
def test_a_wrong_product_is_recorded_and_the_others_are_timed(wrong):
    w = bench_linear_24.Weights(64, 64, torch.bfloat16, torch.device("cpu"))
    (w.values if wrong == "wanda_ext" else w.dense)[-1, 5, 7] += 3
    if wrong == "torch.mm":
        right = w.dense[0].double()
        w.exact = lambda x: x.double() @ right.t()
    cell = bench_linear_24.measure(w, 300, 0)
    assert cell["wrong"].keys() == {wrong} and "from fp64" in cell["wrong"][wrong]
    assert cell["timings"].keys() == {"wanda_ext", "torch.mm"} - {wrong}
    assert cell["ratios"] == {}


def test_every_cell_is_a_line_at_once(tmp_path, monkeypatch, capsys):
    arguments = ("--lines", "--shapes", "64x64,96x32", "--m", "1")
    run_small(bench_linear_24, monkeypatch, *arguments)
    cells = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [cell["cell"] for cell in cells] == ["linear_24 64x64 m 1", "linear_24 96x32 m 1"]
    assert all(cell["ratios"]["torch.mm / wanda_ext"] > 0 for cell in cells)
    monkeypatch.setattr(
        bench_linear_24.Weights, "multiply_packed", lambda w, x, i: w.multiply(x, i) + 1
    )
    with pytest.raises(SystemExit, match="some entrants were wrong"):
        run_small(bench_linear_24, monkeypatch, *arguments)
    cells = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(cells) == 2 and all("wanda_ext" in cell["wrong"] for cell in cells)


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


# --- The command line of both ---------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", [bench_linear_24, bench_linear_bitmap])
def test_without_a_gpu_it_is_refused_before_any_work(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "Weights", lambda *_: pytest.fail("worked first"))
    monkeypatch.setattr("sys.argv", ["benchmark", "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == gpu_harness.NO_DEVICE == 3
    assert "torch sees none; --small tries it on the CPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [(bench_linear_24, "linear_24"), (bench_linear_bitmap, "linear_bitmap")],
)
def test_a_part_is_measured_into_its_own_file(benchmark, name, tmp_path, monkeypatch, on_fake_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(gpu_harness, "RESULTS", tmp_path)
    made = []
    monkeypatch.setattr(benchmark, "Weights", lambda *given: made.append(given) or given)
    monkeypatch.setattr(
        benchmark,
        "measure",
        lambda w, m, s: {"name": str(w), "n": w[0], "k": w[1], "m": m, "ratios": {str(s): 1.0}},
    )
    monkeypatch.setattr(benchmark, "summary", lambda cells: {"cells": len(cells)})
    monkeypatch.setattr("sys.argv", ["benchmark", "--part", "8b", "--dtype", "fp16"])
    benchmark.main()
    assert made == [(n, k, torch.float16, torch.device("cuda")) for n, k in shapes.PARTS["8b"]]
    written = json.loads((tmp_path / f"{name}_fp16.json").read_text())
    assert [cell["m"] for cell in written["cells"]] == [*shapes.TOKENS] * len(made)
    assert written["summary"] == {"cells": len(written["cells"])}
