"""SparseLinear24: a packed linear whose weight is 2:4, its metadata canonical in a state_dict.

On a device (Product24) the metadata is in the order that kernels read there. Its shape tells which,
so that it is never misread, whoever put it there: accelerate, for one, places tensors without
asking a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext import ops
from wanda_ext.files import TensorHeader
from wanda_ext.packed import dispatch
from wanda_ext.packed.linear import PackedLinear

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


class SparseLinear24(Product24, PackedLinear):
    """A PackedLinear in 9/16 of the bytes of a dense 16-bit weight.

    Shapes: as of Product24. Raises ValueError where k % 16 != 0.
    """

    FORMAT = "2:4"
    TENSORS = ("weight", "meta")
    SIGN = ("meta", torch.int16, 2)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dense_class: type[nn.Module] = nn.Linear,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.dense_class = dense_class

    @classmethod
    def pack(cls, weight: Tensor) -> dict[str, Tensor]:
        if weight.shape[1] % 16:
            raise ValueError(f"its {weight.shape[1]} columns are not a multiple of 16")
        bad = torch.full((1,), -1, dtype=torch.int32, device=weight.device)
        values, meta = ops.pack_24(weight.contiguous(), bad)
        row = int(bad)
        if row >= 0:
            nonzeros = (weight[row].reshape(-1, 4) != 0).sum(dim=1)
            group = int((nonzeros > 2).nonzero()[0])
            raise ValueError(
                f"not 2:4: row {row}, columns {4 * group} to {4 * group + 3} hold "
                f"{int(nonzeros[group])} non-zeros"
            )
        return {"weight": values, "meta": meta}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Tensor:
        return ops.unpack_24(tensors["weight"], tensors["meta"])

    @classmethod
    def nbytes_of(cls, n: int, k: int, itemsize: int, **options: int) -> int:
        return n * k // 2 * itemsize + n * k // 16 * 2

    @classmethod
    def damage(cls, headers: Mapping[str, TensorHeader]) -> str:
        rows, words = headers["meta"].shape
        weight = headers.get("weight")
        if weight is not None and weight.shape == (rows, 8 * words):
            return ""
        stored = "missing" if weight is None else f"of shape {list(weight.shape)}"
        return f"weight is {stored}, its metadata of shape {[rows, words]}"

    def problem(self, tensors: Mapping[str, Tensor] | None = None) -> str:
        return self.problem_in(tensors or {"meta": self.meta_in(0)})

    @classmethod
    def problem_in(cls, tensors: Mapping[str, Tensor]) -> str:
        """Whether the two columns of each group of four ascend."""
        meta = tensors["meta"]
        nibbles = meta[..., None] >> torch.arange(0, 16, 4, device=meta.device, dtype=meta.dtype)
        bad = ((nibbles & 3) >= (nibbles >> 2 & 3)).flatten(1).any(dim=1).nonzero()
        return f"has invalid metadata in row {int(bad[0])}" if len(bad) else ""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.order:
            destination[f"{prefix}meta"] = self.meta_in(0)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.reorder_(0)
        super()._load_from_state_dict(*args, **kwargs)
        self.reorder_()
