"""The bitmap ops against their oracles: any shape, any number of non-zeros, with a surplus."""

from __future__ import annotations

import pytest
import torch
from op_cases import (
    DTYPES,
    KINDS,
    assert_refused,
    bitmap_of_32,
    bits,
    generator,
    rows_apart,
    surplus_of,
    values,
)
from torch import Tensor

from wanda_ext import ops, reference

SHAPES = [(1, 1), (3, 31), (16, 32), (17, 33), (5, 127), (40, 128), (33, 300), (0, 40), (3, 0)]


def assert_same_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    expected_bad, expected = torch.tensor([7], dtype=torch.int32), reference.pack_bitmap(weight)
    reference.pack_bitmap(weight, expected_bad)
    for source in (weight, rows_apart(weight)):
        bad = torch.tensor([9], dtype=torch.int32)
        packed = ops.pack_bitmap(source, bad)
        assert bad.item() == expected_bad.item()
        for a, b in zip(packed, expected, strict=True):
            assert a.shape == b.shape and torch.equal(bits(a), bits(b))
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_round_trip(n: int, k: int, dtype: torch.dtype, kind: str) -> None:
    weight = bitmap_of_32(n, k, dtype, kind, generator("bitmap", n, k, kind))
    packed, mask = assert_same_pack(weight)
    assert packed.shape == (-(-n // 16), -(-k // 128), 1024)
    for unpack in (ops.unpack_bitmap, reference.unpack_bitmap):
        assert torch.equal(bits(unpack(packed, mask, n, k)), bits(weight + 0.0))
    assert ((mask[..., None] >> torch.arange(32) & 1).sum(-1) == 16).all()


@pytest.mark.parametrize("nonzeros", range(0, 33, 2))
def test_records_of_any_number_of_non_zeros(nonzeros: int) -> None:
    g = generator("records", nonzeros)
    weight = torch.zeros(20, 96).bfloat16()
    weight[[6, 13], 32:64] = (torch.rand(2, 32, generator=g) + 1).bfloat16()
    order = torch.rand(2, 32, generator=g).argsort(dim=1)
    weight[[6, 13], 32:64] = weight[[6, 13], 32:64].where(order < nonzeros, -0.0)
    packed, mask = assert_same_pack(weight)
    bad = torch.zeros(1, dtype=torch.int32)
    ops.pack_bitmap(weight, bad)
    assert bad.item() == (6 if nonzeros > 16 else -1)
    kept = ops.unpack_bitmap(packed, mask, 20, 96)
    for row in (6, 13):
        assert kept[row].nonzero().tolist() == weight[row].nonzero()[:16].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_widest_weight_and_patterns_that_fit(dtype: torch.dtype) -> None:
    weight = values((2, 131072), dtype, "normal", generator("wide"))
    for keep, group in [(16, 32), (8, 16), (4, 8), (2, 4)]:
        pruned = weight.clone()
        ops.prune_nm_(pruned, None, keep, group)
        packed, mask = assert_same_pack(pruned)
        assert torch.equal(ops.unpack_bitmap(packed, mask, 2, 131072), pruned)
        assert ((packed != 0).sum() == (pruned != 0).sum()).item()


def test_nan_and_infinity_are_kept() -> None:
    weight = torch.zeros(2, 40)
    weight[0, [0, 38]] = torch.tensor([float("nan"), float("-inf")])
    packed, mask = assert_same_pack(weight)
    assert torch.equal(bits(ops.unpack_bitmap(packed, mask, 2, 40)), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 3, 4, 5, 33, 300])
@pytest.mark.parametrize("n, k", [*SHAPES, (70, 1024)])
def test_linear_is_within_the_rounding_of_fp32_sums(
    m: int, n: int, k: int, dtype: torch.dtype, cpu_kernels: str
) -> None:
    g = generator("linear bitmap", m, n, k)
    weight = bitmap_of_32(n, k, dtype, "normal", g)
    x, bias = values((m, k), dtype, "normal", g), values((n,), dtype, "normal", g)
    packed, mask = ops.pack_bitmap(weight)
    whole, *surplus = surplus_of(weight, g)
    assert torch.equal(ops.unpack_bitmap(packed, mask, n, k, *surplus), whole)
    assert torch.equal(reference.unpack_bitmap(packed, mask, n, k, *surplus), whole)
    for dense, rest in ((weight, ()), (whole, surplus)):
        exact = x.double() @ dense.double().T
        magnitude = x.double().abs() @ dense.double().abs().T
        for added in (None, bias):
            total = exact if added is None else exact + added.double()
            slack = (magnitude + total.abs()) * (k + 2) * 2**-24
            slack += total.abs() * torch.finfo(dtype).eps
            for linear in (ops.linear_bitmap, reference.linear_bitmap):
                y = linear(x, packed, mask, n, added, *rest)
                assert y.dtype == dtype and y.shape == (m, n)
                assert ((y.double() - total).abs() <= slack).all()


def test_linear_takes_any_leading_shape_and_any_number_of_threads() -> None:
    g = generator("bitmap leading")
    packed, mask = ops.pack_bitmap(bitmap_of_32(50, 200, torch.float32, "normal", g))
    x = torch.randn(4, 5, 200, generator=g)
    rows = ops.linear_bitmap(x.reshape(20, 200), packed, mask, 50).reshape(4, 5, 50)
    assert torch.equal(ops.linear_bitmap(x, packed, mask, 50), rows)
    assert torch.equal(ops.linear_bitmap(x.transpose(0, 1), packed, mask, 50), rows.transpose(0, 1))
    assert torch.equal(ops.linear_bitmap(rows_apart(x[1]), packed, mask, 50), rows[1])
    few = ops.linear_bitmap(x[0, 0], packed, mask, 50)
    assert few.shape == (50,)
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        again = (
            ops.linear_bitmap(x, packed, mask, 50),
            ops.linear_bitmap(x[0, 0], packed, mask, 50),
        )
        assert torch.equal(again[0], rows) and torch.equal(again[1], few)
    torch.set_num_threads(before)


P, M = ops.pack_bitmap(torch.ones(20, 40))
WIDE, WIDE_M = ops.pack_bitmap(torch.ones(1, 65537))
X = torch.zeros(3, 40)
ROWS = torch.zeros(21, dtype=torch.int32)
COLUMNS = torch.zeros(2, dtype=torch.int16)


@pytest.mark.parametrize(
    "name, arguments, error, message",
    [
        ("unpack_bitmap", (P, M, 40, 40), ValueError, r"values: .*\[3, 1, 1024\], got \[2, 1,"),
        ("unpack_bitmap", (P, M, 20, 129), ValueError, r"values: .*\[2, 2, 1024\]"),
        ("unpack_bitmap", (P, M, -1, 40), ValueError, r".*n, k >= 0, got -1, 40"),
        ("unpack_bitmap", (P, M.long(), 20, 40), TypeError, r"mask: .*int32, got torch.int64"),
        ("unpack_bitmap", (P, M, 20, 40, ROWS), ValueError, r"surplus: .*or none of them"),
        (
            "unpack_bitmap",
            (P, M, 20, 40, ROWS[1:], COLUMNS, P[0, 0, :2]),
            ValueError,
            r"surplus_rows: .*\[21\], got \[20\]",
        ),
        (
            "unpack_bitmap",
            (P, M, 20, 40, ROWS, COLUMNS.int(), P[0, 0, :2]),
            TypeError,
            r"surplus_columns: .*int16, got torch.int32",
        ),
        (
            "unpack_bitmap",
            (WIDE, WIDE_M, 1, 65537, ROWS[:2], COLUMNS, P[0, 0, :2]),
            ValueError,
            r"surplus: .*k <= 65536, got 65537",
        ),
        (
            "linear_bitmap",
            (torch.zeros(1, 65537), WIDE, WIDE_M, 1, None, ROWS[:2], COLUMNS, P[0, 0, :2]),
            ValueError,
            r"surplus: .*k <= 65536, got 65537",
        ),
        (
            "linear_bitmap",
            (X, P, M, 20, None, ROWS, COLUMNS, P[0, 0, :3]),
            ValueError,
            r"surplus_values: .*\[2\], got \[3\]",
        ),
        ("linear_bitmap", (X.half(), P, M, 20), TypeError, r"x: .*float32, got torch.float16"),
        ("linear_bitmap", (X[0, 0], P, M, 20), ValueError, r"x: .*got a scalar"),
        ("linear_bitmap", (X, P, M, 20, X[0]), ValueError, r"bias: .*\[20\], got \[40\]"),
        (
            "linear_bitmap",
            (X, P.clone().requires_grad_(), M, 20),
            ValueError,
            r"values: packed weights have no gradient",
        ),
        ("pack_bitmap", (X.int(),), TypeError, r"weight: .*got torch.int32"),
        ("pack_bitmap", (X.T,), ValueError, r"weight: .*unit column stride"),
    ],
)
def test_refused_with_a_clear_error(
    name: str, arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    assert_refused(name, arguments, error, message)


@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_surplus_columns_fill_all_16_bits(dtype: torch.dtype, m: int) -> None:
    n, k = 3, 65535  # and not 65536, of which -1 is the last column too
    rows = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
    columns = torch.tensor([40000, 32767, 32768, 65534])
    entries = torch.tensor([3, -5, 7, 11]).to(dtype)
    assert columns.short().tolist() == [-25536, 32767, -32768, -2]
    packed, mask = ops.pack_bitmap(torch.zeros(n, k, dtype=dtype))
    surplus = rows, columns.short(), entries
    whole = torch.zeros(n, k, dtype=dtype)
    whole[torch.tensor([0, 2, 2, 2]), columns] = entries
    x = torch.zeros(m, k, dtype=dtype)
    x[:, columns] = torch.tensor([2, 1, 4, -3]).to(dtype)
    for op in (ops, reference):
        assert torch.equal(op.unpack_bitmap(packed, mask, n, k, *surplus), whole)
        y = op.linear_bitmap(x, packed, mask, n, None, *surplus)
        assert y.tolist() == [[6, 0, -5 + 28 - 33]] * m


def test_a_surplus_that_points_outside_is_refused() -> None:
    rows, columns = ROWS.clone(), COLUMNS.clone()
    rows[5:] = 2
    entries = torch.ones(2)
    ops.linear_bitmap(X, P, M, 20, None, rows, columns, entries)
    for wrong_rows, wrong_columns in (
        (rows, columns + 40),
        (rows, columns - 1),  # 65535
        (rows + 1, columns),
    ):
        with pytest.raises(RuntimeError, match=r"linear_bitmap: .*surplus"):
            ops.linear_bitmap(X, P, M, 20, None, wrong_rows, wrong_columns, entries)
