"""The original SparseGPT in plain PyTorch: what wanda_ext is compared with.

Written from the paper (arXiv:2301.00774) and the behaviour of its authors' code, independent of the
package: H by add_batch, three factorisations in fp32, columns pruned one by one. Kept
straightforward, not fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Hessian:
    """2 / nsamples times the sum of x x^T over all tokens, kept batch by batch."""

    def __init__(self, columns: int) -> None:
        self.matrix = torch.zeros(columns, columns)
        self.nsamples = 0

    def add_batch(self, inp: Tensor, keep: Tensor | None = None) -> None:
        """inp [batch, tokens, k] or [tokens, k]; keep [tokens] bool drops padding."""
        added = inp.shape[0] if inp.dim() == 3 else 1
        inp = inp.reshape(-1, inp.shape[-1])
        inp = (inp if keep is None else inp[keep]).t().float()
        self.matrix *= self.nsamples / (self.nsamples + added)
        self.nsamples += added
        inp = inp * (2 / self.nsamples) ** 0.5
        self.matrix += inp @ inp.t()


def prune_sparsegpt_(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | tuple[int, int],
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> None:
    """Column by column, each one's error answered by the columns behind it; all in fp32.

    int(numel * ratio) weights of each block of columns go; the authors' comparison with a sorted
    score takes one more.
    """
    dense, hessian = weight.float(), hessian.clone()
    rows, columns = dense.shape
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    dense[:, dead] = 0
    hessian += percdamp * torch.mean(torch.diag(hessian)) * torch.eye(columns)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, columns, blocksize):
        last = min(first + blocksize, columns)
        mask = torch.zeros(rows, last - first) == 1
        if not isinstance(sparsity, tuple):
            score = dense[:, first:last] ** 2 / torch.diag(inverse)[first:last] ** 2
            count = int(score.numel() * sparsity)
            if count:
                mask = score <= torch.sort(score.flatten())[0][count - 1]
        errors = torch.zeros(rows, last - first)
        for column in range(first, last):
            if isinstance(sparsity, tuple) and column % sparsity[1] == 0:
                keep, group = sparsity
                ahead = slice(column, column + group)
                score = dense[:, ahead] ** 2 / torch.diag(inverse)[ahead] ** 2
                lowest = torch.topk(score, group - keep, dim=1, largest=False)[1]
                mask.scatter_(1, column - first + lowest, True)
            old = dense[:, column].clone()
            new = old.masked_fill(mask[:, column - first], 0)
            error = (old - new) / inverse[column, column]
            dense[:, column:last] -= error.outer(inverse[column, column:last])
            dense[:, column] = new
            errors[:, column - first] = error
        dense[:, last:] -= errors @ inverse[first:last, last:]
    weight.copy_(dense)
