"""Wanda: prune by |weight| * norm of its input, row by row (arXiv:2306.11695, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wanda_ext import ops
from wanda_ext.sparsity import NM, Sparsity, Unstructured


@dataclass(frozen=True)
class Wanda:
    """S = |W| * input_norm, compared within each row, or within each group of keep:group."""

    name = "wanda"
    needs_inputs = True

    def prune_(
        self,
        weight: torch.Tensor,
        sparsity: Sparsity,
        input_norm: torch.Tensor | None,
        bad: torch.Tensor,
    ) -> None:
        """Shapes: weight [n, k]; input_norm [k] float32; bad [1] int32."""
        if input_norm is None:
            raise TypeError("Wanda scores weights by the norms of their inputs: input_norm is None")
        prune_by_score_(weight, sparsity, input_norm, bad)


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
