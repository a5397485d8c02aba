"""What torch must know of the ops beside their kernels: result shapes (fakes) and the gradient.

Importing `wanda_ext._C` registers schemas and kernels; importing this module, the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import wanda_ext._C  # noqa: F401

BACKWARD_BYTES = 64 << 20  # of a bitmap's or a stream's weight, dense, in the backward
META_TILES = {0: (1, 16), 80: (32, 32), 90: (64, 128)}  # order -> rows, columns it pads to


def meta_shape_24(n: int, k: int, order: int) -> tuple[int, int]:
    """Shape of the int16 metadata of a 2:4 weight [n, k] in `order`."""
    rows, columns = META_TILES[order]
    return -(-n // rows) * rows, -(-k // columns) * columns // 16


def bitmap_tiles(n: int, k: int) -> tuple[int, int]:
    """Tiles of 16 rows and of 128 columns that hold a weight [n, k]."""
    return -(-n // 16), -(-k // 128)


def _in_place(*_args: Any, **_kwargs: Any) -> None:
    return None


def _pack_24(weight: Tensor, bad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    return weight.new_empty(n, k // 2), weight.new_empty(n, k // 16, dtype=torch.int16)


def _unpack_24(values: Tensor, meta: Tensor, order: int) -> Tensor:
    return values.new_empty(values.shape[0], 2 * values.shape[1])


def _order_meta_24(meta: Tensor, n: int, k: int, src: int, dst: int) -> Tensor:
    return meta.new_empty(meta_shape_24(n, k, dst))


def _linear_24(
    x: Tensor, values: Tensor, meta: Tensor, order: int, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, meta, ctx.order = inputs[:4]
    ctx.save_for_backward(values, meta)


def _linear_24_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad_y @ W, grad_bias = sum over tokens of grad_y; nothing for the packed weight."""
    values, meta = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_y @ torch.ops.wanda_ext.unpack_24(values, meta, ctx.order)
    return grad_x, None, None, None, _grad_bias(ctx, grad_y)


def _pack_bitmap(weight: Tensor, bad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tiles = bitmap_tiles(*weight.shape)
    return weight.new_empty(*tiles, 1024), weight.new_empty(*tiles, 64, dtype=torch.int32)


def _unpack_bitmap(values: Tensor, mask: Tensor, n: int, k: int, *_surplus: Any) -> Tensor:
    return values.new_empty(n, k)


def _linear_bitmap(x: Tensor, values: Tensor, mask: Tensor, n: int, *_rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _save_bitmap(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, mask, ctx.n = inputs[:4]
    ctx.k = x.shape[-1]
    ctx.save_for_backward(values, mask, *(inputs[5:] or (None, None, None)))


def _linear_bitmap_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """As of linear_24."""
    values, mask, rows, *surplus = ctx.saved_tensors

    def unpack(begin: int, end: int) -> Tensor:
        tiles = slice(begin // 16, -(-end // 16))
        part = None if rows is None else rows[begin : end + 1]
        weight: Tensor = torch.ops.wanda_ext.unpack_bitmap(
            values[tiles], mask[tiles], end - begin, ctx.k, part, *surplus
        )
        return weight

    grad_x = _grad_x(ctx, grad_y, ctx.n, ctx.k, unpack)
    return grad_x, None, None, None, _grad_bias(ctx, grad_y), None, None, None


def _grad_x(
    ctx: Any, grad_y: Tensor, n: int, k: int, unpack: Callable[[int, int], Tensor]
) -> Tensor | None:
    """grad_y @ W; unpack(begin, end) gives rows of W, at most BACKWARD_BYTES of it at a time."""
    if not ctx.needs_input_grad[0]:
        return None
    grad_x = grad_y.new_zeros(*grad_y.shape[:-1], k, dtype=torch.float32)
    tiles = max(1, BACKWARD_BYTES // max(1, 16 * k * grad_y.element_size()))
    for begin in range(0, n, 16 * tiles):
        end = min(begin + 16 * tiles, n)
        grad_x += grad_y[..., begin:end] @ unpack(begin, end)
    return grad_x.to(grad_y.dtype)


def _grad_bias(ctx: Any, grad_y: Tensor) -> Tensor | None:
    if not any(ctx.needs_input_grad[4:5]):  # torch leaves out a bias that was not passed
        return None
    return grad_y.reshape(-1, grad_y.shape[-1]).sum(0)


def _pack_stream(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    mask = weight.new_empty(n, -(-k // 8), dtype=torch.uint8)
    return weight.new_empty(count), mask, weight.new_empty(n + 1, dtype=torch.int64)


def _unpack_stream(values: Tensor, mask: Tensor, offsets: Tensor, k: int) -> Tensor:
    return values.new_empty(mask.shape[0], k)


def _linear_stream(x: Tensor, values: Tensor, mask: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def _save_stream(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.k = inputs[0].shape[-1]
    ctx.save_for_backward(*inputs[1:4])


def _linear_stream_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """As of linear_24."""
    values, mask, offsets = ctx.saved_tensors

    def unpack(begin: int, end: int) -> Tensor:
        weight: Tensor = torch.ops.wanda_ext.unpack_stream(
            values, mask[begin:end], offsets[begin : end + 1], ctx.k
        )
        return weight

    grad_x = _grad_x(ctx, grad_y, mask.shape[0], ctx.k, unpack)
    return grad_x, None, None, None, _grad_bias(ctx, grad_y)


FAKES: dict[str, Callable[..., Any]] = {
    "input_sumsq_": _in_place,
    "prune_rows_": _in_place,
    "prune_nm_": _in_place,
    "pack_24": _pack_24,
    "unpack_24": _unpack_24,
    "order_meta_24": _order_meta_24,
    "linear_24": _linear_24,
    "pack_bitmap": _pack_bitmap,
    "unpack_bitmap": _unpack_bitmap,
    "linear_bitmap": _linear_bitmap,
    "pack_stream": _pack_stream,
    "unpack_stream": _unpack_stream,
    "linear_stream": _linear_stream,
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"wanda_ext::{_name}", _fake)
torch.library.register_autograd(
    "wanda_ext::linear_24", _linear_24_backward, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "wanda_ext::linear_bitmap", _linear_bitmap_backward, setup_context=_save_bitmap
)
torch.library.register_autograd(
    "wanda_ext::linear_stream", _linear_stream_backward, setup_context=_save_stream
)
