"""Runs a model block by block: its linears' statistics, then what leaves it for the next one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.calibration import Batch
from wanda_ext.interrupt import step
from wanda_ext.methods import InputStatistic
from wanda_ext.models import Block, Copies, ExpertSlice, Linear
from wanda_ext.runner.capture import Call, Pool, capture, hidden_of, probe
from wanda_ext.runner.eager import reads_of, uncompiled
from wanda_ext.runner.inputs import InputSums, Share


class Walk:
    """The hidden states of every batch on their way through the blocks, which run alone.

    `hidden[j]` is what enters block i from batch j, after advance(0) ... advance(i - 1). With
    `copies` the caller has the block on their device when it runs; inputs are brought there, and
    what leaves it goes home, beside the work on other batches: `copies.finish()` waits for it.
    """

    runner = "each block ran by itself"  # for the report

    @uncompiled
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        copies: Copies | None = None,
        states: MutableSequence[Tensor] | None = None,
        share: Share | None = None,
    ) -> None:
        """Captures. Raises GlueError where the model does more between blocks than pass on.

        states: what keeps the hidden states, if not a list in memory. share: brings in the sums of
        batches that other processes run. Only the first block, and what runs before it, need their
        weights here.
        """
        self.unseen: set[str] = set()  # of the linears that `statistics` was asked for last
        self._copies = copies
        self._share = share
        self.blocks = [block for _, block in blocks]
        self._names = [name for name, _ in blocks]
        self.keep = [_keep_mask(batch) for batch in batches]
        self.hidden: MutableSequence[Tensor] = [] if states is None else states
        self._calls: list[list[Call | None]] = []
        self._orders: dict[type, list[str]] = {}  # in which blocks of a class call their modules
        home = next(p.device for p in model.parameters() if not p.is_meta)
        self._start(model, blocks, [{k: v.to(home) for k, v in batch.items()} for batch in batches])

    def _start(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> None:
        first = self.blocks[0]
        returned, self._orders[type(first)] = probe(model, first, batches[0]["input_ids"])
        pool = Pool()
        for batch in batches:
            step()
            hidden, calls = capture(model, blocks, batch, returned, pool)
            self.hidden.append(hidden if self._copies is None else self._copies.at_home(hidden))
            self._calls.append(calls)

    @uncompiled
    @torch.no_grad()
    def statistics(
        self, index: int, targets: Mapping[str, Linear], gram: bool = False
    ) -> dict[str, InputStatistic]:
        """What enters the linears of block `index` over all batches, by name, in running order.

        `targets`: linears and slices of fused experts, by name in the block; one that is never
        called is absent, and in `unseen` if its weight is read all the same. gram: whether to sum
        x x^T too.
        """
        self.unseen.clear()
        if not targets:
            return {}
        kind = type(self.blocks[index])
        sums = InputSums(targets, self._share, gram)
        for j, (hidden, keep) in enumerate(zip(self.inputs(), self.keep, strict=True)):
            with sums.watching(keep, self._orders.get(kind, ())) as called:
                self.run(index, j, hidden)
            self._orders[kind] = called
        found = sums.result()
        self._find_unseen(index, {name: targets[name] for name in targets if name not in found})
        return found

    def _find_unseen(self, index: int, targets: Mapping[str, Linear]) -> None:
        """Runs batches again until all of these linears are read, by other ways than a call."""
        linears = {n: t for n, t in targets.items() if not isinstance(t, ExpertSlice)}
        for j, hidden in enumerate(self.inputs() if linears else ()):
            with reads_of(linears) as read:
                self.run(index, j, hidden)
            self.unseen |= read
            if self.unseen >= linears.keys():
                return

    @uncompiled
    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Runs block `index` as it is now; `hidden` becomes what enters the next one."""
        for j, hidden in enumerate(self.inputs()):
            self.leave(index, j, self.run(index, j, hidden))

    def leave(self, index: int, j: int, out: Any) -> None:
        """Batch j goes on with what block `index` has returned for it; it is done there."""
        called = self.calls(index, j)
        self._calls[j][index] = None
        if called:
            self._pass_on(index, j, out)

    def calls(self, index: int, j: int) -> bool:
        """Whether the model calls block `index` for batch j; else it skips it."""
        return self._calls[j][index] is not None

    @uncompiled
    def output(self, index: int, j: int) -> Tensor | None:
        """What leaves block `index`, as it is now, for batch j; None where the model skips it.

        Differentiable where gradients are on. `hidden` stays, so that it can be asked again.
        """
        if not self.calls(index, j):
            return None
        hidden = self.hidden[j]
        if self._copies is not None:
            hidden = self._copies.bring(hidden)()
        return hidden_of(self._names[index], self.run(index, j, hidden))

    def settle(self) -> None:
        """Waits until `hidden` has arrived."""
        if self._copies is not None:
            self._copies.finish()

    def close(self) -> None:
        """Ends what a walk that is not walked to its end has under way."""

    def _pass_on(self, index: int, j: int, out: Any) -> None:
        hidden = hidden_of(self._names[index], out)
        if self._copies is None or not isinstance(self.hidden, list):
            self.hidden[j] = hidden
        else:
            self._copies.send((hidden, self.hidden[j]))

    def inputs(self) -> Iterator[Tensor]:
        """The hidden states of one batch after the other; the next one is already on its way."""
        if self._copies is None:
            yield from self.hidden
            return
        arrive = self._copies.bring(self.hidden[0])
        for following in range(1, len(self.hidden) + 1):
            hidden = arrive()
            if following < len(self.hidden):
                arrive = self._copies.bring(self.hidden[following])
            yield hidden

    def run(self, index: int, j: int, hidden: Tensor) -> Any:
        """What block `index` returns for batch j; the hidden states where the model skips it."""
        step()
        call = self._calls[j][index]
        if call is None:
            return hidden
        if self._copies is not None:
            call.args, call.kwargs = moved((call.args, call.kwargs), self._copies.device)
        return self.blocks[index](hidden, *call.args, **call.kwargs)


def _keep_mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool().cpu()


def moved(value: Any, device: torch.device) -> Any:
    """Nested containers with their tensors on `device`; dicts stay the same objects."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        value.update({key: moved(item, device) for key, item in value.items()})
    return value
