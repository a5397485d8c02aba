"""The oracles against loops so plain that they need no oracle of their own."""

from __future__ import annotations

import struct

import pytest
import torch
from op_cases import DTYPES, KINDS, bits, generator, norms, two_of_four, uneven, values

from wanda_ext import reference


def fp32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


@pytest.mark.parametrize("m", [0, 1, 32, 33, 300, 917])
@pytest.mark.parametrize("masked", [False, True])
def test_input_sumsq_follows_the_summation_tree(m: int, masked: bool) -> None:
    g = generator("sumsq", m, masked)
    x, keep = uneven(torch.randn(m, 3, generator=g), g), torch.rand(m, generator=g) < 0.7
    acc = torch.rand(3, generator=g, dtype=torch.float64)
    expected = acc.tolist()
    for column in range(3):
        for first in range(0, m, 256):
            group = 0.0
            for chunk in range(first, min(first + 256, m), 32):
                rows = range(chunk, min(chunk + 32, m))
                kept = [x[r, column].item() for r in rows if not masked or keep[r]]
                partial = 0.0
                for value in kept:
                    partial = fp32(partial + fp32(value * value))
                group += partial
            expected[column] += group
    reference.input_sumsq_(acc, x, keep if masked else None)
    assert acc.tolist() == expected


def test_input_sumsq_ignores_what_a_dropped_token_holds() -> None:
    x = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    acc = torch.zeros(2, dtype=torch.float64)
    reference.input_sumsq_(acc, x, torch.tensor([True, False]))
    assert acc.tolist() == [1.0, 4.0]


def lowest(scores: list[float], count: int) -> list[int]:
    """Of equal scores the lower column first."""
    return sorted(range(len(scores)), key=lambda column: (scores[column], column))[:count]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_prune_rows_and_nm_choose_as_a_sort_does(dtype: torch.dtype, kind: str) -> None:
    g = generator("prune", str(dtype), kind)
    weight, norm = values((6, 24), dtype, kind, g), norms(24, kind, g)
    score = (weight.float().abs() * norm).tolist()
    by_rows, by_groups = weight.clone(), weight.clone()
    reference.prune_rows_(by_rows, norm, 11)
    reference.prune_nm_(by_groups, norm, 3, 8)
    for row in range(6):
        pruned = lowest(score[row], 11)
        in_groups = [8 * i + c for i in range(3) for c in lowest(score[row][8 * i : 8 * i + 8], 5)]
        for result, columns in ((by_rows[row], pruned), (by_groups[row], in_groups)):
            expected = [0.0 if c in columns else weight[row, c].item() for c in range(24)]
            assert result.tolist() == expected
            assert not torch.signbit(result[result == 0]).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_rows_stay_as_they_were(value: float) -> None:
    weight = torch.tensor([[1.0, -0.0, 3.0, 4.0]] * 3)
    weight[1, 2] = value
    before, bad = weight.clone(), torch.tensor([7], dtype=torch.int32)
    reference.prune_rows_(weight, None, 2, bad)
    assert bad.item() == 1
    assert torch.equal(bits(weight[1]), bits(before[1]))
    assert weight[[0, 2]].tolist() == [[0.0, 0.0, 3.0, 4.0]] * 2
    reference.prune_nm_(weight[2:], None, 1, 4, bad)
    assert bad.item() == -1
    reference.prune_rows_(weight[2:], torch.tensor([1.0, 1.0, 1.0, value]), 1, bad)
    assert bad.item() == 0
    assert weight[2].tolist() == [0.0, 0.0, 0.0, 4.0]


FILL = {  # non-zero columns of a group -> kept columns
    (): (2, 3),
    (0,): (0, 3),
    (1,): (1, 3),
    (2,): (2, 3),
    (3,): (2, 3),
    (0, 1): (0, 1),
    (0, 2): (0, 2),
    (0, 3): (0, 3),
    (1, 2): (1, 2),
    (1, 3): (1, 3),
    (2, 3): (2, 3),
}


def test_pack_fills_up_with_the_highest_zero_columns() -> None:
    for position in range(4):
        for nonzeros, (low, high) in FILL.items():
            weight = torch.full((1, 16), -0.0)
            for column in nonzeros:
                weight[0, 4 * position + column] = column + 1.0
            packed, meta = reference.pack_24(weight)
            nibbles = [(meta.item() >> shift) & 15 for shift in (0, 4, 8, 12)]
            assert nibbles[position] == low | high << 2
            assert all(nibbles[other] == 2 | 3 << 2 for other in range(4) if other != position)
            expected = [c + 1.0 if c in nonzeros else 0.0 for c in (low, high)]
            assert packed[0, 2 * position : 2 * position + 2].tolist() == expected
            assert not torch.signbit(packed).any()


def test_pack_reports_the_lowest_row_with_three_of_four() -> None:
    weight = torch.zeros(4, 16)
    weight[1:3, 4:7] = 1.0
    weight[3, :2] = 5.0
    bad = torch.zeros(1, dtype=torch.int32)
    packed, meta = reference.pack_24(weight, bad)
    assert bad.item() == 1
    assert not packed[:3].any()
    assert torch.equal(reference.unpack_24(packed, meta)[3], weight[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_unpack_is_the_inverse(dtype: torch.dtype, kind: str) -> None:
    weight = two_of_four(70, 144, dtype, kind, generator("unpack", str(dtype), kind))
    packed, meta = reference.pack_24(weight)
    for order in (0, 80, 90):
        moved = reference.order_meta_24(meta, 70, 144, 0, order)
        restored = reference.unpack_24(packed, moved, order)
        assert torch.equal(bits(restored), bits(weight + 0.0))


def word_index(order: int, row: int, word: int, rows: int) -> int:
    """Where the CUTLASS layouts put the 16-bit word of a row and 16 columns."""
    if order == 80:
        pair = word // 2 * rows + row // 32 * 32 + row % 8 * 4 + row % 32 // 16 * 2 + word % 2
    else:
        atom = row // 64 * 256 + word // 8 * 4 * rows
        pair = atom + row % 64 // 16 * 64 + word % 2 * 32 + row % 8 * 4 + word % 8 // 2
    return 2 * pair + row % 16 // 8


@pytest.mark.parametrize("order, tile_rows, tile_words", [(80, 32, 2), (90, 64, 8)])
@pytest.mark.parametrize("n, k", [(1, 16), (33, 48), (64, 128), (130, 272), (0, 16)])
def test_orders_match_the_index_formulas(
    order: int, tile_rows: int, tile_words: int, n: int, k: int
) -> None:
    g = generator("order", order, n, k)
    meta = torch.randint(-(2**15), 2**15, (n, k // 16), generator=g, dtype=torch.int16)
    moved = reference.order_meta_24(meta, n, k, 0, order)
    rows, words = moved.shape
    assert (rows - n, words - k // 16) == (-n % tile_rows, -(k // 16) % tile_words)
    flat = moved.flatten().tolist()
    for row in range(rows):
        for word in range(words):
            inside = row < n and word < k // 16
            expected = meta[row, word].item() if inside else 0x4444
            assert flat[word_index(order, row, word, rows)] == expected
    assert torch.equal(reference.order_meta_24(moved, n, k, order, 0), meta)
    other = 170 - order
    there = reference.order_meta_24(moved, n, k, order, other)
    assert torch.equal(there, reference.order_meta_24(meta, n, k, 0, other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_a_matrix_product(dtype: torch.dtype) -> None:
    g = generator("linear", str(dtype))
    weight = two_of_four(24, 64, dtype, "normal", g)
    x, bias = torch.randn(2, 3, 64, generator=g).to(dtype), torch.randn(24, generator=g).to(dtype)
    y = reference.linear_24(x, *reference.pack_24(weight), 0, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert y.dtype == dtype
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-5)
