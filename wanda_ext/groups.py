"""Which packed linears read the same input, by their names, and what to put in their places."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from wanda_ext.fuse import FusedLinear24, FusedProduct
from wanda_ext.linear import SparseLinear24

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
