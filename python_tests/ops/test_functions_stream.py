"""The stream ops against their oracles: any shape, any sparsity."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, KINDS, assert_refused, bits, generator, rows_apart, values
from torch import Tensor

from wanda_ext import ops, reference

SHAPES = [(1, 1), (3, 31), (16, 32), (17, 33), (5, 127), (40, 128), (33, 300), (0, 40), (3, 0)]
SPARSITIES = [0.0, 0.3, 0.5, 0.7, 0.95, 1.0]


def sparse(n: int, k: int, dtype: torch.dtype, kind: str, sparsity: float) -> Tensor:
    g = generator("stream", n, k, kind, sparsity)
    weight = values((n, k), dtype, kind, g)
    return weight.where(torch.rand(n, k, generator=g) >= sparsity, -0.0)


def packed_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ops.pack_stream(weight, int(weight.count_nonzero()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_round_trip(n: int, k: int, dtype: torch.dtype, kind: str) -> None:
    for sparsity in SPARSITIES:
        weight = sparse(n, k, dtype, kind, sparsity)
        expected = reference.pack_stream(weight, int(weight.count_nonzero()))
        for source in (weight, rows_apart(weight)):
            for a, b in zip(packed_of(source), expected, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                same = (bits(a), bits(b)) if a.is_floating_point() else (a, b)
                assert torch.equal(*same)
        for unpack in (ops.unpack_stream, reference.unpack_stream):
            assert torch.equal(bits(unpack(*expected, k)), bits(weight + 0.0))


def test_nan_and_infinity_are_kept(cpu_kernels: str) -> None:
    weight = torch.zeros(2, 40)
    weight[0, [0, 38]] = torch.tensor([float("nan"), float("-inf")])
    assert torch.equal(bits(ops.unpack_stream(*packed_of(weight), 40)), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 3, 5, 33, 300])
@pytest.mark.parametrize("n, k", [*SHAPES, (70, 1024)])
def test_linear_is_within_the_rounding_of_fp32_sums(
    m: int, n: int, k: int, dtype: torch.dtype, cpu_kernels: str
) -> None:
    g = generator("linear stream", m, n, k)
    x, bias = values((m, k), dtype, "normal", g), values((n,), dtype, "normal", g)
    for sparsity in (0.5, 0.9):
        weight = sparse(n, k, dtype, "normal", sparsity)
        packed = packed_of(weight)
        assert torch.equal(ops.unpack_stream(*packed, k), weight)
        for added in (None, bias):
            total = x.double() @ weight.double().T
            magnitude = x.double().abs() @ weight.double().abs().T
            total = total if added is None else total + added.double()
            slack = (magnitude + total.abs()) * (k + 2) * 2**-24
            slack += total.abs() * torch.finfo(dtype).eps
            for linear in (ops.linear_stream, reference.linear_stream):
                y = linear(x, *packed, added)
                assert y.dtype == dtype and y.shape == (m, n)
                assert ((y.double() - total).abs() <= slack).all()


def test_rows_can_be_cut_and_threads_change_nothing() -> None:
    weight = sparse(50, 200, torch.float32, "normal", 0.6)
    packed, mask, offsets = packed_of(weight)
    x = torch.randn(4, 5, 200, generator=generator("stream leading"))
    rows = ops.linear_stream(x, packed, mask, offsets)
    part = ops.linear_stream(x, packed, mask[7:30], offsets[7:31])
    assert torch.equal(part, rows[..., 7:30])
    assert torch.equal(ops.unpack_stream(packed, mask[7:30], offsets[7:31], 200), weight[7:30])
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(ops.linear_stream(x, packed, mask, offsets), rows)
    torch.set_num_threads(before)


V, M, OFFSETS = packed_of(torch.ones(20, 40))
X = torch.zeros(3, 40)


@pytest.mark.parametrize(
    "name, arguments, error, message",
    [
        ("pack_stream", (X, -1), ValueError, r"expected 0 <= count <= 120, got -1"),
        ("pack_stream", (X.T, 0), ValueError, r"weight: .*unit column stride"),
        ("unpack_stream", (V, M, OFFSETS, 41), ValueError, r"mask: .*\[20, 6\], got \[20, 5\]"),
        ("unpack_stream", (V, M, OFFSETS[1:], 40), ValueError, r"offsets: .*\[21\], got \[20\]"),
        ("unpack_stream", (V, M.int(), OFFSETS, 40), TypeError, r"mask: .*uint8, got torch.int32"),
        (
            "unpack_stream",
            (V, M, OFFSETS.int(), 40),
            TypeError,
            r"offsets: .*int64, got torch.int32",
        ),
        ("unpack_stream", (V[None], M, OFFSETS, 40), ValueError, r"values: expected shape \[1\]"),
        ("linear_stream", (X.half(), V, M, OFFSETS), TypeError, r"x: .*float32, got torch.float16"),
        ("linear_stream", (X[0, 0], V, M, OFFSETS), ValueError, r"x: .*got a scalar"),
        ("linear_stream", (X, V, M, OFFSETS, X[0]), ValueError, r"bias: .*\[20\], got \[40\]"),
        (
            "linear_stream",
            (X, V.clone().requires_grad_(), M, OFFSETS),
            ValueError,
            r"values: packed weights have no gradient",
        ),
    ],
)
def test_refused_with_a_clear_error(
    name: str, arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    assert_refused(name, arguments, error, message)


def test_what_leads_outside_is_refused_or_stays_inside(cpu_kernels: str) -> None:
    weight = sparse(20, 300, torch.bfloat16, "normal", 0.5)
    packed, mask, offsets = packed_of(weight)
    with pytest.raises(RuntimeError, match=r"pack_stream: count must be the number of non-zeros"):
        ops.pack_stream(weight, len(packed) + 1)
    for wrong in (offsets + 1, offsets - 1, offsets.flip(0)):
        with pytest.raises(RuntimeError, match=r"unpack_stream: offsets must ascend"):
            ops.unpack_stream(packed, mask, wrong, 300)
    for damaged in (torch.full_like(mask, 255), torch.zeros_like(mask)):
        for m in (1, 6):
            x = torch.ones(m, 300, dtype=torch.bfloat16)
            ops.linear_stream(x, packed, damaged, offsets)
        ops.unpack_stream(packed, damaged, offsets, 300)
