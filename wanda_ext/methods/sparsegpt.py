"""SparseGPT: prunes column by column and lets the columns that follow make up for what went.

With H = sum of x x^T over the inputs, what a row w loses in its output, sum of (dw x)^2, is
dw H dw^T. If column j goes and only later ones may answer, the loss is least for

    dw = -w_j / U[j, j] * U[j, j:],   at a cost of (w_j / U[j, j])^2

where U, upper triangular, is the Cholesky factor of the inverse Hessian, H^-1 = U^T U (Frantar &
Alistarh 2023, arXiv:2301.00774, section 3). H's scale does not matter: the sum stands for the mean.
Columns go in blocks: within a block one after the other, then the block's errors reach all later
columns in one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from wanda_ext.interrupt import step
from wanda_ext.methods.magnitude import lowest
from wanda_ext.methods.sparsity import NM, Sparsity, Unstructured
from wanda_ext.methods.statistic import InputStatistic, Reads, full_precision


@dataclass(frozen=True)
class SparseGPT:
    """S = (w / U[j, j])^2, compared within n rows by `blocksize` columns, or within each group.

    Unstructured: int(n * blocksize * ratio) weights of each such block go, of equal scores those of
    the lower column first, then of the lower row; rows differ in their sparsity. keep:group: each
    group is decided at its first column, of equal scores the lower column goes first; blocks are
    cut to whole groups. Weights are updated in fp32; U is computed in fp64, once for all linears
    that share their inputs. A feature that is always 0 loses all its weights.

    percdamp: what is added to H's diagonal, as a share of its mean.
    """

    blocksize: int = 128
    percdamp: float = 0.01
    name: ClassVar[str] = "sparsegpt"
    reads: ClassVar[Reads] = "gram"
    kernels: ClassVar[tuple[str, ...]] = ()
    _factors: WeakTensorKeyDictionary = field(
        default_factory=WeakTensorKeyDictionary, init=False, repr=False, compare=False
    )  # of the grams that still live

    def __post_init__(self) -> None:
        if self.blocksize < 1 or not 0 <= self.percdamp < math.inf:
            raise ValueError(
                f"SparseGPT needs blocksize >= 1 and percdamp >= 0; got blocksize="
                f"{self.blocksize}, percdamp={self.percdamp}. The paper uses 128 and 0.01"
            )

    def check(self, name: str, sparsity: Sparsity) -> None:
        """Any will do."""

    def prune_(
        self,
        weight: Tensor,
        sparsity: Sparsity,
        inputs: InputStatistic | None,
        bad: Tensor,
    ) -> None:
        """Shapes: weight [n, k]; bad [1] int32."""
        if inputs is None or inputs.gram is None:
            raise TypeError("SparseGPT needs the inputs' gram matrix: none was collected")
        if not isinstance(sparsity, (NM, Unstructured)):
            raise TypeError(f"no rule for a sparsity of type {type(sparsity).__name__}")
        gram = inputs.gram.to(weight.device)
        if inputs.gram not in self._factors:
            self._factors[inputs.gram] = inverse_factor(gram, self.percdamp)
        factor = self._factors[inputs.gram].to(weight.device)
        columns = torch.empty(weight.shape[::-1], device=weight.device).copy_(weight.t())
        columns[gram.diagonal() == 0] = 0.0
        with full_precision():
            _prune_columns_(columns, factor, sparsity, self.blocksize)
        pruned = columns.t().to(weight.dtype)
        finite = weight.isfinite().all(dim=1) & pruned.isfinite().all(dim=1)
        bad_rows = (~finite).nonzero().flatten()
        if len(bad_rows):
            bad.copy_(bad_rows[:1])
            return
        bad.fill_(-1)
        weight.copy_(pruned).add_(0.0)  # a kept -0.0 becomes +0.0, as in every op


def inverse_factor(gram: Tensor, percdamp: float) -> Tensor:
    """U, upper triangular with a positive diagonal: (gram + damping)^-1 = U^T U.

    With R the reversal of rows and columns and R(H) = L L^T, U is R(L^-1): one factorisation, and
    no inverse of H itself. Raises ValueError where H is not positive definite.

    Shapes: gram [k, k] float32 -> [k, k] float32.
    """
    hessian = gram.flip(0, 1).double()
    diagonal = hessian.diagonal()
    damping = percdamp * diagonal.mean()
    diagonal[diagonal == 0] = 1.0  # such a feature meets no other, so any number will do
    diagonal += damping
    lower, info = torch.linalg.cholesky_ex(hessian)
    del hessian, diagonal
    unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
    factor: Tensor = inverse.flip(0, 1).float()
    if int(info) or not factor.isfinite().all():
        raise ValueError(
            f"the Hessian of its inputs, with percdamp={percdamp} of its mean diagonal added, is "
            "not positive definite: pass a larger percdamp, such as SparseGPT(percdamp=0.1), or "
            "more calibration data"
        )
    return factor


def _prune_columns_(
    columns: Tensor, factor: Tensor, sparsity: NM | Unstructured, blocksize: int
) -> None:
    """Shapes: columns [k, n] float32, a weight's columns as rows; factor [k, k] float32."""
    group = sparsity.group if isinstance(sparsity, NM) else 1
    width = max(blocksize // group, 1) * group
    for start in range(0, len(columns), width):
        step()
        end = min(start + width, len(columns))
        block, within = columns[start:end], factor[start:end, start:end]
        scale = within.diagonal()[:, None]
        if isinstance(sparsity, Unstructured):
            pruned = lowest(block.abs() / scale, sparsity.n_prune(block.numel()))
        else:
            pruned = torch.zeros_like(block, dtype=torch.bool)
        errors = torch.empty_like(block)
        for j, column in enumerate(block):
            if isinstance(sparsity, NM) and j % group == 0:
                ahead = slice(j, j + group)
                order = (block[ahead].abs() / scale[ahead]).argsort(dim=0, stable=True)
                pruned[ahead].scatter_(0, order[: group - sparsity.keep], True)
            errors[j] = torch.where(pruned[j], column / within[j, j], 0.0)
            block[j + 1 :].addr_(within[j, j + 1 :], errors[j], alpha=-1)
            column.masked_fill_(pruned[j], 0.0)
        columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
