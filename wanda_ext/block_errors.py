"""How far the blocks of a pruned model are from those of the dense one it was made from.

Both models walk through the same batches side by side, one block of each at a time. An error is
the mean over tokens of ||pruned - dense|| / ||dense||, the norms over the features of what leaves
the block. Token by token, because a few tokens have norms so large that they would hide the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from wanda_ext.blocks import find_blocks
from wanda_ext.calibration import Batch
from wanda_ext.capture import hidden_of
from wanda_ext.experts import layout_of
from wanda_ext.interrupt import step
from wanda_ext.lockstep import start_walk
from wanda_ext.transfer import Copies, Visits

RANKED_TOKENS = 2048  # that linears are measured on one by one: a run of their block for each


@dataclass(frozen=True)
class Unit:
    """A module that a prune has changed, and the same one of the dense model.

    A linear, or the fused experts of a layer, which one module computes.
    """

    name: str
    module: nn.Module
    dense: nn.Module

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Each of the two models has the other's weights inside. Nothing is copied."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        for one, other in self._pairs():
            one.data, other.data = other.data, one.data

    @torch.no_grad()
    def restore(self) -> None:
        """The pruned model gets the dense weights."""
        for one, other in self._pairs():
            one.copy_(other)

    @property
    def changed(self) -> bool:
        return any(not torch.equal(one, other) for one, other in self._pairs())

    def check(self) -> None:
        """Raises ValueError where the two are not of one shape, dtype and device."""
        for one, other in self._pairs():
            told = [f"{list(t.shape)} {t.dtype} on {t.device}" for t in (one, other)]
            if told[0] != told[1]:
                raise ValueError(
                    f"dense: expected the model as it was before the prune; {self.name} is "
                    f"{told[1]} there and {told[0]} in the pruned one"
                )

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        own = (self.module.parameters(recurse=False), self.dense.parameters(recurse=False))
        return list(zip(*own, strict=True))


@dataclass(frozen=True)
class BlockPair:
    """A block of both models, and what differs in it, in the order of the modules."""

    name: str
    module: nn.Module
    dense: nn.Module
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class BlockError:
    """The errors of what leaves one block.

    own: of the pruned block on what enters it in the dense model. grown: of the pruned model on its
    way, all blocks before included. linears: what `own` would be if that one alone were pruned.
    """

    name: str
    own: float
    grown: float
    linears: dict[str, float] = field(default_factory=dict)


def pair_blocks(model: nn.Module, dense: nn.Module, blocks: str | None = None) -> list[BlockPair]:
    """The blocks of both models. Raises ValueError where they are not the same but for weights."""
    ours, theirs = find_blocks(model, blocks), find_blocks(dense, blocks)
    shapes = [[(n, type(m)) for n, m in one.named_modules()] for one in (model, dense)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"dense: expected a {type(model).__name__} of the same modules as the pruned model; "
            "load it again from where the pruned one came from"
        )
    seen: set[int] = set()  # a weight that several modules share counts once
    pairs = []
    for (name, block), (_, twin) in zip(ours, theirs, strict=True):
        units = []
        for unit in _units(name, block, twin):
            weights = {id(weight) for weight in unit.module.parameters(recurse=False)}
            if not weights & seen:
                unit.check()
                units += [unit] if unit.changed else []
            seen |= weights
        pairs.append(BlockPair(name, block, twin, tuple(units)))
    return pairs


def _units(name: str, block: nn.Module, twin: nn.Module) -> Iterator[Unit]:
    twins = dict(twin.named_modules())
    for short, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) or layout_of(module) is not None:
            yield Unit(f"{name}.{short}", module, twins[short])


@torch.no_grad()
def block_errors(
    model: nn.Module,
    dense: nn.Module,
    pairs: Sequence[BlockPair],
    batches: Sequence[Batch],
    device: torch.device | None = None,
    progress: bool = True,
) -> list[BlockError]:
    """The errors of every block over the batches; both models are as they were afterwards.

    pairs: from pair_blocks. device: where one block of each at a time is taken to; default: where
    the models are. Linears are measured one by one on the first RANKED_TOKENS tokens.
    """
    found = []
    with ExitStack() as stack:
        ours = [(pair.name, pair.module) for pair in pairs]
        theirs = [(pair.name, pair.dense) for pair in pairs]
        copies = None if device is None else stack.enter_context(Copies(device))
        visits = (
            []
            if copies is None
            else [Visits([block for _, block in blocks], copies) for blocks in (ours, theirs)]
        )
        pruned = stack.enter_context(closing(start_walk(model, ours, batches, copies)))
        before = stack.enter_context(closing(start_walk(dense, theirs, batches, copies)))
        for i, pair in enumerate(tqdm(pairs, "measuring", unit="block", disable=not progress)):
            with ExitStack() as there:
                for each in visits:
                    there.enter_context(each.visit(i))
                inside = _Inside(pair, before.keep)
                with inside.watching():
                    before.advance(i)
                pruned.advance(i)
            if copies is not None:
                copies.finish()
            grown = _Mean()
            for ours_j, theirs_j, keep in zip(
                pruned.hidden, before.hidden, before.keep, strict=True
            ):
                grown.add(ours_j, theirs_j, keep)
            linears = {name: mean.value for name, mean in inside.linears.items()}
            found.append(BlockError(pair.name, inside.own.value, grown.value, linears))
    return found


class _Inside:
    """What a block's pruned linears do to it where its inputs are those of the dense model."""

    def __init__(self, pair: BlockPair, keep: Sequence[Tensor | None]) -> None:
        self._pair = pair
        self._keep = iter(keep)
        self.own = _Mean()
        self.linears = {unit.name: _Mean() for unit in pair.units}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measures whenever the dense block runs inside."""
        handle = self._pair.dense.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the block runs for itself, so that what it leaves in shared caches is right."""
        step()
        keep, units = next(self._keep), self._pair.units
        if not units:
            return

        def run() -> Tensor:
            return hidden_of(self._pair.name, block.forward(*args, **kwargs))

        dense = run()
        with ExitStack() as exchanged:
            for unit in units:
                exchanged.enter_context(unit.exchanged())
            self.own.add(run(), dense, keep)
        for unit in units:
            if self.linears[unit.name].tokens < RANKED_TOKENS:
                with unit.exchanged():
                    self.linears[unit.name].add(run(), dense, keep)


class _Mean:
    """The mean over tokens of ||one - other|| / ||other||; infinity where something is not finite.

    A block that is skipped, or has nothing pruned, has 0.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self.tokens = 0

    def add(self, one: Tensor, other: Tensor, keep: Tensor | None) -> None:
        """Shapes: one, other [..., batch, tokens, features]; keep [batch, tokens] bool."""
        norm = other.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        error = (one.float() - other.float()).norm(dim=-1) / norm
        if keep is not None:
            error = error.reshape(-1, keep.numel())[:, keep.flatten().to(error.device)]
        self._sum += float(error.sum(dtype=torch.float64))
        self.tokens += error.numel()

    @property
    def value(self) -> float:
        mean = self._sum / self.tokens if self.tokens else 0.0
        return mean if math.isfinite(mean) else math.inf
