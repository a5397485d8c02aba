"""explain: what runs for m rows, by a rule or by default, and why a dense linear is dense."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import SKINNY, WIDE, pose_as_gpu, row
from fused_24 import fused
from models_24 import prune_24, prune_to
from torch import nn
from transformers.pytorch_utils import Conv1D

import wanda_ext
from wanda_ext.packed import dispatch
from wanda_ext.packed.bitmap import SparseLinearBitmap
from wanda_ext.packed.explain import explain
from wanda_ext.packed.linear_24 import SparseLinear24


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def gpu(monkeypatch):
    """The CPU poses as a GPU where 64x32 in bf16 was measured for m in 5..8."""
    fake = pose_as_gpu(monkeypatch)
    shape = {"n": 64, "k": 32}
    dispatch.add([row(8, WIDE, **shape, packed_us=8.0, dense_us=12.0)])
    return fake


def linear(dtype: torch.dtype = torch.bfloat16, kind: type = nn.Linear, **options) -> nn.Module:
    module = Conv1D(64, 32) if kind is Conv1D else nn.Linear(32, 64, **options)
    prune_24(module)
    return module.to(dtype)


def packed(**options) -> SparseLinear24:
    return SparseLinear24.from_dense(linear(**options))


def test_it_is_exported():
    assert wanda_ext.explain is explain


def test_by_a_rule_with_both_times(gpu):
    found = explain(packed(), 5)
    assert (found.path, found.splits, found.shape) == (WIDE, 1, (64, 32))
    assert (found.packed_us, found.dense_us) == (8.0, 12.0)
    assert str(found) == (
        "wide for m=5 of 64x32: packed, by the table's rule for m=8 on Test GPU; packed 8.0 us, "
        "dense 12.0 us (1.50x)"
    )


@pytest.mark.parametrize(("m", "kernel"), [(1, SKINNY), (9, SKINNY), (16, SKINNY), (17, WIDE)])
def test_by_default(m, kernel, gpu):
    found = explain(packed(), m)
    assert (found.path, found.packed_us, found.dense_us) == (kernel, None, None)
    assert found.why == f"packed, by default, for m={m} was not measured on Test GPU"


def test_rules_are_installed_before_they_are_told(gpu, monkeypatch):
    module = packed()
    pose_as_gpu(monkeypatch)  # a process that has not used the GPU yet, with the rows in its cache
    wanda_ext.packed.dispatch_table.store([row(8, WIDE, n=64, k=32)])
    assert explain(module, 8).path == WIDE


def test_splits_are_told(gpu):
    dispatch.add([row(1, SKINNY, n=64, k=32, splits=4)])
    found = explain(packed(), 1)
    assert (found.path, found.splits) == (SKINNY, 4)
    assert str(found).startswith("skinny in 4 splits of k for m=1")


def test_a_rule_set_by_hand_has_no_times(gpu):
    with dispatch.forced(dispatch.gpu_of(torch.device("cpu")), "bfloat16", 64, 32, SKINNY, 2):
        found = explain(packed(), 8)
    assert (found.path, found.splits, found.packed_us) == (SKINNY, 2, None)
    assert found.why == "packed, by a rule that is not the table's"


def test_merged_linears_run_one_product(gpu):
    module = fused(dtype=torch.bfloat16)
    found = explain(module.k_proj, 1)
    assert found.shape == (128, 64)
    assert found.why.endswith(", one product for q_proj + k_proj + v_proj")


def test_on_the_cpu():
    found = explain(packed(), 3)
    assert (found.path, found.why) == ("cpu", "packed, on the CPU")
    assert str(found) == "cpu for m=3 of 64x32: packed, on the CPU"


def test_what_would_be_an_error(gpu):
    module = packed(dtype=torch.float32)
    assert explain(module, 1).path == "none"
    assert explain(module, 1).why.startswith("float32 has no CUDA kernel")
    assert explain(module.to("meta"), 1).why == "its weight is on the meta device"


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_dense_by_the_table(kind, gpu):
    module = linear(kind=kind)
    found = explain(module, 8)
    assert (found.path, found.packed_us, found.dense_us) == ("dense", 8.0, 12.0)
    assert found.why == "2:4, but not packed: wanda_ext.swap_linears(model) packs it"
    dispatch.add([row(8, WIDE, n=64, k=32, packed_us=12.0, dense_us=12.0)])
    assert explain(module, 8).why == "packed 12.0 us, dense 12.0 us at tokens=(8,)"
    assert explain(module, 1).why.startswith("not measured on Test GPU")


def test_dense_for_other_reasons():
    why = explain(linear(), 1).why
    assert why == "packed linears save memory on the CPU, not time"
    assert explain(nn.Linear(32, 64), 1).why.startswith("cannot be packed: not 2:4: row 0")
    assert "40 columns" in explain(nn.Linear(40, 64), 1).why


@pytest.mark.parametrize("m", [0, -1, 1.5, None])
def test_m_is_a_number_of_rows(m):
    with pytest.raises(ValueError, match="m must be a number of rows above 0"):
        explain(packed(), m)


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"expected a packed linear, .*, not ReLU"):
        explain(nn.ReLU(), 1)


# --- Bitmaps --------------------------------------------------------------------------------------


def half_zero(dtype: torch.dtype = torch.bfloat16, sparsity: str | float = 0.5) -> nn.Module:
    module = nn.Linear(256, 64)
    prune_to(module, sparsity)
    return module.to(dtype)


def test_a_bitmap_on_the_cpu():
    found = explain(SparseLinearBitmap.from_dense(half_zero()), 3)
    assert str(found) == "cpu for m=3 of 64x256: a bitmap, on the CPU"
    assert (found.packed_us, found.dense_us, found.splits) == (None, None, 1)


@pytest.mark.parametrize(
    ("m", "path"), [(1, "bitmap_mma"), (16, "bitmap_mma"), (17, "bitmap_unpack")]
)
def test_a_bitmap_on_a_gpu(m, path, gpu):
    found = explain(SparseLinearBitmap.from_dense(half_zero()), m)
    assert found.path == path and found.why.endswith("16 rows; not measured")


def test_a_bitmap_that_would_be_an_error(gpu):
    module = SparseLinearBitmap.from_dense(half_zero(torch.float32))
    assert explain(module, 1).path == "none"
    assert explain(module, 1).why.startswith("float32 has no CUDA kernel")
    told = explain(module.to("meta"), 1)
    assert (told.path, told.why) == ("none", "its weight is on the meta device")


@pytest.mark.parametrize("sparsity", ["16:32", 0.5])
def test_dense_that_could_be_a_bitmap(sparsity, gpu):
    why = "linear_bitmap was not measured on Test GPU; swap_linears(model) swaps it in"
    assert explain(half_zero(sparsity=sparsity), 1).why == why


def test_dense_that_a_bitmap_would_not_help():
    why = explain(half_zero(sparsity=0.2), 1).why
    assert why.startswith("cannot be packed: not 2:4") and "% of its bytes" in why
    assert explain(half_zero(), 1).why == "packed linears save memory on the CPU, not time"
