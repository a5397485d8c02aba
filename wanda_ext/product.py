"""Product24: a packed 2:4 weight on a device, its metadata in the order that kernels read there.

The shape of the metadata tells its order, so that it is never misread, whoever put it there:
accelerate, for one, places tensors without asking a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext import dispatch, ops

PADDING_META = 0x4444  # columns 0 and 1 of every group of four: valid metadata


class Product24(nn.Module):
    """y[..., n] = x[..., k] @ W.T + bias with W[n, k] packed: all that a device needs for it.

    Shapes: weight [n, k/2] fp32, bf16 or fp16; bias [n] or None; meta int16 [n, k/16] in canonical
    order, in that of sm80 [1, rows, words], in that of sm90 [rows, 1, words], padded as
    `ops.order_meta_24` says. A new one is all zeros. Raises ValueError where k % 16 != 0.
    """

    meta: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features % 16:
            raise ValueError(f"its {in_features} columns are not a multiple of 16")
        self.in_features, self.out_features = in_features, out_features
        values = torch.zeros(out_features, in_features // 2, device=device, dtype=dtype)
        self.weight = nn.Parameter(values, requires_grad=False)
        meta = torch.full(
            (out_features, in_features // 16), PADDING_META, device=device, dtype=torch.int16
        )
        self.register_buffer("meta", meta)
        zeros = torch.zeros(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @property
    def order(self) -> int:
        """The order of `meta`: 0 (canonical), 80 or 90."""
        if self.meta.dim() == 2:
            return 0
        return 80 if self.meta.shape[0] == 1 else 90

    def forward(self, x: Tensor) -> Tensor:
        if self.order == 0 and self.meta.is_cuda:  # placed there by other means than .to()
            self.reorder_()
        return ops.linear_24(x, self.weight, self.meta.flatten(0, -2), self.order, self.bias)

    def dense_weight(self) -> Tensor:
        """The weight [n, k], unpacked."""
        return ops.unpack_24(self.weight, self.meta.flatten(0, -2), self.order)

    def meta_in(self, order: int) -> Tensor:
        """A copy of the metadata in another order as the ops take it, on the same device."""
        meta, device = self.meta.flatten(0, -2), self.meta.device
        if not ops.supports("order_meta_24", device):
            meta = meta.cpu()  # a build without the device's kernels can move models too
        meta = ops.order_meta_24(meta, self.out_features, self.in_features, self.order, order)
        return meta.to(device)

    def reorder_(self, order: int | None = None) -> Product24:
        """Moves the metadata into `order`; by default into the one its device reads."""
        if order is None:
            order = preferred_order(self.meta.device)
            dispatch.use(self.meta.device)
        if order != self.order:
            meta = self.meta_in(order)
            self.meta = {0: meta, 80: meta[None], 90: meta[:, None]}[order]
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, order={self.order}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Product24:
        meta = self.meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.meta.dtype != torch.int16:  # nn.Module.type() casts everything; these are bits
            self.meta = meta.to(self.meta.device)
        return self.reorder_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.reorder_()  # an unpickler may map devices


def preferred_order(device: torch.device) -> int:
    """The metadata order that the kernels of a device read: 90, 80, or 0 (canonical)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return dispatch.order_of(10 * major + minor)
