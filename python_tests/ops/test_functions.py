"""Each op against its oracle, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fresh_python import run_python
from op_cases import DTYPES, KINDS, bits, generator, norms, rows_apart, two_of_four, uneven, values
from torch import Tensor

from wanda_ext import ops, reference

PATTERNS = [(2, 4), (4, 8), (8, 16), (1, 4), (1, 2), (5, 7), (16, 32), (4, 4)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def new_bad() -> Tensor:
    return torch.full((1,), 99, dtype=torch.int32)


def assert_same_sum(x: Tensor, keep: Tensor | None = None) -> None:
    k = x.shape[-1]
    actual, expected = torch.linspace(0, 1, k, dtype=torch.float64).expand(2, k).clone()
    ops.input_sumsq_(actual, x, keep)
    reference.input_sumsq_(expected, x, keep)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 31, 33, 256, 900])
@pytest.mark.parametrize("k", [0, 1, 9, 130, 1024])
def test_input_sumsq(m: int, k: int, dtype: torch.dtype, threads: int) -> None:
    g = generator("sumsq", m, k)
    for kind in KINDS:
        assert_same_sum(values((m, k), dtype, kind, g))
    x = uneven(values((m, k), dtype, "normal", g), g)
    assert_same_sum(x)
    assert_same_sum(rows_apart(x))
    assert_same_sum(x, torch.rand(m, generator=g) < 0.6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_input_sumsq_reports_by_value_and_skips_dropped_tokens(value: float) -> None:
    x = torch.ones(70, 20)
    x[40, 3] = value
    assert_same_sum(x)
    assert_same_sum(x, torch.arange(70) != 40)


def test_input_sumsq_takes_any_leading_shape() -> None:
    x = torch.randn(5, 6, 7, 24, generator=generator("leading"))
    keep = torch.rand(5, 6, 7, generator=generator("keep")) < 0.5
    for view, mask in [
        (x, keep),
        (x[0, 0, 0], keep[0, 0, 0]),
        (x[:, 2], keep[:, 2]),
        (x.transpose(0, 2), keep.transpose(0, 2)),
        (x[..., ::2], keep),
        (x.transpose(2, 3)[..., :4], keep[..., :1].expand(5, 6, 24)),
        (x[:1].expand(5, 6, 7, 24), keep),
        (x[:0], keep[:0]),
    ]:
        assert_same_sum(view)
        assert_same_sum(view, mask)


def assert_same_prune(prune: str, weight: Tensor, norm: Tensor | None, *options: int) -> None:
    """The op on rows that lie apart and on dense ones; what lies between rows stays NaN."""
    expected, expected_bad = weight.clone(), new_bad()
    getattr(reference, prune)(expected, norm, *options, expected_bad)
    for actual in (weight.clone(), rows_apart(weight)):
        bad = new_bad()
        getattr(ops, prune)(actual, norm, *options, bad)
        assert torch.equal(bits(actual), bits(expected))
        assert bad.item() == expected_bad.item()
        if actual.numel() and not actual.is_contiguous():
            n, k = actual.shape
            whole = actual.as_strided((n, actual.stride(0)), actual.stride())
            assert whole[:, k:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(1, 1), (3, 7), (5, 64), (4, 1003), (2, 4096), (0, 16), (3, 0)])
def test_prune_rows(n: int, k: int, dtype: torch.dtype, kind: str, threads: int) -> None:
    g = generator("rows", n, k, kind)
    weight, norm = values((n, k), dtype, kind, g), norms(k, kind, g)
    for n_prune in {0, 1, k // 2, int(k * 0.6), k - 1, k} & set(range(k + 1)):
        assert_same_prune("prune_rows_", weight, norm, n_prune)
        assert_same_prune("prune_rows_", weight, None, n_prune)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_prune_rows_of_the_widest_weight(dtype: torch.dtype, kind: str, threads: int) -> None:
    k = ops.MAX_COLS
    g = generator("widest", kind)
    weight, norm = values((2, k), dtype, kind, g), norms(k, kind, g)
    assert_same_prune("prune_rows_", weight, norm, k // 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep, group", PATTERNS)
def test_prune_nm(keep: int, group: int, dtype: torch.dtype, kind: str, threads: int) -> None:
    for n, groups in [(1, 1), (7, 13), (0, 2), (3, 0), (40, 65)]:
        g, k = generator("nm", n, groups, group, kind), groups * group
        weight = values((n, k), dtype, kind, g)
        assert_same_prune("prune_nm_", weight, norms(k, kind, g), keep, group)
        assert_same_prune("prune_nm_", weight, None, keep, group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_bad_rows_are_reported_and_left_alone(dtype: torch.dtype, value: float) -> None:
    for column in (0, 13, 95):
        weight, norm = values((9, 96), dtype, "zeros", generator("bad", column)), torch.ones(96)
        weight[[4, 7], column] = value
        for scale in (None, norm):
            assert_same_prune("prune_rows_", weight, scale, 48)
            assert_same_prune("prune_nm_", weight, scale, 2, 4)
        norm[column] = value
        assert_same_prune("prune_rows_", weight, norm, 48)
        assert_same_prune("prune_nm_", weight, norm, 2, 4)
    overflow = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 3e38]])
    assert_same_prune("prune_rows_", overflow, torch.full((4,), 10.0), 2)
    assert_same_prune("prune_nm_", overflow, torch.full((4,), 10.0), 2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(1, 16), (5, 48), (70, 272), (0, 32), (3, 0), (64, 128)])
def test_pack_unpack_and_orders(
    n: int, k: int, dtype: torch.dtype, kind: str, threads: int
) -> None:
    weight = two_of_four(n, k, dtype, kind, generator("pack", n, k, kind))
    for source in (weight, rows_apart(weight)):
        bad = new_bad()
        packed, meta = ops.pack_24(source, bad)
        expected, expected_meta = reference.pack_24(weight)
        assert bad.item() == -1
        assert torch.equal(bits(packed), bits(expected))
        assert torch.equal(meta, expected_meta)
    for order in (0, 80, 90):
        moved = ops.order_meta_24(meta, n, k, 0, order)
        assert torch.equal(moved, reference.order_meta_24(meta, n, k, 0, order))
        assert torch.equal(bits(ops.unpack_24(packed, moved, order)), bits(weight + 0.0))
        for other in (0, 80, 90):
            there = ops.order_meta_24(moved, n, k, order, other)
            assert torch.equal(there, reference.order_meta_24(meta, n, k, 0, other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_keeps_nan_and_reports_rows_that_are_not_2_of_4(dtype: torch.dtype) -> None:
    weight = two_of_four(40, 64, dtype, "normal", generator("overfull"))
    weight[3, :4] = torch.tensor([0.0, float("nan"), 0.0, float("-inf")])
    weight[[12, 30], 60:63] = 1.0
    bad, expected_bad = new_bad(), new_bad()
    packed, meta = ops.pack_24(weight, bad)
    expected, expected_meta = reference.pack_24(weight, expected_bad)
    assert bad.item() == expected_bad.item() == 12
    assert torch.equal(bits(packed), bits(expected))
    assert torch.equal(meta, expected_meta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 2, 5, 33, 70, 300])
@pytest.mark.parametrize("n, k", [(1, 16), (9, 48), (70, 272), (130, 1024), (0, 16), (3, 0)])
def test_linear_is_within_the_rounding_of_fp32_sums(
    m: int, n: int, k: int, dtype: torch.dtype, cpu_kernels: str
) -> None:
    g = generator("linear", m, n, k)
    weight = two_of_four(n, k, dtype, "normal", g)
    x, bias = values((m, k), dtype, "normal", g), values((n,), dtype, "normal", g)
    packed, meta = ops.pack_24(weight)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    for added in (None, bias):
        total = exact if added is None else exact + added.double()
        slack = (magnitude + total.abs()) * (k + 2) * 2**-24 + total.abs() * torch.finfo(dtype).eps
        for order in (0, 80, 90):
            moved = ops.order_meta_24(meta, n, k, 0, order)
            y = ops.linear_24(x, packed, moved, order, added)
            assert y.dtype == dtype
            assert ((y.double() - total).abs() <= slack).all()


def test_linear_takes_any_leading_shape() -> None:
    g = generator("linear leading")
    packed, meta = ops.pack_24(two_of_four(24, 48, torch.float32, "normal", g))
    x = torch.randn(4, 5, 48, generator=g)
    rows = ops.linear_24(x.reshape(20, 48), packed, meta).reshape(4, 5, 24)
    assert torch.equal(ops.linear_24(x, packed, meta), rows)
    assert torch.equal(ops.linear_24(x.transpose(0, 1), packed, meta), rows.transpose(0, 1))
    assert torch.equal(ops.linear_24(x[:, 3], packed, meta), rows[:, 3])
    assert torch.equal(ops.linear_24(rows_apart(x[1]), packed, meta), rows[1])
    assert ops.linear_24(x[0, 0], packed, meta).shape == (24,)


def test_the_environment_forces_a_set_of_kernels() -> None:
    code = "import wanda_ext.ops; from wanda_ext import _C; print(_C.cpu_kernels())"
    for name in ("plain", "sse9"):
        forced = f"import os; os.environ['WANDA_EXT_CPU_KERNELS'] = {name!r}; "
        done = run_python(forced + code)
        if name == "plain":
            assert done.stdout == "plain\n"
        else:
            assert "this build and processor have" in done.stderr
            assert "plain, got sse9" in done.stderr


def results_of_all_ops() -> list[Tensor]:
    g = generator("all ops")
    x, weight = torch.randn(700, 512, generator=g), torch.randn(300, 512, generator=g)
    acc, by_rows, by_groups = torch.zeros(512, dtype=torch.float64), weight.clone(), weight.clone()
    ops.input_sumsq_(acc, x)
    norm = acc.sqrt().float()
    ops.prune_rows_(by_rows, norm, 256)
    ops.prune_nm_(by_groups, norm, 2, 4)
    packed, meta = ops.pack_24(by_groups)
    return [
        acc,
        by_rows,
        by_groups,
        packed,
        meta,
        *(ops.linear_24(x[:m], packed, meta) for m in (1, 60)),
    ]


def test_same_bits_in_every_run_on_any_number_of_threads_and_from_several_at_once() -> None:
    before = torch.get_num_threads()
    first = results_of_all_ops()
    runs = [results_of_all_ops()]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(results_of_all_ops())
    torch.set_num_threads(before)
    with ThreadPoolExecutor(2) as pool:
        runs += [f.result() for f in [pool.submit(results_of_all_ops) for _ in range(4)]]
    for run in runs:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, run, strict=True))


@pytest.mark.parametrize("prune, options", [("prune_rows_", (5000,)), ("prune_nm_", (2, 4))])
def test_pruning_allocates_no_more_than_a_row_a_thread(
    prune: str, options: tuple[int, ...], threads: int
) -> None:
    weight, norm = torch.randn(64, 8192).bfloat16(), torch.ones(8192)
    with torch.profiler.profile(profile_memory=True) as profile:
        getattr(ops, prune)(weight, norm, *options)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert allocated <= threads * 8192 * 4
