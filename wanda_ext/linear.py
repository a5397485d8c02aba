"""SparseLinear24: a linear layer whose 2:4 weight stays packed, in one copy.

The kept values are called `weight`, so that a loader that does not know this module meets a size
mismatch instead of filling in random numbers. In a state_dict the metadata is always canonical.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wanda_ext import ops
from wanda_ext.product import Product24


class SparseLinear24(Product24):
    """A product that takes the place of an nn.Linear, a subclass of it, or a transformers Conv1D.

    9/16 of the bytes of a dense 16-bit weight. Differentiable in x and bias (for adapters); the
    packed weight has no gradient. `dense_class` is the class of the module it stands for.
    """

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
        self.dense_requires_grad = True

    @classmethod
    def shaped_like(cls, dense: nn.Module) -> SparseLinear24:
        """An empty packed module, on the meta device, for the weights of an nn.Linear or Conv1D."""
        weight = _row_major(dense)
        n, k = weight.shape
        bias = dense.bias is not None
        kind = type(dense)
        return cls(k, n, bias, device="meta", dtype=weight.dtype, dense_class=kind).train(
            dense.training
        )

    @classmethod
    def from_dense(cls, dense: nn.Module) -> SparseLinear24:
        """Packs an nn.Linear or a Conv1D; the bias is shared, the weight is a copy.

        Raises ValueError, which says why, for a weight that is not 2:4 (with its row and columns),
        whose k is not divisible by 16, that is not fp32, bf16 or fp16, or not in memory.
        """
        values, meta = pack(_row_major(dense))
        packed = cls.shaped_like(dense)
        packed.weight = nn.Parameter(values, requires_grad=False)
        packed.meta = meta
        packed.bias = dense.bias  # type: ignore[assignment]
        packed.dense_requires_grad = bool(dense.weight.requires_grad)
        packed.reorder_()
        return packed

    def to_dense(self) -> nn.Module:
        """The module of class `dense_class` again, its pruned weights exact zeros."""
        weight = self.dense_weight()
        transposed = issubclass(self.dense_class, Conv1D)
        with torch.device("meta"):  # nothing is allocated, no random number drawn
            dense: nn.Module = (
                self.dense_class(self.out_features, self.in_features)
                if transposed
                else self.dense_class(self.in_features, self.out_features, bias=False)
            )
        if transposed:
            weight = weight.T.contiguous()
        dense.weight = nn.Parameter(weight, requires_grad=self.dense_requires_grad)
        dense.bias = self.bias  # type: ignore[assignment]
        return dense.train(self.training)

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


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values [n, k/2] and canonical meta [n, k/16] of a 2:4 weight [n, k]; ValueError says why not.

    The message is a clause about the weight, for the caller to put after a module's name.
    """
    if weight.is_meta:
        raise ValueError("its weight is not in memory (meta device)")
    if weight.dtype not in ops.FLOATS:
        raise ValueError(f"its weight is {weight.dtype}, not float32, bfloat16 or float16")
    if weight.shape[1] % 16:
        raise ValueError(f"its {weight.shape[1]} columns are not a multiple of 16")
    bad = torch.full((1,), -1, dtype=torch.int32, device=weight.device)
    values, meta = ops.pack_24(weight.detach().contiguous(), bad)
    row = int(bad)
    if row >= 0:
        nonzeros = (weight[row].reshape(-1, 4) != 0).sum(dim=1)
        group = int((nonzeros > 2).nonzero()[0])
        raise ValueError(
            f"not 2:4: row {row}, columns {4 * group} to {4 * group + 3} hold "
            f"{int(nonzeros[group])} non-zeros"
        )
    return values, meta


def _row_major(dense: nn.Module) -> Tensor:
    """The weight [n, k] of an nn.Linear, or of a Conv1D, which stores its transpose."""
    if not isinstance(dense, (nn.Linear, Conv1D)):
        raise TypeError(
            f"SparseLinear24: expected an nn.Linear or a Conv1D, got {type(dense).__name__}"
        )
    weight: Tensor = dense.weight
    return weight.T if isinstance(dense, Conv1D) else weight
