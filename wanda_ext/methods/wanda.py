"""Wanda: prune by |weight| * norm of its input, row by row (arXiv:2306.11695, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wanda_ext import ops
from wanda_ext.methods.sparsity import NM, Sparsity, Unstructured
from wanda_ext.methods.statistic import InputStatistic, Reads

PRUNING_OPS = ("prune_rows_", "prune_nm_")
FIRST_ALPHA, MOST_ALPHA = 0.4, 0.8  # the variant's search, and when it ends, as in the original
TOLERANCE = 0.001


@dataclass(frozen=True)
class Wanda:
    """S = |W| * input_norm, compared within each row, or within each group of keep:group.

    variant: each row loses its lowest scores as long as they sum to at most alpha times the row's
    sum; one alpha for the matrix is sought by bisection, until its sparsity is within 0.001 of what
    was asked (the paper's appendix on weight updates and pruning configurations). Rows differ in
    their sparsity then. For unstructured sparsity only.
    """

    variant: bool = False
    reads: ClassVar[Reads] = "norm"
    kernels: ClassVar[tuple[str, ...]] = PRUNING_OPS

    @property
    def name(self) -> str:
        return "wanda-variant" if self.variant else "wanda"

    def check(self, name: str, sparsity: Sparsity) -> None:
        """Raises ValueError for keep:group with `variant`."""
        if self.variant and isinstance(sparsity, NM):
            raise ValueError(
                f"{name} becomes {sparsity}, and Wanda(variant=True) prunes rows by a share of "
                "their scores, not groups: pass a ratio such as 0.5, or method='wanda'"
            )

    def prune_(
        self,
        weight: torch.Tensor,
        sparsity: Sparsity,
        inputs: InputStatistic | None,
        bad: torch.Tensor,
    ) -> None:
        """Shapes: weight [n, k]; bad [1] int32."""
        if inputs is None:
            raise TypeError("Wanda scores weights by the norms of their inputs: inputs is None")
        norm = inputs.norm.to(weight.device)
        if self.variant and isinstance(sparsity, Unstructured):
            _prune_by_share_(weight, sparsity.ratio, norm, bad)
        else:
            prune_by_score_(weight, sparsity, norm, bad)


def prune_by_score_(
    weight: torch.Tensor, sparsity: Sparsity, input_norm: torch.Tensor | None, bad: torch.Tensor
) -> None:
    """Zeroes the lowest |W| * input_norm (None: |W|) of each row or group, in place.

    Shapes: weight [n, k]; input_norm [k] float32; bad [1] int32.
    """
    if isinstance(sparsity, NM):
        ops.prune_nm_(weight, input_norm, sparsity.keep, sparsity.group, bad)
    elif isinstance(sparsity, Unstructured):
        ops.prune_rows_(weight, input_norm, sparsity.n_prune(weight.shape[1]), bad)
    else:
        raise TypeError(f"no rule for a sparsity of type {type(sparsity).__name__}")


def _prune_by_share_(
    weight: torch.Tensor, ratio: float, input_norm: torch.Tensor, bad: torch.Tensor
) -> None:
    """Zeroes the lowest |W| * input_norm of each row that sum to at most alpha times the row's sum.

    Of equal scores all go, or none. A matrix with a NaN or infinite score is left unchanged and its
    first such row goes into `bad`. Raises ValueError where no alpha in reach gives the ratio.

    Shapes: weight [n, k]; input_norm [k] float32; bad [1] int32.
    """
    score = weight.abs().float() * input_norm
    bad_rows = (~score.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad_rows):
        bad.copy_(bad_rows[:1])
        return
    bad.fill_(-1)
    ordered = score.sort(dim=1).values
    summed = ordered.cumsum(dim=1, dtype=torch.float64)

    def pruned_at(alpha: float) -> torch.Tensor:
        count = torch.searchsorted(summed, alpha * summed[:, -1:], right=True)
        highest = ordered.gather(1, (count - 1).clamp_(min=0))
        return (score <= highest) & (count > 0)  # where the lowest is too much, none goes

    low, alpha, high = 0.0, FIRST_ALPHA, MOST_ALPHA
    while True:
        pruned = pruned_at(alpha)
        reached = int(pruned.count_nonzero()) / pruned.numel()
        if abs(reached - ratio) <= TOLERANCE or high - low < TOLERANCE:
            break
        if reached > ratio:
            high, alpha = alpha, (alpha + low) / 2
        else:
            low, alpha = alpha, (alpha + high) / 2
    if abs(reached - ratio) > TOLERANCE and (low == 0 or high == MOST_ALPHA):
        raise ValueError(
            f"Wanda's variant, with alpha within (0, {MOST_ALPHA}), comes no nearer than "
            f"{reached:.1%} to a sparsity of {ratio:.1%} here: ask for another, or pass "
            "method='wanda'"
        )
    weight.masked_fill_(pruned, 0.0)
    weight.add_(0.0)  # a kept -0.0 becomes +0.0, as in every op
