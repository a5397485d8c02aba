"""Pruning methods: how the weights that go are chosen. One file a method, one line in the table."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from wanda_ext.methods.magnitude import Magnitude
from wanda_ext.methods.wanda import Wanda
from wanda_ext.sparsity import Sparsity

__all__ = ["METHODS", "Magnitude", "Method", "Wanda", "get_method"]


@runtime_checkable
class Method(Protocol):
    """What prune_model needs of a method."""

    name: str
    needs_inputs: bool  # whether prune_ wants input_norm, and so calibration data

    def prune_(
        self,
        weight: torch.Tensor,
        sparsity: Sparsity,
        input_norm: torch.Tensor | None,
        bad: torch.Tensor,
    ) -> None:
        """Zeroes the chosen weights in place.

        `bad` receives the lowest row that holds a NaN or infinite score, or -1; the engine then
        refuses the block.

        Shapes: weight [n, k], unit column stride; input_norm [k] float32; bad [1] int32.
        """


METHODS: dict[str, type[Method]] = {"wanda": Wanda, "magnitude": Magnitude}


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
