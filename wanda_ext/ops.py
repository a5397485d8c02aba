"""The seven ops as typed functions: what they take is checked here, what they do is C++.

y[m, n] = x[m, k] @ W[n, k].T. Scores are S = |W| * input_norm, input_norm[k] = sqrt(sum over tokens
of x[m, k]^2) (Wanda, arXiv:2306.11695, section 3). Every op has a fake kernel, so `torch.compile`
traces it without a graph break; none synchronises with the device. Floats are float32, bfloat16 or
float16. A wrong dtype is a TypeError; a wrong shape, stride, device or option a ValueError.

`bad`, where given, is int32 [1] and receives the lowest row that the op could not treat, or -1.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from wanda_ext.register import FAKES, META_TILES, meta_shape_24

OPS = tuple(FAKES)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLS = 131072  # of prune_rows_
MAX_GROUP = 32  # of prune_nm_

_kernels = torch.ops.wanda_ext
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_DEVICES = {
    op: {"meta"}.union(d for d in ("cpu", "cuda") if _has_kernel(f"wanda_ext::{op}", d.upper()))
    for op in OPS
}


def supports(name: str, device: torch.device | str) -> bool:
    """Whether op `name` has a kernel for this type of device in this build."""
    if name not in OPS:
        _refuse("ops.supports", f"expected one of {', '.join(OPS)}, got {name!r}")
    return torch.device(device).type in _DEVICES[name]


def input_sumsq_(acc: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """acc[k] += sum over tokens of x[m, k]^2; a token whose keep is False adds nothing.

    The same bits on every device and thread count (the summation tree is in wanda_ext/ops.h). Rows
    of x may lie any one stride apart; x in another layout is copied first (`contiguous()`).

    Shapes: acc [k] float64, in place; x [..., k] float; keep [...] bool.
    """
    op = "input_sumsq_"
    _check(op, "x", x, FLOATS)
    if x.dim() < 1:
        _refuse(op, "x: expected [..., k], got a scalar")
    _check_dense(op, "acc", acc, (torch.float64,), x.shape[-1:], x)
    if keep is not None:
        _check(op, "keep", keep, (torch.bool,), x.shape[:-1], x)
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
    _check_pruned(op, weight, input_norm, bad)
    k = weight.shape[1]
    if k > MAX_COLS:
        _refuse(op, f"weight: expected k <= {MAX_COLS}, got {k}")
    if not 0 <= n_prune <= k:
        _refuse(op, f"expected 0 <= n_prune <= k = {k}, got {n_prune}")
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
    _check_pruned(op, weight, input_norm, bad)
    if not 0 < keep <= group <= MAX_GROUP:
        _refuse(op, f"expected 0 < keep <= group <= {MAX_GROUP}, got {keep}:{group}")
    if weight.shape[1] % group:
        _refuse(op, f"weight: expected k divisible by {group}, got {list(weight.shape)}")
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
    _check_weight(op, weight, bad)
    if weight.shape[1] % 16:
        _refuse(op, f"weight: expected k divisible by 16, got {list(weight.shape)}")
    values, meta = _kernels.pack_24(weight.detach(), bad)
    _count_write(bad)
    return values, meta


def unpack_24(values: Tensor, meta: Tensor, order: int = 0) -> Tensor:
    """The dense weight again: the exact inverse of `pack_24`.

    Shapes: values [n, k/2] float, meta [n, k/16] int16 (padded as `order_meta_24` says in a device
    order) -> weight [n, k].
    """
    _check_packed("unpack_24", values, meta, order)
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
        _refuse(op, f"expected n, k >= 0 and k divisible by 16, got {n}, {k}")
    for order in (src, dst):
        _check_order(op, order)
    _check_dense(op, "meta", meta, (torch.int16,), meta_shape_24(n, k, src))
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
    _check_packed(op, values, meta, order)
    n, k = values.shape[0], 2 * values.shape[1]
    _check(op, "x", x, (values.dtype,), None, values)
    if x.dim() < 1 or x.shape[-1] != k:
        _refuse(op, f"x: expected [..., {k}], got {list(x.shape)}")
    if bias is not None:
        _check_dense(op, "bias", bias, (values.dtype,), (n,), values)
    if values.requires_grad and torch.is_grad_enabled():
        _refuse(op, "values: packed weights have no gradient; unpack them to train, or freeze them")
    y: Tensor = _kernels.linear_24(x, values, meta, order, bias)
    return y


def _count_write(*tensors: Tensor | None) -> None:
    """So that autograd notices when what it saved for a backward was written since."""
    torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def _refuse(op: str, why: str) -> NoReturn:
    raise ValueError(f"wanda_ext.{op}: {why}")


def _check(
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
        _refuse(op, f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        _refuse(op, f"{name}: expected device {like.device}, as its peers, got {tensor.device}")
    if tensor.device.type not in _DEVICES[op]:
        devices = ", ".join(sorted(_DEVICES[op]))
        _refuse(op, f"{name}: this build has kernels for {devices}, got {tensor.device}")


def _check_dense(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    like: Tensor | None = None,
) -> None:
    _check(op, name, tensor, dtypes, shape, like)
    if not tensor.is_contiguous():
        _refuse(op, f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def _check_weight(op: str, weight: Tensor, bad: Tensor | None) -> None:
    _check(op, "weight", weight, FLOATS)
    if weight.dim() != 2:
        _refuse(op, f"weight: expected [n, k], got {list(weight.shape)}")
    n, k = weight.shape
    if (k > 1 and weight.stride(1) != 1) or (n > 1 and weight.stride(0) < k):
        why = f"unit column stride and separate rows, got strides {list(weight.stride())}"
        _refuse(op, f"weight: expected {why}; pass its transpose or a contiguous copy")
    if bad is not None:
        _check_dense(op, "bad", bad, (torch.int32,), (1,), weight)


def _check_pruned(op: str, weight: Tensor, input_norm: Tensor | None, bad: Tensor | None) -> None:
    _check_weight(op, weight, bad)
    if input_norm is not None:
        _check_dense(op, "input_norm", input_norm, (torch.float32,), weight.shape[1:], weight)


def _check_packed(op: str, values: Tensor, meta: Tensor, order: int) -> None:
    _check(op, "values", values, FLOATS)
    if values.dim() != 2 or values.shape[1] % 8 or not values.is_contiguous():
        got = f"{list(values.shape)}, strides {list(values.stride())}"
        _refuse(op, f"values: expected contiguous [n, k/2], k divisible by 16, got {got}")
    _check_order(op, order)
    shape = meta_shape_24(values.shape[0], 2 * values.shape[1], order)
    _check_dense(op, "meta", meta, (torch.int16,), shape, values)


def _check_order(op: str, order: int) -> None:
    if order not in META_TILES:
        _refuse(op, f"expected order 0 (canonical), 80 (sm80) or 90 (sm90), got {order}")
