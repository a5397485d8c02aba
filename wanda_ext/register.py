"""What torch must know of the ops beside their kernels: result shapes (fakes) and the gradient.

Importing `wanda_ext._C` registers schemas and kernels; importing this module, the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import wanda_ext._C  # noqa: F401

META_TILES = {0: (1, 16), 80: (32, 32), 90: (64, 128)}  # order -> rows, columns it pads to


def meta_shape_24(n: int, k: int, order: int) -> tuple[int, int]:
    """Shape of the int16 metadata of a 2:4 weight [n, k] in `order`."""
    rows, columns = META_TILES[order]
    return -(-n // rows) * rows, -(-k // columns) * columns // 16


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
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_y @ torch.ops.wanda_ext.unpack_24(values, meta, ctx.order)
    if any(ctx.needs_input_grad[4:]):  # torch leaves out a bias that was not passed
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias


FAKES: dict[str, Callable[..., Any]] = {
    "input_sumsq_": _in_place,
    "prune_rows_": _in_place,
    "prune_nm_": _in_place,
    "pack_24": _pack_24,
    "unpack_24": _unpack_24,
    "order_meta_24": _order_meta_24,
    "linear_24": _linear_24,
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"wanda_ext::{_name}", _fake)
torch.library.register_autograd(
    "wanda_ext::linear_24", _linear_24_backward, setup_context=_save_for_backward
)
