"""Linears that read the same input, merged: one product of them all instead of one each.

Every member stays where the model calls it. The first one that is called with an x has the whole
product computed; the others take their columns of it. What they return are views, rows of all
members' n apart: attention splits the last axis into heads and an MLP multiplies element by
element, which both work on views, while a copy would read and write the whole result once more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.packed.linear_24 import Product24, SparseLinear24


class FusedProduct(Product24):
    """The product of all members, a child of each. It has no tensors in a state_dict: they have."""

    def __init__(self, members: Mapping[str, SparseLinear24]) -> None:
        linears = list(members.values())
        first, sizes = linears[0], [linear.out_features for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        super().__init__(first.in_features, sum(sizes), bool(biases), device="meta")
        self.names = [name.rpartition(".")[2] for name in members]
        self.ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.weight = nn.Parameter(
            torch.cat([linear.weight for linear in linears]), requires_grad=False
        )
        self.meta = torch.cat([linear.meta_in(0) for linear in linears])
        if biases:
            bias = torch.cat([bias.detach() for bias in biases])
            self.bias = nn.Parameter(bias, requires_grad=biases[0].requires_grad)
        self._held: _Held | None = None
        self.reorder_()

    def rows(self, index: int) -> slice:
        """Where a member's rows lie."""
        return slice(self.ends[index - 1] if index else 0, self.ends[index])

    def columns(self, index: int, x: Tensor) -> Tensor:
        """A member's columns of the product with x; nothing is held after the last member's.

        All members must be called on one CUDA stream. x must not change in place between their
        calls, which is noticed, but not under torch.compile.
        """
        held = self._held
        if held is None or index not in held.waiting or not held.is_of(x):
            held = self._held = _Held(x, self(x), list(range(len(self.names))))
        held.waiting.remove(index)
        if not held.waiting:
            self._held = None
        return held.y[..., self.rows(index)]

    def put(self, index: int, linear: SparseLinear24) -> None:
        """Overwrites a member's rows."""
        rows, meta = self.rows(index), self.meta_in(0)
        meta[rows] = linear.meta_in(0)
        with torch.no_grad():
            self.weight[rows] = linear.weight
            if self.bias is not None and linear.bias is not None:
                self.bias[rows] = linear.bias
        self.meta = meta
        self.reorder_()

    def extra_repr(self) -> str:
        return f"{' + '.join(self.names)}, {super().extra_repr()}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def _save_to_state_dict(self, *_args: Any, **_kwargs: Any) -> None: ...

    def _load_from_state_dict(self, *_args: Any, **_kwargs: Any) -> None: ...


class FusedLinear24(SparseLinear24):
    """A linear that a FusedProduct computes; weight, meta and bias are rows of the product's."""

    def __init__(self, product: FusedProduct, index: int, linear: SparseLinear24) -> None:
        nn.Module.__init__(self)  # it has no tensors of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dense_class = linear.dense_class
        self.dense_requires_grad = linear.dense_requires_grad
        self.product, self.index = product, index
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.product.weight[self.product.rows(self.index)]

    @property
    def meta(self) -> Tensor:  # type: ignore[override]
        """In canonical order, a copy."""
        return self.product.meta_in(0)[self.product.rows(self.index)]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self.product.bias
        return None if bias is None else bias[self.product.rows(self.index)]

    def forward(self, x: Tensor) -> Tensor:
        return self.product.columns(self.index, x)

    def reorder_(self, order: int | None = None) -> FusedLinear24:
        self.product.reorder_(order)
        return self

    def alone(self) -> SparseLinear24:
        """A linear with a copy of the rows, as it was before it was merged."""
        k, n, shared = self.in_features, self.out_features, self.product.bias
        plain = SparseLinear24(k, n, False, device="meta", dense_class=self.dense_class)
        plain.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        plain.meta = self.meta.clone()
        if shared is not None and self.bias is not None:
            bias = self.bias.detach().clone()
            plain.bias = nn.Parameter(bias, requires_grad=shared.requires_grad)
        plain.dense_requires_grad = self.dense_requires_grad
        plain.reorder_()
        return plain.train(self.training)

    def to_dense(self) -> nn.Module:
        return self.alone().to_dense()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLinear24:
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        tensors = {"weight": self.weight, "bias": self.bias, "meta": self.meta}
        for name, tensor in tensors.items():
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        alone = self.alone()  # checks shapes and missing keys as it would have
        alone._load_from_state_dict(*args, **kwargs)
        self.product.put(self.index, alone)


class _Held:
    """A product of x, and the members that have not taken their columns of it yet."""

    def __init__(self, x: Tensor, y: Tensor, waiting: list[int]) -> None:
        self.x, self.y, self.waiting, self.state = x, y, waiting, _state(x)

    def is_of(self, x: Tensor) -> bool:
        return self.x is x and self.state == _state(x)


def _state(x: Tensor) -> tuple[bool, int]:
    """What makes another product of the same tensor: gradients asked for or not, a change of it."""
    counted = not torch.compiler.is_compiling() and not x.is_inference()
    return torch.is_grad_enabled(), x._version if counted else 0


# --- Which linears those are ----------------------------------------------------------------------


GROUPS = (  # siblings that read one input
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_TWO_INPUTS = re.compile("cross|encoder_?attn|encdec", re.IGNORECASE)  # q reads another than k, v


def find_groups(model: nn.Module) -> list[dict[str, SparseLinear24]]:
    """Packed linears that can be merged, by name in the model, in the order of their rows.

    Members are siblings named as in GROUPS, all packed, of one k, dtype and device, all with a bias
    or none, in memory and without hooks. Cross-attention, told by its name, reads two inputs.
    """
    found = []
    for path, parent in model.named_modules():
        for group in () if _TWO_INPUTS.search(path) else GROUPS:
            children = {name: getattr(parent, name, None) for name in group}
            members = {
                f"{path}.{name}" if path else name: child
                for name, child in children.items()
                if type(child) is SparseLinear24
            }
            kinds = {_kind(linear) for linear in members.values()}
            if len(members) == len(group) and len(kinds) == 1 and None not in kinds:
                found.append(members)
    return found


def merged(members: Mapping[str, SparseLinear24]) -> dict[str, FusedLinear24]:
    """What to put in the members' places, by name; one copy of the weights serves them all."""
    product = FusedProduct(members)
    return {
        name: FusedLinear24(product, index, linear)
        for index, (name, linear) in enumerate(members.items())
    }


def _kind(linear: SparseLinear24) -> tuple[Any, ...] | None:
    """What must be the same for all members; None: it cannot be one."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    if hooked or linear.weight.is_meta:
        return None
    bias = None if linear.bias is None else linear.bias.requires_grad
    return linear.in_features, linear.weight.dtype, linear.weight.device, bias
