"""Fused experts: mixture-of-experts layers that keep the linears of all experts in 3-D weights.

They are recognised by what they hold, not by class: a 3-D `down_proj` beside a 3-D `gate_up_proj`
or `up_proj`, and an activation. Each expert's slice is pruned like a linear of its own, named
`...experts.<e>.gate_up_proj`, on the norms of the tokens that were routed to it. Output rows are
independent, so a gate and an up projection that share a weight (behind each other, or interleaved)
need no splitting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

DOWN = "down_proj"
UPS = ("gate_up_proj", "up_proj")
FEW_TOKENS = 32  # with fewer, norms are off by over 1 / sqrt(2 * 32) = 12% (of normal inputs)


@dataclass(frozen=True, eq=False)
class ExpertSlice:
    """One expert's part of a 3-D weight: [n, k], or [k, n] where they are stored transposed."""

    owner: nn.Module
    parameter: str  # its name in the owner
    index: int
    transposed: bool

    @property
    def weight(self) -> Tensor:
        weight: Tensor = getattr(self.owner, self.parameter)
        return weight.detach()[self.index]


@dataclass(frozen=True)
class Layout:
    """How an experts module stores its weights: [experts, n, k], or transposed."""

    up: str  # UPS: what reads the tokens; `down_proj` reads what becomes of it
    experts: int
    transposed: bool
    gated: bool


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of fused experts; None: the module is something else."""
    own = module._parameters
    up = next((name for name in UPS if own.get(name) is not None), None)
    first, last = own.get(up or ""), own.get(DOWN)
    if up is None or first is None or last is None or first.dim() != 3 or last.dim() != 3:
        return None
    if not (hasattr(module, "_apply_gate") or hasattr(module, "act_fn")):
        return None
    gated = bool(getattr(module, "has_gate", up == UPS[0]))
    rows, columns = first.shape[1:]
    inner = last.shape[1:]
    fitting = {  # transposed -> whether the two weights fit each other then
        False: columns == inner[0] and rows == inner[1] * (1 + gated),
        True: rows == inner[1] and columns == inner[0] * (1 + gated),
    }
    transposed = getattr(module, "is_transposed", not fitting[False])
    if first.shape[0] < last.shape[0] or not fitting[transposed]:
        return None
    return Layout(up, last.shape[0], transposed, gated)  # the first may have slices to spare


def expert_slices(root: nn.Module) -> dict[str, ExpertSlice]:
    """The linears of all fused experts inside a module, by relative name, in running order."""
    slices = {}
    for path, module in root.named_modules():
        layout = layout_of(module)
        if layout is not None:
            for index in range(layout.experts):
                for name in (layout.up, DOWN):
                    full = f"{path}.{index}.{name}" if path else f"{index}.{name}"
                    slices[full] = ExpertSlice(module, name, index, layout.transposed)
    return slices


def tokens_read(module: nn.Module, args: tuple[Any, ...]) -> int:
    """How many tokens a call module(*args) of fused experts is about (see `reads`)."""
    layout = layout_of(module)
    rows: int = args[0].numel() // args[0].shape[-1]
    return rows if len(args) > 1 or layout is None else rows // layout.experts


def reads(
    module: nn.Module, args: tuple[Any, ...], keep: Tensor | None
) -> Iterator[tuple[int, str, Tensor]]:
    """What enters each expert's linears in a call module(*args): (expert, weight's name, rows).

    args: hidden states [tokens, k] and the experts [tokens, top_k] they go to; or hidden states
    [experts * tokens, k] alone, a part for each expert, zero where a token does not go to it. keep
    [tokens]: tokens to look at. The first product is computed here; the module's own is not used.
    """
    layout = layout_of(module)
    assert layout is not None
    for index, rows in _routed(args, layout.experts, keep):
        if len(rows):
            yield index, layout.up, rows
            yield index, DOWN, _inner(module, layout, index, rows)


def _routed(
    args: tuple[Any, ...], experts: int, keep: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Each expert's rows of the hidden states, in the order of the tokens."""
    hidden = args[0].reshape(-1, args[0].shape[-1])
    if len(args) == 1:
        for index, part in enumerate(hidden.view(experts, -1, hidden.shape[1])):
            there = part.any(dim=1)
            yield index, part[there if keep is None else there & keep.to(part.device)]
        return
    routes = args[1].reshape(len(hidden), -1)
    if keep is not None:
        kept = keep.to(hidden.device)
        hidden, routes = hidden[kept], routes[kept]
    order = routes.flatten().argsort(stable=True)
    ends = torch.bincount(routes.flatten(), minlength=experts).cumsum(0).tolist()
    for index, (start, end) in enumerate(zip([0, *ends], ends[:experts], strict=False)):
        yield index, hidden[order[start:end] // routes.shape[1]]


def _inner(module: nn.Module, layout: Layout, index: int, rows: Tensor) -> Tensor:
    """What the down projection reads where the up projection reads `rows`."""
    holder: Any = module  # of names that only experts have
    weight = ExpertSlice(module, layout.up, index, layout.transposed).weight
    out = F.linear(rows.to(weight.dtype), weight.t() if layout.transposed else weight)
    bias = getattr(module, f"{layout.up}_bias", None)
    if bias is not None:
        out = out + bias[index]
    inner: Tensor
    if not layout.gated:
        inner = holder.act_fn(out)
    elif hasattr(module, "_apply_gate"):
        inner = holder._apply_gate(out)
    else:
        gate, up = out.chunk(2, dim=-1)
        inner = holder.act_fn(gate) * up
    return inner
