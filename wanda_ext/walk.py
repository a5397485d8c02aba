"""Runs a model block by block: its linears' statistics, then what leaves it for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext import ops
from wanda_ext.blocks import Block
from wanda_ext.calibration import Batch
from wanda_ext.capture import Call, Pool, Stop, capture, probe
from wanda_ext.interrupt import step
from wanda_ext.transfer import Copies


@dataclass
class InputStatistic:
    """sumsq [k] float64: the sum of squares of each input feature over `tokens` tokens."""

    sumsq: Tensor
    tokens: int

    @property
    def norm(self) -> Tensor:
        """input_norm [k] float32."""
        return self.sumsq.sqrt().float()


class Walk:
    """The hidden states of every batch on their way through the blocks.

    `hidden[j]` is what enters block i from batch j, after advance(0) ... advance(i - 1). With
    `copies` the caller has the block on their device when it runs; inputs are brought there, and
    what leaves it goes home, beside the work on other batches: `copies.finish()` waits for it.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        copies: Copies | None = None,
    ) -> None:
        """Captures. Raises RuntimeError where the model does more between blocks than pass on."""
        self._copies = copies
        self.blocks = [block for _, block in blocks]
        self.keep = [_keep_mask(batch) for batch in batches]
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call | None]] = []
        home = next(model.parameters()).device
        first = self.blocks[0]
        as_tuple, order = probe(model, first, batches[0]["input_ids"].to(home))
        self._orders: dict[type, list[str]] = {type(first): order}  # in which blocks run linears
        pool = Pool()
        for batch in batches:
            step()
            tensors = {key: value.to(home) for key, value in batch.items()}
            hidden, calls = capture(model, blocks, tensors, as_tuple, pool)
            self.hidden.append(hidden if copies is None else copies.at_home(hidden))
            self._calls.append(calls)

    @torch.no_grad()
    def statistics(self, index: int, linears: Mapping[str, nn.Module]) -> dict[str, InputStatistic]:
        """What enters the linears of block `index` over all batches, by name, in running order.

        `linears` has names relative to the block; one that is never called is absent. Each batch's
        sum starts from zero and is added in batch order; linears that read one tensor share it.
        """
        found: dict[str, InputStatistic] = {}
        if not linears:
            return found
        kind = type(self.blocks[index])
        for j, (hidden, keep) in enumerate(zip(self._inputs(), self.keep, strict=True)):
            known = [name for name in self._orders.get(kind, ()) if name in linears]
            hooks = _Hooks(found, keep, known if sorted(known) == sorted(linears) else None)
            with hooks.on(linears):
                self._run(index, j, hidden)
            self._orders[kind] = hooks.order
        return found

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Runs block `index` as it is now; `hidden` becomes what enters the next one."""
        for j, hidden in enumerate(self._inputs()):
            out = self._run(index, j, hidden)
            if self._copies is None:
                self.hidden[j] = out
            else:
                self._copies.send((out, self.hidden[j]))
            self._calls[j][index] = None

    def _inputs(self) -> Iterator[Tensor]:
        """The hidden states of one batch after the other; the next one is already on its way."""
        if self._copies is None:
            yield from self.hidden
            return
        arrive = self._copies.bring(self.hidden[0])
        for following in [*self.hidden[1:], None]:
            hidden = arrive()
            if following is not None:
                arrive = self._copies.bring(following)
            yield hidden

    def _run(self, index: int, j: int, hidden: Tensor) -> Tensor:
        step()
        call = self._calls[j][index]
        if call is None:  # the model skips this block
            return hidden
        if self._copies is not None:
            call.args, call.kwargs = _moved((call.args, call.kwargs), self._copies.device)
        out = self.blocks[index](hidden, *call.args, **call.kwargs)
        passed_on: Tensor = out[0] if isinstance(out, tuple) else out
        return passed_on


class _Hooks:
    """Collects input statistics during one pass over one batch.

    `expected` is the order in which a block of this class ran all these linears before, each once.
    A pass that has followed it to its end stops there: the last output is not needed.
    """

    def __init__(
        self, found: dict[str, InputStatistic], keep: Tensor | None, expected: list[str] | None
    ) -> None:
        self.order: list[str] = []
        self._found = found
        self._keep = keep
        self._expected = expected
        # The inputs themselves are held so that none's memory is reused while others are compared.
        self._seen: list[tuple[tuple[Any, ...], Tensor, InputStatistic]] = []

    @contextmanager
    def on(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        def hook(name: str) -> Callable[..., None]:
            def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._add(name, args[0] if args else next(iter(kwargs.values())))
                self.order.append(name)
                if self.order == self._expected:
                    raise Stop

            return see

        handles = []
        try:
            for name, linear in linears.items():
                handles.append(linear.register_forward_pre_hook(hook(name), with_kwargs=True))
            yield
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, x: Tensor) -> None:
        part = self._statistic(name, x)
        if name in self._found:
            self._found[name].sumsq += part.sumsq
            self._found[name].tokens += part.tokens
        else:
            self._found[name] = InputStatistic(part.sumsq.clone(), part.tokens)

    def _statistic(self, name: str, x: Tensor) -> InputStatistic:
        identity = (x.data_ptr(), x.shape, x.stride(), x.device, x._version)
        for other, _, statistic in self._seen:
            if other == identity:
                return statistic
        at = x.to(kernel_device("input_sumsq_", x.device))
        sumsq = torch.zeros(x.shape[-1], dtype=torch.float64, device=at.device)
        tokens = x.numel() // x.shape[-1]
        keep = self._keep
        if keep is not None:
            if keep.numel() != tokens:
                raise RuntimeError(
                    f"{name} reads {tokens} tokens where the attention_mask has {keep.numel()}: "
                    "calibrate with sequences of one length and no mask"
                )
            tokens = int(keep.sum())
            keep = keep.reshape(x.shape[:-1]).to(at.device)
        ops.input_sumsq_(sumsq, at, keep)
        statistic = InputStatistic(sumsq, tokens)
        self._seen.append((identity, x, statistic))
        return statistic


def kernel_device(op: str, device: torch.device) -> torch.device:
    """`device` where this build has a kernel of the op for it, else the CPU."""
    return device if ops.supports(op, device) else torch.device("cpu")


def _keep_mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool().cpu()


def _moved(value: Any, device: torch.device) -> Any:
    """Nested containers with their tensors on `device`; dicts stay the same objects."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        value.update({key: _moved(item, device) for key, item in value.items()})
    return value
