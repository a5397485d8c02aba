"""tune: what it measures, which kernel wins, what it keeps; with made-up times, and on a GPU."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import GPU, SKINNY, WIDE, pose_as_gpu, row
from fused_24 import fused
from models_24 import model_24
from torch import nn

import wanda_ext
from wanda_ext.bench import tuning
from wanda_ext.bench.tuning import Tuning, candidates, tune
from wanda_ext.checkpoint.save import swap_linears
from wanda_ext.packed import dispatch, dispatch_table
from wanda_ext.packed.dispatch_table import BUCKETS, cache_path, read_rows

QUIET = {"seconds": 0.0, "progress": False}
SHAPE = ("bfloat16", 4096, 4096)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def watch(monkeypatch):
    """A GPU of made-up times: SKINNY m us, less for each split; WIDE 20 us; dense 30 us.

    refusals: choice -> why it must not run. trouble: (n, m) -> what is raised.
    """
    made_up = SimpleNamespace(c=pose_as_gpu(monkeypatch), refusals={}, trouble={})

    class Watch:
        def __init__(self, weights, m):
            self.m = m
            if (weights.n, m) in made_up.trouble:
                raise made_up.trouble[weights.n, m]

        def ready(self, choice):
            return made_up.refusals.get(choice, "")

        def time_us(self, choice):
            kernel, splits = choice or ("dense", 1)
            return {"dense": 30.0, WIDE: 20.0, SKINNY: self.m + 1.0 - splits / 8}[kernel]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "Stopwatch", Watch)
    weights = namedtuple("Weights", ("dtype", "n", "k", "device"))
    monkeypatch.setattr(tuning, "Weights", weights)
    return made_up


# --- What is tried --------------------------------------------------------------------------------


def test_candidates_are_what_can_run_with_splits_that_may_pay(monkeypatch):
    pose_as_gpu(monkeypatch)
    skinny = [(SKINNY, splits) for splits in (1, 2, 3, 4, 6, 8)]  # not 12: 8 at most
    assert candidates(GPU, *SHAPE, 1) == [*skinny, (WIDE, 1)]
    assert candidates(GPU, *SHAPE, 4096) == [(WIDE, 1), (SKINNY, 1)]  # the default first
    assert candidates(GPU, "bfloat16", 4096, 512, 1) == [(SKINNY, 1), (SKINNY, 2), (WIDE, 1)]


def test_the_default_is_tried_whatever_its_splits(monkeypatch):
    fake = pose_as_gpu(monkeypatch)
    monkeypatch.setattr(fake, "linear_24_choose", lambda *_: (0, 5, False))
    assert candidates(GPU, *SHAPE, 1)[0] == (SKINNY, 5)


# --- What is kept ---------------------------------------------------------------------------------


def test_the_fastest_is_kept_ruled_by_and_told(watch):
    found = tune([(4096, 4096)], (1, 30), **QUIET)
    rows = (
        row(1, SKINNY, splits=8, packed_us=1.0, dense_us=30.0),
        row(32, WIDE, splits=1, packed_us=20.0, dense_us=30.0),
    )
    assert found == Tuning(rows, ())
    assert read_rows(cache_path()) == list(rows)
    assert dispatch.choose(GPU, *SHAPE, 1) == (SKINNY, 8)
    assert dispatch.choose(GPU, *SHAPE, 20) == (WIDE, 1)
    assert dispatch.choose(GPU, *SHAPE, 16) == (SKINNY, 1)  # by default: not measured
    lines = str(found).splitlines()
    assert lines[0] == "Test GPU, microseconds a call"
    cells = ["bfloat16 4096 4096 1 skinny 8 1.00 30.00 30.00"]
    cells.append("bfloat16 4096 4096 32 wide 1 20.00 30.00 1.50")
    assert [" ".join(line.split()) for line in lines[2:]] == cells


def test_it_is_exported_and_all_buckets_are_the_default(watch):
    found = wanda_ext.bench.tune([(64, 64)], dtype=torch.float16, **QUIET)
    assert [r.m for r in found.rows] == list(BUCKETS)
    assert {r.dtype for r in found.rows} == {"float16"}


def test_tuning_again_replaces_what_was_measured_and_keeps_the_rest(watch):
    dispatch_table.store([row(1, WIDE), row(2, WIDE)])
    tune([(4096, 4096)], (1,), **QUIET)
    assert [(r.m, r.kernel) for r in read_rows(cache_path())] == [(1, SKINNY), (2, WIDE)]
    assert dispatch.choose(GPU, *SHAPE, 2) == (WIDE, 1)


def test_refused_kernels_do_not_win_and_are_told(watch):
    watch.refusals[SKINNY, 8] = "its result is off by 1.0e+00 of the largest"
    with pytest.warns(UserWarning, match="left out: 4096x4096 bfloat16 m=1, skinny in 8 splits"):
        found = tune([(4096, 4096)], (1,), **QUIET)
    assert (found.rows[0].kernel, found.rows[0].splits) == (SKINNY, 6)
    assert "left out: 4096x4096 bfloat16 m=1, skinny in 8 splits: its result is off" in str(found)


def test_no_row_where_all_kernels_are_refused(watch):
    watch.refusals |= {(SKINNY, splits): "wrong" for splits in tuning.SPLITS}
    watch.refusals[WIDE, 1] = "wrong"
    with pytest.warns(UserWarning, match="wide in 1 splits: wrong"):
        assert tune([(4096, 4096)], (1,), **QUIET).rows == ()
    assert not cache_path().exists()


def test_no_row_where_dense_does_not_run(watch):
    watch.refusals[None] = "CUBLAS_STATUS_NOT_SUPPORTED"
    with pytest.warns(UserWarning, match="torch's dense: CUBLAS"):
        assert tune([(4096, 4096)], (1,), **QUIET).rows == ()


def test_what_memory_does_not_hold_is_left_out(watch):
    watch.trouble[8192, 16384] = torch.OutOfMemoryError("out of memory")
    with pytest.warns(UserWarning, match="8192x64 bfloat16 m=16384, all: the GPU's memory"):
        found = tune([(8192, 64), (64, 64)], (1, 16384), **QUIET)
    assert [(r.n, r.m) for r in found.rows] == [(8192, 1), (64, 1), (64, 16384)]


def test_an_interruption_keeps_what_was_measured(watch):
    watch.trouble[64, 8] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tune([(32, 64), (64, 64)], (1, 8), **QUIET)
    assert [(r.n, r.m) for r in read_rows(cache_path())] == [(32, 1), (32, 8), (64, 1)]
    assert dispatch.choose(GPU, "bfloat16", 64, 64, 1)[0] == SKINNY
    assert len(watch.c.rules) > 0


@pytest.mark.filterwarnings("ignore:wanda_ext.*is not a dispatch table")  # nor be read
def test_a_cache_that_cannot_be_written_is_warned_of(watch, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="for this process alone"):
        tune([(4096, 4096)], (1,), **QUIET)
    assert dispatch.choose(GPU, *SHAPE, 1) == (SKINNY, 8)


# --- What is measured -----------------------------------------------------------------------------


def shapes(found: Tuning) -> set[tuple[int, int]]:
    return {(r.n, r.k) for r in found.rows}


def test_a_models_linears_once_each(watch):
    model = model_24("llama", torch.bfloat16)
    found = tune(model, (1,), **QUIET)
    linears = {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert shapes(found) == linears | {(96, 64)} and len(found.rows) == 5  # and the head
    swap_linears(model)
    assert shapes(tune(model, (1,), **QUIET)) == linears | {(96, 64)}
    assert shapes(tune(model.to("meta"), (1,), **QUIET)) == linears | {(96, 64)}


def test_merged_linears_by_their_product(watch):
    assert shapes(tune(fused(dtype=torch.bfloat16), (1,), **QUIET)) == {(128, 64)}


def test_what_cannot_be_packed_is_not_measured(watch):
    model = nn.ModuleDict({"good": nn.Linear(64, 8), "narrow": nn.Linear(40, 8)}).half()
    assert shapes(tune(model, (1,), **QUIET)) == {(8, 64)}
    assert shapes(tune(model_24("gpt2", torch.float16), (1,), **QUIET)) == {
        *((192, 64), (64, 64), (256, 64), (64, 256))
    }


def test_a_dtype_stands_in_for_the_models_own(watch):
    model = model_24("llama")
    with pytest.raises(ValueError, match=r"float32 has no CUDA kernel; pass dtype=torch.bfloat16"):
        tune(model, (1,), **QUIET)
    found = tune(model, (1,), dtype=torch.float16, **QUIET)
    assert {r.dtype for r in found.rows} == {"float16"}


def test_shapes_no_kernel_takes_are_left_out_or_an_error(watch):
    with pytest.warns(UserWarning, match="left out: 9x64 bfloat16: .*no kernel"):
        assert shapes(tune([(9, 64), (8, 64)], (1,), **QUIET)) == {(8, 64)}
    with pytest.raises(RuntimeError, match=r"bench\.tune: .*no kernel"):
        tune([(9, 64)], (1,), **QUIET)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ([(4096, 40)], {}, r"expected \(n, k\) above 0 with k divisible by 16, got \(4096, 40\)"),
        ([(0, 64)], {}, "above 0"),
        ([(64,)], {}, "expected"),
        ([("64", 64)], {}, "expected"),
        ([], {}, "nothing to measure"),
        (nn.ReLU(), {}, "nothing to measure"),
        ([(64, 64)], {"tokens": (0,)}, "tokens must be row counts"),
        ([(64, 64)], {"tokens": ()}, "tokens must be row counts"),
        ([(64, 64)], {"dtype": torch.float32}, "float32 has no CUDA kernel"),
        ([(64, 64)], {"device": "cpu"}, "device must be a CUDA device, not cpu"),
    ],
)
def test_bad_arguments(what, options, message, watch):
    with pytest.raises(ValueError, match=message):
        tune(what, **QUIET, **options)
    assert not cache_path().exists()


def test_without_a_gpu_it_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs a CUDA GPU, and torch sees none; `python -m"):
        tune([(64, 64)])


def test_without_kernels_it_is_one_clear_error(watch, monkeypatch):
    monkeypatch.setattr(dispatch, "_C", object())
    with pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
        tune([(64, 64)], **QUIET)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    found = tune([(512, 1024)], (1, 64, 600), seconds=0.02, progress=False)
    assert [r.m for r in found.rows] == [1, 64, 1024] and found.problems == ()
    assert all(0 < r.packed_us < 1e4 and 0 < r.dense_us < 1e4 for r in found.rows)
    gpu = dispatch.gpu_of(torch.device("cuda"))
    for r in found.rows:
        assert dispatch.choose(gpu, "bfloat16", 512, 1024, r.m) == (r.kernel, r.splits)
