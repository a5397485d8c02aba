"""gpu_check's table: what holds by which results, and the dispatch table that they make.

The results are made up: no machine here has a GPU.
"""

from __future__ import annotations

import json

import pytest

import gpu_claims
from goals import COPY
from gpu_claims import FAILS, HOLDS, OPEN
from wanda_ext.packed.dispatch_table import read_rows


def write(out, *results):
    with (out / "results.jsonl").open("a") as file:
        for result in results:
            file.write(json.dumps({"step": "check", **result}) + "\n")


def verdict(out, start):
    (found,) = [claim for claim in gpu_claims.claims(out) if claim.text.startswith(start)]
    return found.verdict, found.figure


def kernels(m, cublas, finals, dtype="bfloat16", **more):
    """A cell of linear_24 with every kernel; one left after the heats."""
    times = {"cuBLAS": cublas, **finals}
    us = {name: {"median": t, "p10": t, "p90": t, "rounds": 30} for name, t in times.items()}
    us["mma_sp_32x8/16"] = {"median": 0.1, "p10": 0.1, "p90": 0.1, "rounds": 3}
    name = f"linear_24 4096x4096 {dtype} m {m}"
    where = {"n": 4096, "k": 4096, "m": m, "dtype": dtype}
    about = {"gpu": "Test GPU", "arch": 90, "sms": 132, "chosen": "mma_sp_64x16/2"}
    return {"step": "decode", "cell": name, **where, "us": us, "wrong": {}, **about, **more}


def test_nothing_was_measured(tmp_path):
    found = gpu_claims.claims(tmp_path)
    assert {claim.verdict for claim in found} == {OPEN}
    assert {claim.figure for claim in found} == {""}
    assert gpu_claims.dispatch_table([])["rows"] == []


def test_one_wrong_kernel_is_enough(tmp_path):
    def cells(step):
        return [
            {"step": step, "cell": f"check linear_24 136x272 bf16 m {m}", "tried": 7, "wrong": {}}
            for m in range(30)
        ]

    write(tmp_path, *cells("check")[1:])
    start = "linear_24: every kernel"
    assert verdict(tmp_path, start) == (OPEN, "203 runs in 29 of 30 cells, 0 wrong")
    write(tmp_path, *cells("sanitizers"))  # of another step
    assert verdict(tmp_path, start)[0] == OPEN
    write(tmp_path, cells("check")[0])
    assert verdict(tmp_path, start) == (HOLDS, "210 runs in 30 of 30 cells, 0 wrong")
    write(tmp_path, {**cells("check")[3], "wrong": {"mma_sp_32x8/2": "off"}})
    assert verdict(tmp_path, start) == (
        FAILS,
        "210 runs in 30 of 30 cells, 1 wrong (check linear_24 136x272 bf16 m 3: mma_sp_32x8/2)",
    )
    write(tmp_path, cells("check")[3])  # the last word counts
    assert verdict(tmp_path, start)[0] == HOLDS


def test_the_tests(tmp_path):
    write(tmp_path, {"cell": "tests", "passed": 5, "skipped": 1, "failures": []})
    assert verdict(tmp_path, "the GPU tests") == (OPEN, "5 passed, 0 failed")  # cut short
    suite = '<testsuites><testsuite tests="6" failures="0"></testsuite></testsuites>'
    (tmp_path / "junit.xml").write_text(suite)
    assert verdict(tmp_path, "the GPU tests") == (HOLDS, "5 passed, 0 failed")
    write(tmp_path, {"cell": "tests", "passed": 5, "failed": 1, "failures": ["test_x"]})
    assert verdict(tmp_path, "the GPU tests") == (FAILS, "5 passed, 1 failed (test_x)")


@pytest.mark.parametrize("op", COPY)
def test_the_slowest_shape_decides_a_pruning_op(op, tmp_path):
    def case(shape, ratio):
        return {"cell": f"{op} {shape} bf16", "ratios": {"copy / wanda_ext": ratio}, "wrong": {}}

    write(tmp_path, case("4096x4096", 0.97), case("11008x4096", COPY[op]))
    assert verdict(tmp_path, f"{op}: ")[0] == HOLDS
    write(tmp_path, case("4096x11008", COPY[op] - 0.01))
    assert verdict(tmp_path, f"{op}: ")[0] == FAILS
    write(tmp_path, {"cell": f"{op} 4096x11008 bf16", "ratios": {}, "wrong": {"wanda_ext": "off"}})
    assert verdict(tmp_path, f"{op}: ")[0] == HOLDS  # of what is right


def test_linear_24_by_its_fastest_and_its_default_kernel(tmp_path):
    write(
        tmp_path,
        kernels(1, 15.0, {"mma_sp_32x8/1": 8.0, "mma_sp_64x16/2": 12.0}),
        kernels(8, 15.0, {"mma_sp_64x16/2": 9.0}),
    )
    assert verdict(tmp_path, "linear_24, m <= 16: its fastest") == (
        HOLDS,
        "1.77 (1.67 to 1.88, 2 cells)",
    )
    assert verdict(tmp_path, "linear_24, m <= 16: its default") == (
        FAILS,
        "1.44 (1.25 to 1.67, 2 cells)",
    )
    assert verdict(tmp_path, "linear_24, m 32 to 64: its fastest")[0] == OPEN


def test_cusparselt(tmp_path):
    one = {"cell": "linear_24 4096x4096 m 2048", "m": 2048, "wrong": {}}
    write(tmp_path, {**one, "ratios": {"torch.mm / wanda_ext": 2, "cuSPARSELt / wanda_ext": 1.1}})
    start = "linear_24, m >= 2048: its default 1.0 times cuSPARSELt"
    assert verdict(tmp_path, start)[0] == HOLDS
    write(tmp_path, {**one, "ratios": {"torch.mm / wanda_ext": 2}})
    assert verdict(tmp_path, start)[0] == OPEN


def test_bitmaps(tmp_path):
    def cell(m, dense, ours, exact):
        times = {"torch.mm": dense, "linear_bitmap": ours, "exact 50 %": exact}
        timings = {name: {"median_ms": ms} for name, ms in times.items()}
        ratios = {"torch.mm / linear_bitmap": dense / ours}
        name = f"linear_bitmap 4096x4096 m {m}"
        return {"cell": name, "m": m, "timings": timings, "ratios": ratios, "wrong": {}}

    write(tmp_path, cell(1, 3.0, 2.0, 2.5), cell(8, 3.0, 2.2, 3.1), cell(16, 3.0, 9.0, 9.0))
    assert verdict(tmp_path, "linear_bitmap 16:32") == (HOLDS, "1.36 (1.36 to 1.50, 2 cells)")
    assert verdict(tmp_path, "linear_bitmap exact")[0] == FAILS


def test_sanitizers(tmp_path):
    def said(tool, program, text):
        return {"cell": f"{tool} of {program}", "summary": text}

    write(tmp_path, said("memcheck", "linear_24", "0 errors"))
    assert verdict(tmp_path, "memcheck")[0] == OPEN
    for program in ("linear_bitmap", "pruning"):
        write(tmp_path, said("memcheck", program, "0 errors"))
        write(tmp_path, said("racecheck", program, "0 hazards displayed (0 errors, 0 warnings)"))
    write(tmp_path, said("racecheck", "linear_24", "1 hazard displayed (1 error, 0 warnings)"))
    assert verdict(tmp_path, "memcheck")[0] == HOLDS
    assert verdict(tmp_path, "racecheck")[0] == FAILS


def test_the_ceilings_are_figures(tmp_path):
    write(tmp_path, {"cell": "ceiling: copy", "TB/s": 4.3})
    assert verdict(tmp_path, "ceiling: copy") == ("", "4.3 TB/s")


def test_wanda_ext_reads_the_dispatch_table(tmp_path):
    right = kernels(1, 15.0, {"mma_sp_32x8/4": 8.0, "mma_sp_64x16/2": 12.0})
    wrong = kernels(8, 15.0, {})
    without_dense = kernels(16, 15.0, {"mma_sp_64x16/2": 9.0})
    del without_dense["us"]["cuBLAS"]
    table = gpu_claims.dispatch_table([right, wrong, without_dense, {"cell": "tests"}])
    (tmp_path / "dispatch.json").write_text(json.dumps(table))
    (row,) = read_rows(tmp_path / "dispatch.json")
    assert (row.kernel, row.splits, row.packed_us, row.dense_us) == ("mma_sp_32x8", 4, 8.0, 15.0)
    assert row.gpu.name == "Test GPU" and (row.dtype, row.n, row.m) == ("bfloat16", 4096, 1)
