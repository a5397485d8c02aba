"""Magnitude: prune the smallest |weight|, the baseline that needs no calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wanda_ext.methods.sparsity import Sparsity, Unstructured
from wanda_ext.methods.statistic import InputStatistic, Reads
from wanda_ext.methods.wanda import PRUNING_OPS, prune_by_score_


@dataclass(frozen=True)
class Magnitude:
    """S = |W|, compared within the whole matrix ("matrix", the paper's baseline) or each row.

    keep:group compares within groups, whatever the scope.
    """

    scope: str = "matrix"
    name: ClassVar[str] = "magnitude"
    reads: ClassVar[Reads] = "nothing"
    kernels: ClassVar[tuple[str, ...]] = PRUNING_OPS

    def __post_init__(self) -> None:
        if self.scope not in ("matrix", "row"):
            raise ValueError(f"Magnitude's scope is 'matrix' or 'row', not {self.scope!r}")

    def check(self, name: str, sparsity: Sparsity) -> None:
        """Any will do."""

    def prune_(
        self,
        weight: torch.Tensor,
        sparsity: Sparsity,
        inputs: InputStatistic | None,
        bad: torch.Tensor,
    ) -> None:
        """Shapes: weight [n, k]; inputs unused; bad [1] int32."""
        if self.scope == "matrix" and isinstance(sparsity, Unstructured):
            _prune_matrix_(weight, sparsity.n_prune(weight.numel()), bad)
        else:
            prune_by_score_(weight, sparsity, None, bad)


def _prune_matrix_(weight: torch.Tensor, n_prune: int, bad: torch.Tensor) -> None:
    """Zeroes exactly n_prune entries: the smallest, and of equal ones the first in row order.

    A matrix with a NaN or infinity is left unchanged and its first such row goes into `bad`.

    Shapes: weight [n, k]; bad [1] int32.
    """
    bad_rows = (~weight.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad_rows):
        bad.copy_(bad_rows[:1])
        return
    bad.fill_(-1)
    weight.masked_fill_(lowest(weight.abs(), n_prune), 0.0)
    weight.add_(0.0)  # a kept -0.0 becomes +0.0, as in every op


def lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` lowest scores of a matrix are; of equal ones the first in row order.

    Shapes: score [rows, columns], no NaN -> bool [rows, columns].
    """
    flat = score.flatten()
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    found = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    found[ties[: count - int(found.count_nonzero())]] = True
    return found.view_as(score)
