"""How far the blocks of a pruned model are from those of the dense one it was made from.

Both models walk through the same batches side by side, one block of each at a time. An error is
the mean over tokens of ||pruned - dense|| / ||dense||, the norms over the features of what leaves
the block. Token by token, because a few tokens have norms so large that they would hide the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wanda_ext.calibration import Batch
from wanda_ext.interrupt import step
from wanda_ext.models import BlockPair
from wanda_ext.runner import hidden_of, walking

RANKED_TOKENS = 2048  # that linears are measured on one by one: a run of their block for each


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

    pairs: from twins.pair_blocks. device: where one block of each at a time is taken to; default:
    where the models are. Linears are measured one by one on the first RANKED_TOKENS tokens.
    """
    found = []
    ours = [(pair.name, pair.module) for pair in pairs]
    theirs = [(pair.name, pair.dense) for pair in pairs]
    with (
        walking(model, ours, batches, device) as (pruned, visit),
        walking(dense, theirs, batches, device) as (before, visit_dense),
    ):
        for i, pair in enumerate(tqdm(pairs, "measuring", unit="block", disable=not progress)):
            inside = _Inside(pair, before.keep)
            with visit(i), visit_dense(i):
                with inside.watching():
                    before.advance(i)
                pruned.advance(i)
            pruned.settle()
            before.settle()
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
