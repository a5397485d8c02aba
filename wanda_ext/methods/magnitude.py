"""Magnitude: prune the smallest |weight|, the baseline that needs no calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wanda_ext.methods.wanda import prune_by_score_
from wanda_ext.sparsity import Sparsity, Unstructured


@dataclass(frozen=True)
class Magnitude:
    """S = |W|, compared within the whole matrix ("matrix", the paper's baseline) or each row.

    keep:group compares within groups, whatever the scope.
    """

    scope: str = "matrix"
    name = "magnitude"
    needs_inputs = False

    def __post_init__(self) -> None:
        if self.scope not in ("matrix", "row"):
            raise ValueError(f"Magnitude's scope is 'matrix' or 'row', not {self.scope!r}")

    def prune_(
        self,
        weight: torch.Tensor,
        sparsity: Sparsity,
        input_norm: torch.Tensor | None,
        bad: torch.Tensor,
    ) -> None:
        """Shapes: weight [n, k]; input_norm unused; bad [1] int32."""
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
    if n_prune:
        magnitude = weight.abs().flatten()
        threshold = magnitude.kthvalue(n_prune).values
        pruned = magnitude < threshold
        ties = (magnitude == threshold).nonzero().flatten()
        pruned[ties[: n_prune - int(pruned.count_nonzero())]] = True
        weight.masked_fill_(pruned.view_as(weight), 0.0)
    weight.add_(0.0)  # a kept -0.0 becomes +0.0, as in every op
