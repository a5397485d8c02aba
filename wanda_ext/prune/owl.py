"""Outlier-weighted layer ratios: turns Owl sparsities into a ratio for every block.

Measures the dense model on the calibration data before any of it is pruned (Yin et al. 2023,
arXiv:2310.05175, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wanda_ext.interrupt import step
from wanda_ext.methods import InputStatistic, Owl, Unstructured
from wanda_ext.models import Linear, dense_weight, weight_of
from wanda_ext.prune.plan import PlannedBlock
from wanda_ext.runner import Walk

ROWS_AT_ONCE = 512  # of a weight, so that its scores take little memory


@dataclass(frozen=True)
class Outliers:
    """How many of the `weights` that a block prunes by one Owl are outliers."""

    outliers: int
    weights: int

    @property
    def share(self) -> float:
        return self.outliers / self.weights if self.weights else 0.0


def has_owl(plan: Iterable[PlannedBlock]) -> bool:
    """Whether resolve_owl has anything to do."""
    return any(isinstance(one.sparsity, Owl) for block in plan for one in block.targets.values())


def resolve_owl(
    plan: Sequence[PlannedBlock],
    walk: Walk,
    visit: Callable[[int], AbstractContextManager[None]],
) -> list[PlannedBlock]:
    """The plan with each Owl replaced by its block's Unstructured ratio; the model stays as it is.

    visit(i): has block i on its device inside. Raises ValueError where a ratio leaves [0, 1).
    """
    measured: dict[Owl, dict[int, Outliers]] = {}
    for i, block in enumerate(plan):
        with visit(i):
            for owl in {one.sparsity for one in block.targets.values()}:
                if isinstance(owl, Owl):
                    targets = {n: t.module for n, t in block.targets.items() if t.sparsity == owl}
                    found = walk.statistics(i, targets)
                    measured.setdefault(owl, {})[i] = count_outliers(targets, found, owl.m)
            if i + 1 < len(plan):
                walk.advance(i)
        step()
    ratios = {owl: _ratios(owl, blocks, plan) for owl, blocks in measured.items()}
    resolved = []
    for i, block in enumerate(plan):
        linears = {
            name: replace(one, sparsity=ratios[one.sparsity][i])
            if isinstance(one.sparsity, Owl)
            else one
            for name, one in block.linears.items()
        }
        resolved.append(replace(block, linears=linears))
    return resolved


@torch.no_grad()
def count_outliers(
    targets: Mapping[str, Linear], found: Mapping[str, InputStatistic], m: float
) -> Outliers:
    """The weights whose score is over m times the mean score of all these linears together."""

    def summed(of: Callable[[Tensor], Tensor]) -> float:
        total = 0.0
        for name, statistic in found.items():
            device = weight_of(targets[name]).device
            norm = statistic.norm.to(device)
            with dense_weight(targets[name], device) as weight:
                for rows in torch.split(weight, ROWS_AT_ONCE):
                    total += float(of(rows.abs().float() * norm))
        return total

    weights = sum(weight_of(targets[name]).numel() for name in found)
    mean = summed(lambda score: score.sum(dtype=torch.float64)) / max(weights, 1)
    return Outliers(int(summed(lambda score: (score > m * mean).sum())), weights)


def _ratios(
    owl: Owl, blocks: Mapping[int, Outliers], plan: Sequence[PlannedBlock]
) -> dict[int, Unstructured]:
    shares = [one.share for one in blocks.values()]
    low, span = min(shares), max(shares) - min(shares)
    more = {i: 2 * owl.lam * (one.share - low) / (span or 1) for i, one in blocks.items()}
    weights = sum(one.weights for one in blocks.values())
    mean = sum(more[i] * one.weights for i, one in blocks.items()) / max(weights, 1)
    ratios = {i: owl.ratio + mean - more[i] for i in blocks}
    for i, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise ValueError(
                f"{owl} would prune {ratio:.1%} of {plan[i].name}: pass a smaller lam (nothing is "
                "pruned yet)"
            )
    return {i: Unstructured(ratio) for i, ratio in ratios.items()}
