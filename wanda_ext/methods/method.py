"""What prune_model needs of a method."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from wanda_ext.methods.sparsity import Sparsity
from wanda_ext.methods.statistic import InputStatistic, Reads


@runtime_checkable
class Method(Protocol):
    """One way to choose the weights of a linear that go."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def reads(self) -> Reads:
        """What it wants to know of the inputs; more than "nothing" takes calibration data."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """The ops that it calls: a weight on a device that lacks one of them visits the CPU."""

    def check(self, name: str, sparsity: Sparsity) -> None:
        """Raises ValueError, naming the linear, for a sparsity that it cannot prune to."""

    def prune_(
        self,
        weight: torch.Tensor,
        sparsity: Sparsity,
        inputs: InputStatistic | None,
        bad: torch.Tensor,
    ) -> None:
        """Zeroes the chosen weights in place; may change the others to make up for them.

        inputs has what `reads` says and may lie on another device; None where that is "nothing".
        `bad` receives the lowest row that holds a NaN or infinite score, or -1; the engine then
        refuses the block. A ValueError needs not name the linear: the engine does.

        Shapes: weight [n, k], unit column stride; bad [1] int32.
        """
