"""Every argument the ops refuse: the type of the error, and that it names op, argument, value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from wanda_ext import ops

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
I16, I32 = torch.int16, torch.int32
raw = torch.ops.wanda_ext


def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


W, X, V, META = zeros(4, 32), zeros(3, 32), zeros(4, 16), zeros(4, 2, dtype=I16)
ACC, NORM, BAD = zeros(32, dtype=F64), zeros(32), zeros(1, dtype=I32)

REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: ops.input_sumsq_(ACC, [1.0]), TypeError, r"input_sumsq_: x: .*tensor, got list"),
    (lambda: ops.input_sumsq_(ACC, X.int()), TypeError, r"x: .*float32 or .*got torch.int32"),
    (lambda: ops.input_sumsq_(ACC, torch.tensor(1.0)), ValueError, r"x: .*got a scalar"),
    (lambda: ops.input_sumsq_(NORM, X), TypeError, r"acc: .*float64, got torch.float32"),
    (lambda: ops.input_sumsq_(ACC[:9], X), ValueError, r"acc: .*\[32\], got \[9\]"),
    (lambda: ops.input_sumsq_(ACC, X, zeros(3)), TypeError, r"keep: .*bool, got torch.float32"),
    (lambda: ops.input_sumsq_(ACC, X, zeros(2) > 0), ValueError, r"keep: .*\[3\], got \[2\]"),
    (lambda: ops.input_sumsq_(ACC, X.to("meta")), ValueError, r"acc: .*device meta.*got cpu"),
    (lambda: ops.prune_rows_(W.double(), None, 1), TypeError, r"prune_rows_: weight: .*float64"),
    (lambda: ops.prune_rows_(NORM, None, 1), ValueError, r"weight: .*\[n, k\], got \[32\]"),
    (lambda: ops.prune_rows_(zeros(32, 4).T, None, 1), ValueError, r"strides \[1, 4\]; pass its"),
    (lambda: ops.prune_rows_(NORM.expand(4, 32), None, 1), ValueError, r"strides \[0, 1\]"),
    (lambda: ops.prune_rows_(W, NORM.double(), 1), TypeError, r"input_norm: .*got torch.float64"),
    (lambda: ops.prune_rows_(W, NORM[:4], 1), ValueError, r"input_norm: .*\[32\], got \[4\]"),
    (lambda: ops.prune_rows_(W, zeros(64)[::2], 1), ValueError, r"input_norm: .*contiguous"),
    (lambda: ops.prune_rows_(W, NORM, 33), ValueError, r"n_prune <= k = 32, got 33"),
    (lambda: ops.prune_rows_(W, NORM, -1), ValueError, r"got -1"),
    (lambda: ops.prune_rows_(W, NORM, 1, zeros(1)), TypeError, r"bad: .*int32, got torch.float32"),
    (lambda: ops.prune_rows_(W, NORM, 1, zeros(2, dtype=I32)), ValueError, r"bad: .*got \[2\]"),
    (lambda: ops.prune_rows_(zeros(1, 131073), None, 1), ValueError, r"<= 131072, got 131073"),
    (lambda: ops.prune_nm_(W, NORM, 0, 4), ValueError, r"prune_nm_: .*got 0:4"),
    (lambda: ops.prune_nm_(W, NORM, 5, 4), ValueError, r"got 5:4"),
    (lambda: ops.prune_nm_(W, NORM, 2, 64), ValueError, r"<= 32, got 2:64"),
    (lambda: ops.prune_nm_(W, NORM, 2, 5), ValueError, r"divisible by 5, got \[4, 32\]"),
    (lambda: ops.pack_24(zeros(4, 24)), ValueError, r"pack_24: .*divisible by 16, got \[4, 24\]"),
    (lambda: ops.pack_24(W, zeros(1)), TypeError, r"bad: .*int32"),
    (lambda: ops.unpack_24(zeros(4, 9), META), ValueError, r"unpack_24: values: .*got \[4, 9\]"),
    (lambda: ops.unpack_24(V, META.int()), TypeError, r"meta: .*int16, got torch.int32"),
    (lambda: ops.unpack_24(V, META, 80), ValueError, r"meta: .*\[32, 2\], got \[4, 2\]"),
    (lambda: ops.unpack_24(V, META, 1), ValueError, r"order 0 .*got 1"),
    (lambda: ops.unpack_24(zeros(16, 4).T, META), ValueError, r"values: .*contiguous"),
    (lambda: ops.order_meta_24(META, 4, 30, 0, 80), ValueError, r"order_meta_24: .*got 4, 30"),
    (lambda: ops.order_meta_24(META, 4, 32, 0, 70), ValueError, r"order 0 .*got 70"),
    (lambda: ops.order_meta_24(META, 5, 32, 0, 80), ValueError, r"meta: .*\[5, 2\], got \[4, 2\]"),
    (lambda: ops.linear_24(X.bfloat16(), V, META), TypeError, r"linear_24: x: .*float32, got"),
    (lambda: ops.linear_24(X[:, :16], V, META), ValueError, r"x: .*\[..., 32\], got \[3, 16\]"),
    (lambda: ops.linear_24(X, V, META, 0, NORM), ValueError, r"bias: .*\[4\], got \[32\]"),
    (lambda: ops.linear_24(X, V, META, 0, zeros(4, dtype=BF16)), TypeError, r"bias: .*bfloat16"),
    (lambda: ops.linear_24(X, V.clone().requires_grad_(), META), ValueError, r"no gradient"),
    (lambda: ops.supports("linear", "cpu"), ValueError, r"linear_stream, got 'linear'"),
]

# The same through torch.ops, where the bindings check.
REFUSED_RAW: list[tuple[Callable[[], object], str]] = [
    (lambda: raw.input_sumsq_(NORM, X), r"input_sumsq_: acc must be float64, got float32"),
    (lambda: raw.input_sumsq_(ACC, X.int()), r"x must be float32, bfloat16 or float16, got int32"),
    (lambda: raw.input_sumsq_(ACC[:9], X), r"acc must be of shape \[32\], got \[9\]"),
    (lambda: raw.input_sumsq_(zeros(64, dtype=F64)[::2], X), r"acc must be contiguous"),
    (lambda: raw.prune_rows_(zeros(32, 4).T, None, 1), r"prune_rows_: weight .*strides \[1, 4\]"),
    (lambda: raw.prune_rows_(NORM, None, 1), r"weight must be of shape \[n, k\], got \[32\]"),
    (lambda: raw.prune_rows_(W, NORM[:4], 1), r"input_norm must be of shape \[32\], got \[4\]"),
    (lambda: raw.prune_rows_(W, NORM, 33), r"prune_rows_: .*33"),
    (lambda: raw.prune_nm_(W, NORM, 2**32 + 2, 4), r"prune_nm_: .*got keep 4294967298, group 4"),
    (lambda: raw.prune_nm_(W, NORM, 2, 5), r"prune_nm_: .*5"),
    (lambda: raw.pack_24(zeros(4, 24)), r"pack_24: weight .*divisible by 16, got \[4, 24\]"),
    (lambda: raw.unpack_24(V, META, 80), r"unpack_24: meta must be .*\[32, 2\], got \[4, 2\]"),
    (lambda: raw.unpack_24(V, META, 2**32), r"unpack_24: order must be 0 .*got 4294967296"),
    (lambda: raw.unpack_24(zeros(16, 4).T, META, 0), r"unpack_24: values must be contiguous"),
    (lambda: raw.order_meta_24(META, -4, 32, 0, 80), r"order_meta_24: .*got n -4"),
    (lambda: raw.linear_24(X.bfloat16(), V, META, 0), r"linear_24: x .*float32, got bfloat16"),
    (lambda: raw.linear_24(X[:, :8], V, META, 0), r"x must be of shape \[..., 32\], got \[3, 8\]"),
    (lambda: raw.linear_24(X, V, META, 0, NORM), r"bias must be of shape \[4\], got \[32\]"),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[row[2] for row in REFUSED])
def test_refused_with_a_clear_error(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"wanda_ext\..*" + message):
        call()


@pytest.mark.parametrize("call, message", REFUSED_RAW, ids=[row[1] for row in REFUSED_RAW])
def test_bindings_refuse_too(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=r"^wanda_ext\..*" + message):
        call()


def test_a_refused_call_changes_nothing() -> None:
    weight = torch.ones(4, 32)
    with pytest.raises(ValueError, match="divisible"):
        ops.prune_nm_(weight, None, 2, 5)
    with pytest.raises(RuntimeError, match="prune_rows_"):
        raw.prune_rows_(weight, None, 33)
    assert (weight == 1).all()
