"""What methods know of a linear's inputs: sums over the tokens of its calibration data.

A method names what it reads ("nothing", "norm" or "gram"); more is not collected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

TOKENS_AT_ONCE = 4096  # of a product, so that their fp32 copies take little memory
GRAM_ROWS = 256  # of a gram matrix at once, from its diagonal on: the other half is the same

Reads = Literal["nothing", "norm", "gram"]


@dataclass(frozen=True, eq=False)
class InputStatistic:
    """Linears that read one tensor share one statistic, so it never changes.

    sumsq [k] float64: the sum of squares of each input feature over `tokens` tokens. gram [k, k]
    float32: the sum of x x^T over the same tokens, or None where the method does not read it. With
    of_layer both are of all experts together, because this one saw too few tokens: sumsq cut to its
    share, gram whole. drift [k, k] float32: the sum of (x0 - x) x^T, where x0 is the input of the
    same linear in the dense model for the same token; None where it is not known.
    """

    sumsq: Tensor
    tokens: int
    of_layer: bool = False
    gram: Tensor | None = None
    drift: Tensor | None = None

    @property
    def norm(self) -> Tensor:
        """input_norm [k] float32."""
        return self.sumsq.sqrt().float()

    def to(self, device: torch.device | str) -> InputStatistic:
        """On that device; the same object where it lies there."""
        if self.sumsq.device == torch.device(device):
            return self
        gram = None if self.gram is None else self.gram.to(device)
        drift = None if self.drift is None else self.drift.to(device)
        return replace(self, sumsq=self.sumsq.to(device), gram=gram, drift=drift)

    def __add__(self, other: InputStatistic) -> InputStatistic:
        """Of the tokens of both."""
        gram, drift = _sum(self.gram, other.gram), _sum(self.drift, other.drift)
        sumsq, tokens = self.sumsq + other.sumsq, self.tokens + other.tokens
        return InputStatistic(sumsq, tokens, gram=gram, drift=drift)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


def gram_of(rows: Tensor) -> Tensor:
    """The sum of x x^T over the rows x: products and sums in fp32.

    Shapes: rows [tokens, k] fp32, bf16 or fp16 -> [k, k] float32.
    """
    gram = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
    with full_precision():
        for part in torch.split(rows, TOKENS_AT_ONCE):
            part = part.float()
            for start in range(0, len(gram), GRAM_ROWS):
                rest, now = part[:, start:], part[:, start : start + GRAM_ROWS]
                gram[start : start + GRAM_ROWS, start:].addmm_(now.t(), rest)
    for end in range(GRAM_ROWS, len(gram), GRAM_ROWS):
        upper = slice(end - GRAM_ROWS, end)
        gram[end:, upper] = gram[upper, end:].t()
    return gram


def drift_of(dense: Tensor, rows: Tensor) -> Tensor:
    """The sum of (x0 - x) x^T over the rows x0 of `dense` and x of `rows`, as in gram_of.

    Shapes: dense, rows [tokens, k] fp32, bf16 or fp16 -> [k, k] float32.
    """
    drift = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
    with full_precision():
        split = (torch.split(both, TOKENS_AT_ONCE) for both in (dense, rows))
        for was, now in zip(*split, strict=True):
            now = now.float()
            drift.addmm_((was.float() - now).t(), now)
    return drift


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products are of fp32 inside, whatever the caller allows elsewhere (TF32, bf16)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
