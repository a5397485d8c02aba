"""PackedLinear: a linear layer whose pruned weight stays packed, in one copy, in some format.

The kept values are called `weight`, in a shape that no dense weight has, so that a loader that does
not know this package meets a size mismatch instead of filling in random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from wanda_ext import ops
from wanda_ext.files import TensorHeader

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedLinear(nn.Module):
    """Takes the place of an nn.Linear, a subclass of it, or a transformers Conv1D.

    y[..., n] = x[..., k] @ W.T + bias; differentiable in x and bias (for adapters), the packed
    weight has no gradient. `dense_class` is the class of the module it stands for. A format is a
    subclass, and a row of formats.py; its tensors have the same names in module and file.
    """

    FORMAT: ClassVar[str]
    TENSORS: ClassVar[tuple[str, ...]]  # "weight" first; those of no use to a weight are absent
    PARAMETERS: ClassVar[tuple[str, ...]] = ("weight",)  # those of them that count as such
    SIGN: ClassVar[tuple[str, torch.dtype, int]]  # the tensor that tells it: name, dtype, dims

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    dense_class: type[nn.Module] = nn.Linear
    dense_requires_grad = True

    @classmethod
    def pack(cls, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight [n, k]; ValueError says why it does not fit, in a clause."""
        raise NotImplementedError

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight [n, k] of what `pack` gave; the exact inverse."""
        raise NotImplementedError

    @classmethod
    def options(cls, tensors: Mapping[str, TensorHeader | Tensor]) -> dict[str, int]:
        """What shapes an empty module for these tensors, beside n, k and dtype; for config.json."""
        return {}

    @classmethod
    def nbytes_of(cls, n: int, k: int, itemsize: int, **options: int) -> int:
        """The bytes of a weight [n, k] in a file, as `options` says; the bias not counted."""
        raise NotImplementedError

    @classmethod
    def damage(cls, headers: Mapping[str, TensorHeader]) -> str:
        """Why stored tensors cannot be one linear, in a clause; "" where they can."""
        raise NotImplementedError

    @classmethod
    def problem_in(cls, tensors: Mapping[str, Tensor]) -> str:
        """What is wrong with what a file holds, in a clause; "" where it is a weight."""
        raise NotImplementedError

    @classmethod
    def shaped_like(cls, dense: nn.Module, **options: int) -> Self:
        """An empty packed module, on the meta device, for the weights of an nn.Linear or Conv1D."""
        weight = row_major(dense)
        n, k = weight.shape
        return cls(
            k,
            n,
            dense.bias is not None,
            device="meta",
            dtype=weight.dtype,
            dense_class=type(dense),
            **options,
        ).train(dense.training)

    @classmethod
    def from_dense(cls, dense: nn.Module) -> Self:
        """Packs an nn.Linear or a Conv1D; the bias is shared, the weight is a copy.

        Raises ValueError, which says why, for a weight that does not fit, that is not fp32, bf16 or
        fp16, or not in memory.
        """
        weight = row_major(dense)
        check_in_memory(weight)
        return cls.holding(dense, cls.pack(weight.detach()))

    @classmethod
    def holding(cls, dense: nn.Module, tensors: Mapping[str, Tensor]) -> Self:
        """In the place of `dense`, with what `pack` has made of its weight."""
        packed = cls.shaped_like(dense, **cls.options(tensors))
        for name, tensor in tensors.items():
            is_parameter = name in packed._parameters
            value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            setattr(packed, name, value)
        packed.bias = dense.bias  # type: ignore[assignment]
        packed.dense_requires_grad = bool(dense.weight.requires_grad)
        packed.reorder_()
        return packed

    def tensors(self) -> dict[str, Tensor]:
        """What is packed, by name, without the bias."""
        tensors = {name: getattr(self, name, None) for name in self.TENSORS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def dense_weight(self) -> Tensor:
        """The weight [n, k], unpacked."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The module of class `dense_class` again, its pruned weights exact zeros."""
        weight = self.dense_weight()
        transposed = is_conv1d(self.dense_class)
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

    def reorder_(self, order: int | None = None) -> nn.Module:
        """Brings what is packed into an order, by default that of its device, if it has several."""
        return self

    def problem(self, tensors: Mapping[str, Tensor] | None = None) -> str:
        """What is wrong with what is packed here, in a clause; "" where it is a weight.

        tensors: what to look at instead of its own, as a file has it: where that is offloaded.
        """
        raise NotImplementedError


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether a class is transformers' Conv1D, or one of its own; told by name, without it here."""
    names = {(base.__module__, base.__name__) for base in kind.__mro__}
    return ("transformers.pytorch_utils", "Conv1D") in names


def computes_weight(module: nn.Module) -> bool:
    """Whether `weight` is no parameter of its own, but made anew for every call: by a
    parametrization (weight_norm, spectral_norm), or by torch.nn.utils.prune."""
    return "weight" not in module._parameters


def row_major(dense: nn.Module) -> Tensor:
    """The weight [n, k] of an nn.Linear, or of a Conv1D, which stores its transpose."""
    transposed = is_conv1d(type(dense))
    if not transposed and not isinstance(dense, nn.Linear):
        raise TypeError(f"expected an nn.Linear or a Conv1D, got {type(dense).__name__}")
    weight: Tensor = dense.weight  # type: ignore[assignment]
    return weight.T if transposed else weight


def check_in_memory(weight: Tensor) -> None:
    """Raises ValueError, in a clause, for a weight that no format can take."""
    if weight.is_meta:
        raise ValueError("its weight is not in memory (meta device)")
    if weight.dtype not in ops.FLOATS:
        raise ValueError(f"its weight is {weight.dtype}, not float32, bfloat16 or float16")
