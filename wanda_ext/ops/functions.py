"""The ops as typed functions: what they take is checked here, what they do is C++.

y[m, n] = x[m, k] @ W[n, k].T. Scores are S = |W| * input_norm, input_norm[k] = sqrt(sum over tokens
of x[m, k]^2) (Wanda, arXiv:2306.11695, section 3). Every op has a fake kernel, so `torch.compile`
traces it without a graph break; none synchronises with the device. Floats are float32, bfloat16 or
float16. A wrong dtype is a TypeError; a wrong shape, stride, device or option a ValueError.

`bad`, where given, is int32 [1] and receives the lowest row that the op could not treat, or -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wanda_ext.ops.checks import (
    DEVICES,
    FLOATS,
    check,
    check_bitmap,
    check_dense,
    check_frozen,
    check_input,
    check_order,
    check_packed,
    check_pruned,
    check_stream,
    check_surplus,
    check_weight,
    refuse,
)
from wanda_ext.ops.register import FAKES, meta_shape_24

__all__ = ["FLOATS", "MAX_COLS", "MAX_GROUP", "OPS", "supports", *FAKES]
OPS = tuple(FAKES)
MAX_COLS = 131072  # of prune_rows_
MAX_GROUP = 32  # of prune_nm_

_kernels = torch.ops.wanda_ext


def supports(name: str, device: torch.device | str) -> bool:
    """Whether op `name` has a kernel for this type of device in this build."""
    if name not in OPS:
        refuse("ops.supports", f"expected one of {', '.join(OPS)}, got {name!r}")
    return torch.device(device).type in DEVICES[name]


def input_sumsq_(acc: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """acc[k] += sum over tokens of x[m, k]^2; a token whose keep is False adds nothing.

    The same bits on every device and thread count (the summation tree is in wanda_ext/ops.h). Rows
    of x may lie any one stride apart; x in another layout is copied first (`contiguous()`).

    Shapes: acc [k] float64, in place; x [..., k] float; keep [...] bool.
    """
    op = "input_sumsq_"
    check(op, "x", x, FLOATS)
    if x.dim() < 1:
        refuse(op, "x: expected [..., k], got a scalar")
    check_dense(op, "acc", acc, (torch.float64,), x.shape[-1:], x)
    if keep is not None:
        check(op, "keep", keep, (torch.bool,), x.shape[:-1], x)
    _kernels.input_sumsq_(acc, x.detach(), keep)
    _count_write(acc)


def prune_rows_(
    weight: Tensor, input_norm: Tensor | None, n_prune: int, bad: Tensor | None = None
) -> None:
    """Zero the n_prune lowest |W| * input_norm of each row; without input_norm, the lowest |W|.

    Scores compare in fp32; of equal scores the lower column is pruned first; a kept -0.0 becomes
    +0.0. A row with a NaN or infinite score is left unchanged and reported in `bad`.

    Shapes: weight [n, k] float, in place, unit column stride; input_norm [k] float32; bad [1].
    """
    op = "prune_rows_"
    check_pruned(op, weight, input_norm, bad)
    k = weight.shape[1]
    if k > MAX_COLS:
        refuse(op, f"weight: expected k <= {MAX_COLS}, got {k}")
    if not 0 <= n_prune <= k:
        refuse(op, f"expected 0 <= n_prune <= k = {k}, got {n_prune}")
    _kernels.prune_rows_(weight.detach(), input_norm, n_prune, bad)
    _count_write(weight, bad)


def prune_nm_(
    weight: Tensor, input_norm: Tensor | None, keep: int, group: int, bad: Tensor | None = None
) -> None:
    """Keep the `keep` highest |W| * input_norm of each `group` consecutive columns of a row.

    The others become zero. Ties, -0.0 and bad rows as in `prune_rows_`.

    Shapes: weight [n, k] float, in place, unit column stride, k divisible by group; input_norm [k]
    float32; bad [1].
    """
    op = "prune_nm_"
    check_pruned(op, weight, input_norm, bad)
    if not 0 < keep <= group <= MAX_GROUP:
        refuse(op, f"expected 0 < keep <= group <= {MAX_GROUP}, got {keep}:{group}")
    if weight.shape[1] % group:
        refuse(op, f"weight: expected k divisible by {group}, got {list(weight.shape)}")
    _kernels.prune_nm_(weight.detach(), input_norm, keep, group, bad)
    _count_write(weight, bad)


def pack_24(weight: Tensor, bad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A 2:4 weight as its kept values and, per 16 columns, one 16-bit word of their positions.

    A group with fewer than two non-zeros is filled up with its highest zero columns. A row in which
    a group has more than two is packed as zeros and reported in `bad`. Zeros are stored as +0.0.

    Shapes: weight [n, k] float, unit column stride, k divisible by 16 -> values [n, k/2], meta
    [n, k/16] int16 in canonical order; bad [1].
    """
    op = "pack_24"
    check_weight(op, weight, bad)
    if weight.shape[1] % 16:
        refuse(op, f"weight: expected k divisible by 16, got {list(weight.shape)}")
    values, meta = _kernels.pack_24(weight.detach(), bad)
    _count_write(bad)
    return values, meta


def unpack_24(values: Tensor, meta: Tensor, order: int = 0) -> Tensor:
    """The dense weight again: the exact inverse of `pack_24`.

    Shapes: values [n, k/2] float, meta [n, k/16] int16 (padded as `order_meta_24` says in a device
    order) -> weight [n, k].
    """
    check_packed("unpack_24", values, meta, order)
    weight: Tensor = _kernels.unpack_24(values.detach(), meta, order)
    return weight


def order_meta_24(meta: Tensor, n: int, k: int, src: int, dst: int) -> Tensor:
    """Move the metadata of an [n, k] weight from order src to order dst.

    0 is canonical (row-major, the only order on disk), 80 what sm80 kernels read, 90 what sm90
    kernels read. 80 pads n and k to 32, 90 pads n to 64 and k to 128; 0 strips the padding.

    Shapes: meta [padded n, padded k/16] int16 of src -> the same of dst.
    """
    op = "order_meta_24"
    if n < 0 or k < 0 or k % 16:
        refuse(op, f"expected n, k >= 0 and k divisible by 16, got {n}, {k}")
    for order in (src, dst):
        check_order(op, order)
    check_dense(op, "meta", meta, (torch.int16,), meta_shape_24(n, k, src))
    moved: Tensor = _kernels.order_meta_24(meta, n, k, src, dst)
    return moved


def linear_24(
    x: Tensor, values: Tensor, meta: Tensor, order: int = 0, bias: Tensor | None = None
) -> Tensor:
    """y = x @ W.T (+ bias) with W packed as by `pack_24`; fp32 accumulation, y of the dtype of x.

    Differentiable in x and bias (for adapters), not in the packed weight. Rows of x as in
    `input_sumsq_`.

    Shapes: x [..., k], values [n, k/2], bias [n], all of one float dtype; meta [n, k/16] int16
    (padded in a device order) -> y [..., n].
    """
    op = "linear_24"
    check_packed(op, values, meta, order)
    n, k = values.shape[0], 2 * values.shape[1]
    check_input(op, x, k, bias, n, values)
    check_frozen(op, values)
    y: Tensor = _kernels.linear_24(x, values, meta, order, bias)
    return y


def pack_bitmap(weight: Tensor, bad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A weight with at most 16 non-zeros in every 32 columns as 16 values and a 32-bit mask each.

    These 32 are a record. 16:32 fits, and so do 8:16, 4:8 and 2:4; bitmap.h in csrc/include has the
    order. Records with fewer non-zeros are filled up with their highest zero columns. Of more, the
    16 lowest columns are kept, and `bad` names the row. Zeros are stored as +0.0.

    Shapes: weight [n, k] float, unit column stride, any n and k -> values [n/16, k/128, 1024], mask
    [n/16, k/128, 64] int32, both rounded up; bad [1].
    """
    op = "pack_bitmap"
    check_weight(op, weight, bad)
    values, mask = _kernels.pack_bitmap(weight.detach(), bad)
    _count_write(bad)
    return values, mask


def unpack_bitmap(
    values: Tensor,
    mask: Tensor,
    n: int,
    k: int,
    surplus_rows: Tensor | None = None,
    surplus_columns: Tensor | None = None,
    surplus_values: Tensor | None = None,
) -> Tensor:
    """The dense weight again: the exact inverse of `pack_bitmap`, the surplus written into it.

    The surplus is the CSR list, sorted by row, then column, of the non-zeros that records have no
    room for; with one, k <= 65536. The bits of surplus_columns are unsigned: 40000 is -25536. For
    rows [16 i, 16 j) pass values[i:j], mask[i:j] and surplus_rows[16 i : 16 j + 1].

    Shapes: values, mask as of `pack_bitmap`; surplus_rows [n + 1] int32 (offsets), surplus_columns
    [s] int16, surplus_values [s] -> weight [n, k].
    """
    op = "unpack_bitmap"
    check_bitmap(op, values, mask, n, k)
    surplus = surplus_rows, surplus_columns, surplus_values
    check_surplus(op, *surplus, n, k, values)
    weight: Tensor = _kernels.unpack_bitmap(values.detach(), mask, n, k, *surplus)
    return weight


def linear_bitmap(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    n: int,
    bias: Tensor | None = None,
    surplus_rows: Tensor | None = None,
    surplus_columns: Tensor | None = None,
    surplus_values: Tensor | None = None,
) -> Tensor:
    """y = x @ W.T (+ bias) with W [n, k] packed as by `pack_bitmap`, and its surplus.

    fp32 accumulation, y of the dtype of x. Differentiable in x and bias as `linear_24`.

    Shapes: x [..., k], values, mask and surplus as of `unpack_bitmap`, bias [n] -> y [..., n].
    """
    op = "linear_bitmap"
    check(op, "x", x, FLOATS)
    if x.dim() < 1:
        refuse(op, "x: expected [..., k], got a scalar")
    check_bitmap(op, values, mask, n, x.shape[-1])
    check_input(op, x, x.shape[-1], bias, n, values)
    surplus = surplus_rows, surplus_columns, surplus_values
    check_surplus(op, *surplus, n, x.shape[-1], values)
    check_frozen(op, values, surplus_values)
    y: Tensor = _kernels.linear_bitmap(x, values, mask, n, bias, *surplus)
    return y


def pack_stream(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Any weight as the non-zeros of its rows, a bit for each column, and where each row starts.

    Columns ascend; column c is bit c % 8 of byte c // 8 of its row. -0.0 is a zero. The layout that
    compressed-tensors published as sparse-bitmask. count is that of the non-zeros,
    `int(torch.count_nonzero(weight))`; RuntimeError where it is not.

    Shapes: weight [n, k] float, unit column stride, any n and k -> values [count], mask [n, k/8]
    uint8, rounded up, offsets [n + 1] int64.
    """
    op = "pack_stream"
    check_weight(op, weight, None)
    if not 0 <= count <= weight.numel():
        refuse(op, f"expected 0 <= count <= {weight.numel()}, got {count}")
    values, mask, offsets = _kernels.pack_stream(weight.detach(), count)
    return values, mask, offsets


def unpack_stream(values: Tensor, mask: Tensor, offsets: Tensor, k: int) -> Tensor:
    """The dense weight again: the exact inverse of `pack_stream`.

    For rows [i, j) pass mask[i:j] and offsets[i : j + 1].

    Shapes: values [count] float, mask [n, k/8] uint8, rounded up, offsets [n + 1] int64 -> weight
    [n, k].
    """
    op = "unpack_stream"
    check_stream(op, values, mask, offsets, k)
    weight: Tensor = _kernels.unpack_stream(values.detach(), mask, offsets, k)
    return weight


def linear_stream(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x @ W.T (+ bias) with W [n, k] packed as by `pack_stream`.

    fp32 accumulation, y of the dtype of x. Differentiable in x and bias as `linear_24`.

    Shapes: x [..., k], values, mask and offsets as of `unpack_stream`, bias [n] -> y [..., n].
    """
    op = "linear_stream"
    check(op, "x", x, FLOATS)
    if x.dim() < 1:
        refuse(op, "x: expected [..., k], got a scalar")
    check_stream(op, values, mask, offsets, x.shape[-1])
    check_input(op, x, x.shape[-1], bias, mask.shape[0], values)
    check_frozen(op, values)
    y: Tensor = _kernels.linear_stream(x, values, mask, offsets, bias)
    return y


def _count_write(*tensors: Tensor | None) -> None:
    """So that autograd notices when what it saved for a backward was written since."""
    torch.autograd.graph.increment_version([t for t in tensors if t is not None])
