"""A pruned model and the dense one that it was made from, module by module side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from wanda_ext.models.blocks import Block, check_prunable, find_blocks
from wanda_ext.models.experts import layout_of


def twin_blocks(
    model: nn.Module, dense: nn.Module, blocks: str | nn.ModuleList | None = None
) -> list[tuple[Block, Block]]:
    """The blocks of both models. blocks: of the pruned one, as in prune_model.

    Raises ValueError or TypeError for a model that holds what cannot be pruned, packed linears
    among it, and ValueError for two that are not the same but for values and dtypes.
    """
    for role, whole in (("model", model), ("dense", dense)):
        try:
            check_prunable(whole)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{role}: {error}") from None
    ours, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (model, dense))
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            shapes = [str(list(of[name])) if name in of else "absent" for of in (ours, theirs)]
            raise ValueError(
                f"model and dense are not of one architecture: {name} is {shapes[0]} in model and "
                f"{shapes[1]} in dense; pass the model that this one was before the prune"
            )
    kinds = [{n: type(m).__name__ for n, m in one.named_modules()} for one in (model, dense)]
    for name in (*kinds[0], *kinds[1]):
        found = [of.get(name, "absent") for of in kinds]
        if found[0] != found[1]:
            raise ValueError(
                f"model and dense are not of one architecture: {name or 'the whole'} is "
                f"{found[0]} in model and {found[1]} in dense; pass the model that this one was "
                "before the prune"
            )
    ours_blocks = find_blocks(model, blocks)
    path = ours_blocks[0][0].rpartition(".")[0]
    return list(zip(ours_blocks, find_blocks(dense, path), strict=True))


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


def pair_blocks(model: nn.Module, dense: nn.Module, blocks: str | None = None) -> list[BlockPair]:
    """The blocks of both models, and what differs in them. Raises what twin_blocks raises, and
    ValueError where weights that differ are not of one dtype and device."""
    seen: set[int] = set()  # a weight that several modules share counts once
    pairs = []
    for (name, block), (_, twin) in twin_blocks(model, dense, blocks):
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
