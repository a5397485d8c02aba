"""What the linears and experts of a block read while it runs, summed over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext import ops
from wanda_ext.methods import InputStatistic, gram_of
from wanda_ext.models import FEW_TOKENS, ExpertSlice, Linear, reads, tokens_read
from wanda_ext.runner.capture import Stop

BatchSums = dict[str, InputStatistic]  # by name in the block
# This process's next batch, None where it has no more -> all processes' of this turn, in order; an
# empty list where none has any.
Share = Callable[[BatchSums | None], list[BatchSums]]


class InputSums:
    """Collects the input statistics of one block, in passes over one batch each.

    Each batch's sum starts from zero and is added in batch order; linears that always read one
    tensor share one statistic.
    """

    def __init__(
        self, targets: Mapping[str, Linear], share: Share | None = None, gram: bool = False
    ) -> None:
        """targets: linears and slices of fused experts, by name in the block. share: see Share;
        None: this process has all batches. gram: whether to sum x x^T too."""
        self._share = share or _alone
        self._gram = gram
        self._targets = targets
        self._linears = {n: t for n, t in targets.items() if not isinstance(t, ExpertSlice)}
        self._experts: dict[str, nn.Module] = {
            name.rsplit(".", 2)[0]: target.owner
            for name, target in targets.items()
            if isinstance(target, ExpertSlice)
        }
        self._sums: BatchSums = {}
        self._batch: BatchSums = {}
        self._keep: Tensor | None = None
        # The inputs themselves are held so that none's memory is reused while others are compared.
        self._seen: list[tuple[tuple[Any, ...], Tensor, InputStatistic]] = []

    @contextmanager
    def watching(self, keep: Tensor | None, order: Iterable[str]) -> Iterator[list[str]]:
        """Adds what is read inside, and gives the order in which modules read it.

        keep [batch, tokens]: tokens to look at. order: in which a block of this kind called its
        modules before. A body that follows an order that has all of them once to its end is ended
        there, because the last output is not needed.
        """
        watched = {**self._linears, **self._experts}
        known = [name for name in order if name in watched]
        expected = known if sorted(known) == sorted(watched) else None
        called: list[str] = []
        self._keep, self._seen, self._batch = keep, [], {}

        def hook(name: str) -> Callable[..., None]:
            def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                look = self._see_experts if name in self._experts else self._see_linear
                look(name, args or tuple(kwargs.values()))
                called.append(name)
                if called == expected:
                    raise Stop

            return see

        handles = []
        try:
            for name, module in watched.items():
                handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
            yield called
        except Stop:
            pass
        finally:
            self._seen = []
            for handle in handles:
                handle.remove()
        for batch in self._share(self._batch):
            _add(self._sums, batch)

    def result(self) -> dict[str, InputStatistic]:
        """The statistics of the targets that were called, by name, in running order."""
        while turn := self._share(None):
            for batch in turn:
                _add(self._sums, batch)
        found: dict[str, InputStatistic] = {}
        for name, statistic in self._sums.items():
            path = name.rsplit(".", 2)[0]
            if name in self._linears:
                found[name] = statistic
            elif name not in found and path in self._experts:
                found.update(self._of_experts(path))
        return found

    def _of_experts(self, path: str) -> dict[str, InputStatistic]:
        """The slices' statistics. An expert that saw few tokens has those of its layer's mean token
        instead, as many times: enough to rank its weights."""
        layers: dict[str, InputStatistic] = {}
        found = {}
        for name, target in self._targets.items():
            if isinstance(target, ExpertSlice) and target.owner is self._experts[path]:
                own = self._sums.get(name)
                tokens = 0 if own is None else own.tokens
                if own is None or tokens < FEW_TOKENS:
                    if target.parameter not in layers:
                        layers[target.parameter] = self._of_layer(path, target.parameter)
                    layer = layers[target.parameter]
                    sumsq = layer.sumsq * (max(tokens, 1) / layer.tokens)
                    own = InputStatistic(sumsq, tokens, of_layer=True, gram=layer.gram)
                found[name] = own
        return found

    def _of_layer(self, path: str, weight: str) -> InputStatistic:
        """Of all experts together."""
        names = (name for name in self._sums if name.rsplit(".", 2)[::2] == [path, weight])
        return reduce(add, map(self._sums.__getitem__, names))

    def _see_linear(self, name: str, args: tuple[Any, ...]) -> None:
        x = args[0]
        identity = identity_of(x)
        for other, _, statistic in self._seen:
            if other == identity:
                self._add(name, statistic)
                return
        keep = self._keep_of(name, x.numel() // x.shape[-1])
        statistic = statistic_of(x, keep, self._gram)
        self._seen.append((identity, x, statistic))
        self._add(name, statistic)

    def _see_experts(self, name: str, args: tuple[Any, ...]) -> None:
        module = self._experts[name]
        keep = self._keep_of(name, tokens_read(module, args))
        for index, weight, rows in reads(module, args, None if keep is None else keep.flatten()):
            self._add(f"{name}.{index}.{weight}", statistic_of(rows, None, self._gram))

    def _keep_of(self, name: str, tokens: int) -> Tensor | None:
        if self._keep is not None and self._keep.numel() != tokens:
            raise RuntimeError(
                f"{name} reads {tokens} tokens where the attention_mask has {self._keep.numel()}: "
                "calibrate with sequences of one length and no mask"
            )
        return self._keep

    def _add(self, name: str, part: InputStatistic) -> None:
        _add(self._batch, {name: part})


def statistic_of(x: Tensor, keep: Tensor | None, gram: bool) -> InputStatistic:
    """Of one linear's inputs in one batch. keep: tokens to look at; gram: whether to sum x x^T.

    Shapes: x [..., k]; keep, as many bool as tokens -> sumsq [k], gram [k, k].
    """
    at = x.to(kernel_device("input_sumsq_", x.device))
    sumsq = torch.zeros(x.shape[-1], dtype=torch.float64, device=at.device)
    keep = None if keep is None else keep.reshape(x.shape[:-1])
    ops.input_sumsq_(sumsq, at, None if keep is None else keep.to(at.device))
    tokens = x.numel() // x.shape[-1] if keep is None else int(keep.sum())
    if not gram:
        return InputStatistic(sumsq, tokens)
    return InputStatistic(sumsq, tokens, gram=gram_of(kept_rows(x, keep)))


def kept_rows(x: Tensor, keep: Tensor | None) -> Tensor:
    """Shapes: x [..., k]; keep, as many bool as tokens -> [kept tokens, k]."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if keep is None else rows[keep.flatten().to(rows.device)]


def identity_of(x: Tensor) -> tuple[Any, ...]:
    """The same for two tensors that live at one time if they are one and the same, unchanged."""
    return x.data_ptr(), x.shape, x.stride(), x.device, x._version


def _alone(batch: BatchSums | None) -> list[BatchSums]:
    return [] if batch is None else [batch]


def _add(sums: BatchSums, batch: BatchSums) -> None:
    """Adds a batch to the sums: those who share a statistic in both share their sum."""
    joined: dict[tuple[int, int], InputStatistic] = {}
    for name, part in batch.items():
        before = sums.get(name)
        both = (id(before), id(part))
        if both not in joined:
            joined[both] = part if before is None else before + part
        sums[name] = joined[both]


def kernel_device(op: str, device: torch.device) -> torch.device:
    """`device` where this build has a kernel of the op for it, else the CPU."""
    return device if ops.supports(op, device) else torch.device("cpu")
