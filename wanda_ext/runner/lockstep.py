"""Walks models whose blocks cannot run alone: every batch waits inside the model's own forward.

Each batch has a thread in which the model runs until it reaches a block. There it waits until the
block has been measured and pruned on all batches, then gets the block's output and goes on to the
next block. So whatever the model does between two blocks, it does itself. Only one thread works at
a time, and the blocks run in the caller's, batch after batch: sums and results do not depend on
timing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.calibration import Batch
from wanda_ext.interrupt import step
from wanda_ext.models import Block, Copies, Visit, copies_to, visits
from wanda_ext.runner.capture import Call, GlueError, OrderError, forwards_replaced, hidden_of
from wanda_ext.runner.held import HeldPass
from wanda_ext.runner.walk import Walk, moved


def start_walk(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    copies: Copies | None = None,
) -> Walk:
    """The walk that suits the model; its `runner` says which it is, and why. Close it at the end.

    Raises OrderError where the blocks do not run one after the other.
    """
    try:
        return Walk(model, blocks, batches, copies)
    except GlueError as reason:
        return Lockstep(model, blocks, batches, copies, why=str(reason))


def started(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    copies: Copies | None = None,
) -> AbstractContextManager[Walk]:
    """start_walk's walk, closed at the end."""
    return closing(start_walk(model, blocks, batches, copies))


@contextmanager
def walking(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    device: torch.device | None,
) -> Iterator[tuple[Walk, Visit]]:
    """A walk, and what has block i on the device inside."""
    modules = [block for _, block in blocks]
    with (
        copies_to(modules, device) as copies,
        started(model, blocks, batches, copies) as walk,
    ):
        yield walk, visits(modules, copies)


class Lockstep(Walk):
    """A walk through the model's own forward passes, one thread a batch."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        copies: Copies | None = None,
        why: str = "as asked",
    ) -> None:
        self._ended = ExitStack()
        self._passes: list[_Pass] = []
        super().__init__(model, blocks, batches, copies)
        self.runner = f"the blocks ran in lock-step: {why}"

    def close(self) -> None:
        for running in self._passes:
            running.end()
        self._ended.close()

    def _start(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> None:
        own = [block.forward for block in self.blocks]

        def stopping(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                thread = threading.current_thread()
                if isinstance(thread, _Pass):
                    return thread.reach(index, args, kwargs)
                return own[index](*args, **kwargs)

            return forward

        self._home = next(model.parameters()).device
        try:
            self._ended.enter_context(forwards_replaced(self.blocks, stopping))
            for j, batch in enumerate(batches):
                step()
                self.hidden.append(torch.empty(0))
                self._calls.append([None] * len(blocks))
                self._passes.append(_Pass(model, batch))
                self._arrive(j, -1, self._passes[j].begin())
        except BaseException:
            self.close()
            raise

    def _arrive(self, j: int, before: int, arrival: tuple[int, Call] | None) -> None:
        """Batch j waits at a block now, or (None) has passed all that it runs."""
        if arrival is None:
            return
        index, call = arrival
        if index <= before:
            raise OrderError(f"{self._names[index]} is called twice, or out of order")
        first = next(
            (a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)), None
        )
        self._calls[j][index] = call
        if first is not None:
            self.hidden[j] = first

    def inputs(self) -> Iterator[Tensor]:
        yield from list(self.hidden)

    def run(self, index: int, j: int, hidden: Tensor) -> Any:
        step()
        call = self._calls[j][index]
        if call is None:
            return hidden
        args, kwargs = call.args, call.kwargs
        if self._copies is not None:
            args, kwargs = moved((args, kwargs), self._copies.device)
        return self.blocks[index](*args, **kwargs)

    def _pass_on(self, index: int, j: int, out: Any) -> None:
        out = out if self._copies is None else moved(out, self._home)
        self.hidden[j] = hidden_of(self._names[index], out)
        if index + 1 < len(self.blocks):
            self._arrive(j, index, self._passes[j].go_on(out))
        else:
            self._passes[j].end()


class _Pass(HeldPass):
    """One batch's forward pass, which waits wherever it reaches a block, for the block's output."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(partial(model, **batch, use_cache=False))

    def reach(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called inside the pass, in a block's place."""
        return self.wait((index, Call(args, kwargs)))
