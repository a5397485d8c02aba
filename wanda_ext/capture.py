"""One pass over a model with every block bypassed: what enters its blocks, at hardly any cost.

Each block's own arguments (masks, rotary tables, ...) are kept, because they differ between the
blocks of many models. With them the blocks can run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.blocks import Block, linears_of
from wanda_ext.calibration import Batch

PROBE_TOKENS = 8
POOL = 8  # how many kept tensors of one shape a new one is compared with


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass that has shown what was wanted."""


@dataclass
class Call:
    """What a block was called with, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def probe(model: nn.Module, block: nn.Module, ids: Tensor) -> tuple[bool, list[str]]:
    """Whether blocks return tuples, and the order in which the first one runs its linears.

    Runs the model's first block, `block`, on a few tokens.
    """
    returned: list[Any] = []
    order: list[str] = []

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        returned.append(out)
        raise Stop

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: order.append(name)

    handles = []
    try:
        handles.append(block.register_forward_hook(stop))
        for name, linear in linears_of(block).items():
            handles.append(linear.register_forward_pre_hook(note(name)))
        model(input_ids=ids[:1, :PROBE_TOKENS], use_cache=False)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return bool(returned) and isinstance(returned[0], tuple), order


def capture(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, as_tuple: bool, pool: Pool
) -> tuple[Tensor, list[Call | None]]:
    """What enters the first block, and every block's other arguments (None: not called)."""
    states: list[Tensor] = []
    calls: list[Call | None] = [None] * len(blocks)
    memo: dict[int, tuple[Any, Any]] = {}

    def bypass(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if any(call is not None for call in calls[index:]):
                raise RuntimeError(f"{blocks[index][0]} is called twice, or out of order")
            if states and _identity(hidden) != _identity(states[0]):
                raise RuntimeError(
                    f"the model changes the hidden states on their way to {blocks[index][0]}: its "
                    "blocks cannot run alone"
                )
            states.append(hidden)
            calls[index] = Call(*pool.keep((tuple(args[1:]), kwargs), memo))
            if index == len(blocks) - 1:
                raise Stop
            return (hidden, None, None) if as_tuple else hidden

        return forward

    # Instance attributes, because accelerate keeps its own forward there.
    own = [block.__dict__.get("forward") for _, block in blocks]
    try:
        for i, (_, block) in enumerate(blocks):
            block.__dict__["forward"] = bypass(i)
        model(**batch, use_cache=False)
    except Stop:
        pass
    finally:
        for (_, block), forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward
    if not states:
        raise RuntimeError("the model called none of its blocks: pass blocks='path.to.layers'")
    return states[0].detach(), calls


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride()


class Pool:
    """Keeps equal tensors of different batches (masks, rotary tables) once."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], list[Tensor]] = {}

    def keep(self, value: Any, memo: dict[int, tuple[Any, Any]]) -> Any:
        """A copy of nested tuples, lists and dicts around pooled tensors.

        `memo`, one a batch, keeps containers that blocks share (key-value stores) shared.
        """
        if isinstance(value, Tensor):
            return self._tensor(value.detach())
        if id(value) not in memo:
            kept: Any = value
            if type(value) is dict:
                kept = {key: self.keep(item, memo) for key, item in value.items()}
            elif type(value) in (tuple, list):
                kept = type(value)(self.keep(item, memo) for item in value)
            memo[id(value)] = (value, kept)  # holding the value keeps its id its own
        return memo[id(value)][1]

    def _tensor(self, tensor: Tensor) -> Tensor:
        alike = self._tensors.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        for other in alike[-POOL:]:
            if torch.equal(other, tensor):
                return other
        alike.append(tensor)
        return tensor
