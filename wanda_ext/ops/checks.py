"""What the ops refuse, before anything runs: each error says op, argument, expected and got."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from wanda_ext.ops.register import FAKES, META_TILES, bitmap_tiles, meta_shape_24

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_SURPLUS_COLS = 65536  # of a weight that has a surplus

_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
DEVICES = {
    op: {"meta"}.union(d for d in ("cpu", "cuda") if _has_kernel(f"wanda_ext::{op}", d.upper()))
    for op in FAKES
}


def refuse(op: str, why: str) -> NoReturn:
    raise ValueError(f"wanda_ext.{op}: {why}")


def check(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"wanda_ext.{op}: {name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"wanda_ext.{op}: {name}: expected {expected}, got {tensor.dtype}")
    if shape is not None and tensor.shape != shape:
        refuse(op, f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        refuse(op, f"{name}: expected device {like.device}, as its peers, got {tensor.device}")
    if tensor.device.type not in DEVICES[op]:
        devices = ", ".join(sorted(DEVICES[op]))
        refuse(op, f"{name}: this build has kernels for {devices}, got {tensor.device}")


def check_dense(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    like: Tensor | None = None,
) -> None:
    check(op, name, tensor, dtypes, shape, like)
    if not tensor.is_contiguous():
        refuse(op, f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def check_weight(op: str, weight: Tensor, bad: Tensor | None) -> None:
    check(op, "weight", weight, FLOATS)
    if weight.dim() != 2:
        refuse(op, f"weight: expected [n, k], got {list(weight.shape)}")
    n, k = weight.shape
    if (k > 1 and weight.stride(1) != 1) or (n > 1 and weight.stride(0) < k):
        why = f"unit column stride and separate rows, got strides {list(weight.stride())}"
        refuse(op, f"weight: expected {why}; pass its transpose or a contiguous copy")
    if bad is not None:
        check_dense(op, "bad", bad, (torch.int32,), (1,), weight)


def check_pruned(op: str, weight: Tensor, input_norm: Tensor | None, bad: Tensor | None) -> None:
    check_weight(op, weight, bad)
    if input_norm is not None:
        check_dense(op, "input_norm", input_norm, (torch.float32,), weight.shape[1:], weight)


def check_packed(op: str, values: Tensor, meta: Tensor, order: int) -> None:
    check(op, "values", values, FLOATS)
    if values.dim() != 2 or values.shape[1] % 8 or not values.is_contiguous():
        got = f"{list(values.shape)}, strides {list(values.stride())}"
        refuse(op, f"values: expected contiguous [n, k/2], k divisible by 16, got {got}")
    check_order(op, order)
    shape = meta_shape_24(values.shape[0], 2 * values.shape[1], order)
    check_dense(op, "meta", meta, (torch.int16,), shape, values)


def check_order(op: str, order: int) -> None:
    if order not in META_TILES:
        refuse(op, f"expected order 0 (canonical), 80 (sm80) or 90 (sm90), got {order}")


def check_bitmap(op: str, values: Tensor, mask: Tensor, n: int, k: int) -> None:
    if n < 0 or k < 0:
        refuse(op, f"expected n, k >= 0, got {n}, {k}")
    tiles = bitmap_tiles(n, k)
    check_dense(op, "values", values, FLOATS, (*tiles, 1024))
    check_dense(op, "mask", mask, (torch.int32,), (*tiles, 64), values)


def check_surplus(
    op: str,
    rows: Tensor | None,
    columns: Tensor | None,
    entries: Tensor | None,
    n: int,
    k: int,
    like: Tensor,
) -> None:
    if rows is None or columns is None or entries is None:
        if not (rows is columns is entries):
            refuse(op, "surplus: expected rows, columns and values, or none of them")
        return
    if k > MAX_SURPLUS_COLS:
        refuse(op, f"surplus: expected k <= {MAX_SURPLUS_COLS}, got {k}")
    check_dense(op, "surplus_rows", rows, (torch.int32,), (n + 1,), like)
    check_dense(op, "surplus_columns", columns, (torch.int16,), tuple(columns.shape[:1]), like)
    check_dense(op, "surplus_values", entries, (like.dtype,), tuple(columns.shape), like)


def check_stream(op: str, values: Tensor, mask: Tensor, offsets: Tensor, k: int) -> None:
    if k < 0:
        refuse(op, f"expected k >= 0, got {k}")
    check_dense(op, "values", values, FLOATS, tuple(values.shape[:1]))
    n = mask.shape[0] if mask.dim() else 0
    check_dense(op, "mask", mask, (torch.uint8,), (n, -(-k // 8)), values)
    check_dense(op, "offsets", offsets, (torch.int64,), (n + 1,), values)


def check_input(op: str, x: Tensor, k: int, bias: Tensor | None, n: int, values: Tensor) -> None:
    check(op, "x", x, (values.dtype,), None, values)
    if x.dim() < 1 or x.shape[-1] != k:
        refuse(op, f"x: expected [..., {k}], got {list(x.shape)}")
    if bias is not None:
        check_dense(op, "bias", bias, (values.dtype,), (n,), values)


def check_frozen(op: str, *packed: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in packed):
        refuse(op, "values: packed weights have no gradient; unpack them to train, or freeze them")
