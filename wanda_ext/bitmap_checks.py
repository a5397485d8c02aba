"""What may be wrong with a stored bitmap, in clauses: first by its headers, then by its bits.

The kernels read nothing outside of what they are given, whatever it holds; but only a bitmap
without a problem means the same weight to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wanda_ext import ops
from wanda_ext.directory import TensorHeader
from wanda_ext.register import bitmap_tiles

RECORD, ROOM = 32, 16  # columns, and the non-zeros of them that fit
SURPLUS = ("surplus_rows", "surplus_columns", "surplus_values")
FLOATS = ("F32", "BF16", "F16")


def headers_problem(headers: Mapping[str, TensorHeader]) -> str:
    """Shapes and dtypes that cannot be one bitmap's; "" where they can. There is a mask."""
    mask = headers["mask"].shape
    tiles = mask[:2]
    floats = headers["weight"].dtype if "weight" in headers else ""
    if floats not in FLOATS:
        return f"weight is {floats or 'missing'}; expected {' or '.join(FLOATS)}"
    expected = {
        "weight": (floats, (*tiles, 1024)),
        "mask": ("I32", (*tiles, 64)),
        "shape": ("I64", (2,)),
    }
    found = [headers[name] for name in SURPLUS if name in headers]
    if found:
        count = found[-1].shape[:1]
        rows = found[0].shape[:1]
        n = rows[0] - 1 if rows else -1
        rows = (n + 1,) if n >= 0 and -(-n // 16) == tiles[0] else (16 * tiles[0] + 1,)
        kinds = ("I32", rows), ("I16", count), (floats, count)
        expected |= dict(zip(SURPLUS, kinds, strict=True))
    for name, (dtype, shape) in expected.items():
        header = headers.get(name)
        if header is None or header.shape != shape:
            what = "missing" if header is None else f"of shape {list(header.shape)}"
            return f"{name} is {what}, its mask of shape {list(mask)}"
        if header.dtype != dtype:
            return f"{name} is {header.dtype}; expected {dtype}"
    return ""


def tensors_problem(tensors: Mapping[str, Tensor]) -> str:
    """Bits that mean no weight [n, k], or several; "" where they mean one."""
    (n, k), mask = tensors["shape"].tolist(), tensors["mask"]
    if min(n, k) < 0 or bitmap_tiles(n, k) != tuple(mask.shape[:2]):
        return f"tells of a weight of shape {[n, k]}, its mask of shape {list(mask.shape)}"
    if invalid := masks_problem(mask):
        return invalid
    if _padding_is_used(tensors["weight"], mask, n, k):
        return f"has weights outside of its shape {[n, k]}"
    lists = [tensors[name] for name in SURPLUS if name in tensors]
    return _surplus_problem(mask, n, k, *lists) if lists else ""


def masks_problem(mask: Tensor) -> str:
    """Masks [n16, k128, 64] that keep other than 16 columns, for which ops.h promises nothing."""
    rows = (_count_bits(mask) != ROOM).flatten(1).any(dim=1).nonzero()
    if not len(rows):
        return ""
    row = 16 * int(rows[0])
    return f"has invalid masks in rows {row} to {row + 15}"


def _count_bits(words: Tensor) -> Tensor:
    """Of int32."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


def _padding_is_used(values: Tensor, mask: Tensor, n: int, k: int) -> bool:
    """Whether the rows and columns that pad the last tiles hold anything but zeros."""
    rows, columns = 16 * mask.shape[0], 128 * mask.shape[1]
    used = False
    if n < rows:
        last = ops.unpack_bitmap(values[-1:], mask[-1:], 16, columns)
        used |= bool((last[n % 16 :] != 0).any())
    if k < columns:
        last = ops.unpack_bitmap(values[:, -1:].contiguous(), mask[:, -1:].contiguous(), rows, 128)
        used |= bool((last[:, k % 128 :] != 0).any())
    return used


def _surplus_problem(
    mask: Tensor, n: int, k: int, offsets: Tensor, columns: Tensor, values: Tensor
) -> str:
    counts, column = offsets.diff(), columns.long() & 0xFFFF
    ends = [int(offsets[0]), int(offsets[-1])] if len(offsets) == n + 1 else []
    if ends != [0, len(values)] or bool((counts < 0).any()) or bool((column >= k).any()):
        return "has a surplus that points outside of the weight"
    row = torch.arange(n, device=mask.device).repeat_interleave(counts.long())
    if bool(((row << 16) + column).diff().le(0).any()):
        return "has a surplus whose columns do not ascend in each row"
    lane = row % 8 * 4 + column % 128 // RECORD  # bitmap.h: bitmap_mask_index
    word = mask[row // 16, column // 128, lane * 2 + row % 16 // 8]
    if bool((word >> (column % RECORD) & 1).any()):
        return "has a surplus at columns that its masks keep"
    return ""
