"""How the weights that go are chosen: methods, sparsities, and what a method knows of its inputs.

A method is one file and one line in METHODS. It sees one weight and the sums over its inputs, and
nothing of the model around them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from wanda_ext.methods.magnitude import Magnitude
from wanda_ext.methods.sparsegpt import SparseGPT
from wanda_ext.methods.sparsity import (
    NM,
    Owl,
    Sparsity,
    SparsitySpec,
    Unstructured,
    as_globs,
    check_globs,
    matches,
    parse_sparsity,
    sparsity_for,
    spec_text,
)
from wanda_ext.methods.statistic import InputStatistic, Reads, gram_of
from wanda_ext.methods.wanda import Wanda

__all__ = [
    "METHODS",
    "NM",
    "InputStatistic",
    "Magnitude",
    "Method",
    "Owl",
    "Reads",
    "SparseGPT",
    "Sparsity",
    "SparsitySpec",
    "Unstructured",
    "Wanda",
    "as_globs",
    "check_globs",
    "get_method",
    "gram_of",
    "matches",
    "parse_sparsity",
    "sparsity_for",
    "spec_text",
]


@runtime_checkable
class Method(Protocol):
    """What prune_model needs of a method."""

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


METHODS: dict[str, Callable[[], Method]] = {
    "wanda": Wanda,
    "wanda-variant": partial(Wanda, variant=True),
    "magnitude": Magnitude,
    "sparsegpt": SparseGPT,
}


def get_method(method: str | Method) -> Method:
    """The method of that name with its default options, or the method itself.

    Raises ValueError (no such name) or TypeError (neither a name nor a method).
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"there is no method {method!r}: pass one of {', '.join(METHODS)}")
        return METHODS[method]()
    if isinstance(method, type) or not isinstance(method, Method):
        raise TypeError(
            f"method must be a name ({', '.join(METHODS)}) or a method object such as "
            f"Wanda(), not {method!r}"
        )
    return method
