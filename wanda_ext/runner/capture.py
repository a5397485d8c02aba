"""One pass over a model with every block bypassed: what enters its blocks, at hardly any cost.

Each block's own arguments (masks, rotary tables, ...) are kept, because they differ between the
blocks of many models. With them the blocks can run alone, provided that the model does nothing
with the hidden states between two blocks but pass them on, and passes nothing else on: both are
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.calibration import Batch
from wanda_ext.models import Block

PROBE_TOKENS = 8
POOL = 8  # how many kept tensors of one shape a new one is compared with


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass that has shown what was wanted."""


class GlueError(RuntimeError):
    """The model does more between its blocks than pass the hidden states on."""


class OrderError(RuntimeError):
    """The model does not call its blocks one after the other, each at most once."""


@dataclass
class Call:
    """What a block was called with, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def hidden_of(name: str, out: Any) -> Tensor:
    """The hidden states in what block `name` returns: a tensor, or the first entry of a tuple."""
    hidden = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"{name} returns a {type(out).__name__} that does not begin with hidden states: name "
            "the list of blocks that do with blocks='path.to.layers'"
        )
    return hidden


def probe(model: nn.Module, block: nn.Module, ids: Tensor) -> tuple[Any, list[str]]:
    """What the model's first block, `block`, returns, and the order in which it calls its modules.

    Runs it on a few tokens. None where the model does not call it.
    """
    returned: list[Any] = [None]
    order: list[str] = []

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        returned[0] = out
        raise Stop

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: order.append(name)

    handles = []
    try:
        handles.append(block.register_forward_hook(stop))
        for name, module in block.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(note(name)))
        model(input_ids=ids[:1, :PROBE_TOKENS], use_cache=False)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return returned[0], order


def capture(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, returned: Any, pool: Pool
) -> tuple[Tensor, list[Call | None]]:
    """What enters the first block, and every block's other arguments (None: not called).

    `returned` is what the first block returned to `probe`: a bypassed block returns the like.
    Raises GlueError where the blocks cannot run alone, OrderError where not even in turn.
    """
    states: list[Tensor] = []
    calls: list[Call | None] = [None] * len(blocks)
    memo: dict[int, tuple[Any, Any]] = {}
    stand_ins: dict[int, Tensor] = {}  # for tensors that blocks return beside the hidden states
    glue: list[str] = []

    def beside(item: Any, hidden: Tensor) -> Tensor | None:
        if not isinstance(item, Tensor):
            return None
        stand_in = hidden.new_zeros(1)
        stand_ins[id(stand_in)] = stand_in
        return stand_in

    def bypass(index: int) -> Callable[..., Any]:
        name = blocks[index][0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if any(call is not None for call in calls[index:]):
                raise OrderError(
                    f"{name} is called twice, or out of order: the blocks cannot be pruned one "
                    "after the other"
                )
            if not args and "hidden_states" not in kwargs:
                raise GlueError(f"the first argument of {name} is not the hidden states")
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if states and _identity(hidden) != _identity(states[0]):
                glue.append(f"the model changes the hidden states on their way to {name}")
            if any(id(tensor) in stand_ins for tensor in _tensors((args[1:], kwargs))):
                glue.append(f"{name} reads more of another block than the hidden states")
            states.append(hidden)
            calls[index] = Call(*pool.keep((tuple(args[1:]), kwargs), memo))
            if index == len(blocks) - 1:
                raise Stop
            if not isinstance(returned, (tuple, list)):
                return hidden
            return type(returned)([hidden, *(beside(item, hidden) for item in returned[1:])])

        return forward

    try:
        with forwards_replaced([block for _, block in blocks], bypass):
            model(**batch, use_cache=False)
    except Stop:
        pass
    except (GlueError, OrderError):
        raise
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        glue.append(f"the model does not run with its blocks bypassed ({why})")
    if glue:
        raise GlueError(glue[0])
    if not states:
        raise OrderError("the model called none of its blocks: pass blocks='path.to.layers'")
    return states[0].detach(), calls


@contextmanager
def forwards_replaced(
    blocks: Sequence[nn.Module], forward_of: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Calling block i calls forward_of(i) inside. On the instances: accelerate's own are there."""
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for i, block in enumerate(blocks):
            block.__dict__["forward"] = forward_of(i)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


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
