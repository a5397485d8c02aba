"""SparseLinear24: a packed linear whose weight is 2:4, its metadata canonical in a state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext import ops
from wanda_ext.directory import TensorHeader
from wanda_ext.packed_linear import PackedLinear
from wanda_ext.product import Product24


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

    def problem(self) -> str:
        return self.problem_in({"meta": self.meta_in(0)})

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
