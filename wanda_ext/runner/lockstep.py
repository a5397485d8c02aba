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
from contextlib import ExitStack, closing, contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.calibration import Batch
from wanda_ext.interrupt import step
from wanda_ext.models import Block, Copies, Visit, copies_to, visits
from wanda_ext.runner.capture import Call, GlueError, OrderError, Stop, forwards_replaced, hidden_of
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
        closing(start_walk(model, blocks, batches, copies)) as walk,
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
        self.runner = f"in lock-step: {why}"

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

    def _inputs(self) -> Iterator[Tensor]:
        yield from list(self.hidden)

    def _run(self, index: int, j: int, hidden: Tensor) -> Any:
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


class _Pass(threading.Thread):
    """One batch's forward pass, which waits wherever it reaches a block."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(name="wanda_ext batch", daemon=True)
        self._model = model
        self._batch = batch
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._outputs: SimpleQueue[Any] = SimpleQueue()  # of blocks; Stop ends the pass
        self._arrivals: SimpleQueue[tuple[int, Call] | BaseException | None] = SimpleQueue()

    def begin(self) -> tuple[int, Call] | None:
        """Runs to the first block."""
        self.start()
        return self._arrival()

    def go_on(self, out: Any) -> tuple[int, Call] | None:
        """The block it waits at returns `out`; runs to the next one, or (None) to its end."""
        self._outputs.put(out)
        return self._arrival()

    def end(self) -> None:
        """Leaves the model where it is."""
        self._outputs.put(Stop)
        if self.is_alive():
            self.join()

    def reach(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called inside the pass, in a block's place."""
        self._arrivals.put((index, Call(args, kwargs)))
        out = self._outputs.get()
        if out is Stop:
            raise Stop
        return out

    def run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # it is a thread's own, as is the grad mode
            with torch.no_grad():
                self._model(**self._batch, use_cache=False)
        except Stop:
            pass
        except BaseException as error:
            self._arrivals.put(error)
            return
        self._arrivals.put(None)

    def _arrival(self) -> tuple[int, Call] | None:
        arrival = self._arrivals.get()
        if isinstance(arrival, BaseException):
            raise arrival
        return arrival
