"""Runs a block in two streams, the pruned model's and the dense one's, linear by linear.

The pruned stream waits on all batches before a linear, so that the linear can be changed and all
that follows sees it; what entered the same linear in the dense stream is at hand then. Each stream
runs a block once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import current_thread
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.calibration import Batch
from wanda_ext.interrupt import step
from wanda_ext.methods import InputStatistic, drift_of
from wanda_ext.models import Block, Copies, ExpertSlice, Linear
from wanda_ext.runner.capture import OrderError
from wanda_ext.runner.eager import uncompiled
from wanda_ext.runner.held import HeldPass
from wanda_ext.runner.inputs import BatchSums, identity_of, kept_rows, statistic_of
from wanda_ext.runner.lockstep import started
from wanda_ext.runner.walk import Walk


class TwoStreams:
    """Two walks over the same batches through one model, of which the dense one is a block ahead.

    Statistics are over all tokens but padding and the first of each window: it attends to nothing
    but itself, and models make it a sink of attention, the same in both streams, whose activations
    would outweigh all others'.
    """

    def __init__(self, pruned: Walk, dense: Walk, batches: Sequence[Batch]) -> None:
        self.runner = pruned.runner
        self.pruned = pruned
        self.dense = dense
        self._counted = [after_first(batch) for batch in batches]

    def stages(
        self, index: int, targets: Mapping[str, Linear], advance: bool = True
    ) -> Generator[BatchSums, None, None]:
        """What enters the linears of block `index`, stage by stage, with gram and drift.

        A stage's linears must be changed, if at all, before the next stage is asked for. Linears
        that read one tensor share one statistic. What some batch does not call exactly once with a
        row for each of its tokens (experts) comes first, as Walk.statistics has it: without drift.
        At the end, with `advance`, both streams are at the next block. Close it where it is left.
        """
        linears = {n: t for n, t in targets.items() if not isinstance(t, ExpertSlice)}
        seen = self._run_dense(index, linears)
        order = _common_order(seen)
        others = {name: target for name, target in targets.items() if name not in order}
        found = self.pruned.statistics(index, others, gram=True)
        if found:
            yield found
        inputs = {j: one.inputs for j, one in seen.items()}
        watched = {name: linears[name] for name in order}
        with closing(_HeldBlock(self.pruned, index, watched, inputs, self._counted)) as held:
            for name in order:
                yield {name: held.before(name)}
            if advance:
                held.finish()

    @uncompiled
    @torch.no_grad()
    def _run_dense(self, index: int, linears: Mapping[str, nn.Module]) -> dict[int, _Seen]:
        """Block `index`, not pruned yet, passes its batches on; what its linears read, by batch."""
        found = {}
        walk = self.dense
        for j, hidden in enumerate(walk.inputs()):
            seen = _Seen([], {}, {})

            def see(name: str, x: Tensor, seen: _Seen = seen) -> None:
                seen.called.append(name)
                seen.inputs[name], seen.versions[name] = x, x._version

            with _inputs_seen(linears, see):
                out = walk.run(index, j, hidden)
            if walk.calls(index, j):
                seen.keep_whole(self._counted[j].numel())
                found[j] = seen
            walk.leave(index, j, out)
        return found


@contextmanager
def two_streams(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    copies: Copies | None = None,
) -> Iterator[TwoStreams]:
    """Both streams before the first block of a dense model. Raises what start_walk raises."""
    with (
        started(model, blocks, batches, copies) as pruned,
        started(model, blocks, batches, copies) as dense,
    ):
        yield TwoStreams(pruned, dense, batches)


def after_first(batch: Batch) -> Tensor:
    """Which tokens are neither padding nor the first of a window that has more: bool, on the CPU.

    Shapes: input_ids [batch, tokens] -> [batch, tokens].
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    number = kept.cumsum(dim=1)
    return (kept & ((number > 1) | (number[:, -1:] == 1))).cpu()


@dataclass
class _Seen:
    """What the linears of a block read in one batch, and in which order."""

    called: list[str]
    inputs: dict[str, Tensor]
    versions: dict[str, int]

    def keep_whole(self, tokens: int) -> None:
        """Forgets what is not a row for each of so many tokens, or was overwritten since."""
        self.inputs = {
            name: x
            for name, x in self.inputs.items()
            if x.numel() // x.shape[-1] == tokens and x._version == self.versions[name]
        }


def _common_order(seen: Mapping[int, _Seen]) -> list[str]:
    """The linears that all batches call once and read whole, where they do so in one order."""
    orders = [
        [name for name in one.called if one.called.count(name) == 1 and name in one.inputs]
        for one in seen.values()
    ]
    if not orders:
        return []
    common = set(orders[0]).intersection(*orders)
    first, *others = [[name for name in order if name in common] for order in orders]
    return first if all(other == first for other in others) else []


class _HeldBlock:
    """A block of the pruned stream on all batches, each held before the same linear."""

    def __init__(
        self,
        walk: Walk,
        index: int,
        linears: Mapping[str, nn.Module],
        dense: dict[int, dict[str, Tensor]],
        counted: Sequence[Tensor],
    ) -> None:
        """dense: what entered each linear in the dense stream, by batch; used up."""
        self._walk = walk
        self._index = index
        self._dense = dense
        self._counted = counted
        self._passes: dict[int, HeldPass] = {}
        self._read: dict[int, Tensor] = {}  # by the linear they wait at
        self._identities: dict[int, tuple[Any, ...]] = {}
        self._statistic: InputStatistic | None = None
        self._watch = ExitStack()
        self._watch.enter_context(_inputs_seen(linears, _wait))

    @uncompiled
    @torch.no_grad()
    def before(self, name: str) -> InputStatistic:
        """Runs all batches on to linear `name`, the next one, and sums up what enters it."""
        read: dict[int, Tensor] = {}
        for j, arrival in self._run_on():
            if arrival is None or arrival[0] != name:
                raise OrderError(
                    f"{name} is not called where it was called in the dense model: this block "
                    "decides by its inputs what to call; prune it without an update"
                )
            read[j] = arrival[1]
        identities = {j: identity_of(x) for j, x in read.items()}
        dense = {j: self._dense[j].pop(name) for j in read}
        if self._statistic is None or identities != self._identities:
            self._statistic = None  # its matrices' memory is needed again
            for j, x in read.items():
                part = self._summed(x, dense[j], self._counted[j])
                self._statistic = part if self._statistic is None else self._statistic + part
        self._read, self._identities = read, identities  # held, so that none's memory is reused
        assert self._statistic is not None
        return self._statistic

    @uncompiled
    @torch.no_grad()
    def finish(self) -> None:
        """Runs all batches to the end of the block, and on to the next one."""
        self._read = {}
        self._statistic = None
        for j, _ in self._run_on():
            self._walk.leave(self._index, j, self._passes.pop(j).out)

    def close(self) -> None:
        for held in self._passes.values():
            held.end()
        self._watch.close()

    def _run_on(self) -> Iterator[tuple[int, Any]]:
        """Each batch, and what it arrives with: (linear, its input), or None at the end."""
        if self._passes:
            for j, held in list(self._passes.items()):
                step()
                yield j, held.go_on()
            return
        for j, hidden in enumerate(self._walk.inputs()):
            if self._walk.calls(self._index, j):
                held = HeldPass(partial(self._walk.run, self._index, j, hidden))
                self._passes[j] = held
                yield j, held.begin()

    @staticmethod
    def _summed(x: Tensor, dense: Tensor, counted: Tensor) -> InputStatistic:
        rows = kept_rows(x, counted)
        drift = drift_of(kept_rows(dense.to(x.device), counted), rows)
        return replace(statistic_of(x, counted, gram=True), drift=drift)


def _wait(name: str, x: Tensor) -> None:
    held = current_thread()
    if isinstance(held, HeldPass):
        held.wait((name, x))


@contextmanager
def _inputs_seen(
    linears: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """see(name, input) is called before each call of a linear inside."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: see(name, (args or tuple(kwargs.values()))[0])

    handles = []
    try:
        for name, module in linears.items():
            handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
