"""torch's own ways to multiply by a 2:4 weight: cuSPARSELt, with every algorithm, and CUTLASS.

Padding and transposes that they need for y[m, n] = x[m, k] @ W[n, k].T are part of what is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_harness import capture, first_line, milliseconds

M_MULTIPLE = 8  # of the tokens that both take
SCREENED_CALLS = 5  # at least
RELAXED = "relaxed"  # cuSPARSELt may allocate while a graph captures it


class UnsupportedError(Exception):
    """This device or this torch cannot do it; the text says why."""


@dataclass(frozen=True)
class Algorithm:
    """How cuSPARSELt is asked to multiply."""

    alg_id: int
    split_k: int
    split_k_mode: int
    transposed: bool  # whether it writes y [m, n] itself, or its transpose, which torch copies


@dataclass(frozen=True)
class Screening:
    """What became of every algorithm for one x; `captured`: whether CUDA graphs took them."""

    fastest: Algorithm
    captured: bool
    timed: int
    refused: int
    wrong: int

    def record(self) -> dict[str, Any]:
        return asdict(self)


class CuSparseLt:
    """Copies of a weight [copies, n, k] in cuSPARSELt's form."""

    def __init__(self, weights: Tensor) -> None:
        if not torch.backends.cusparselt.is_available():
            raise UnsupportedError("torch was built without cuSPARSELt, or does not find it")
        try:
            self.packed = [torch._cslt_compress(weight) for weight in weights]
        except RuntimeError as error:
            raise UnsupportedError(first_line(error)) from error

    def multiply(self, x: Tensor, by: Algorithm, i: int) -> Tensor:
        y = torch._cslt_sparse_mm(
            self.packed[i],
            padded(x).t(),
            transpose_result=by.transposed,
            alg_id=by.alg_id,
            split_k=by.split_k,
            split_k_mode=by.split_k_mode,
        )
        return (y if by.transposed else y.t().contiguous())[: x.shape[0]]

    def screen(
        self, x: Tensor, expected: Tensor, allowed: float, own_choice: bool = False
    ) -> Screening:
        """Times every algorithm for this x and takes the fastest of those whose y is right.

        own_choice: only those that it chooses itself, one for each layout of y.
        """
        algorithms = list(dict.fromkeys(self._algorithms(x, own_choice)))
        captured = self._can_be_captured(x, algorithms[0])
        times: dict[Algorithm, float] = {}
        refused = wrong = 0
        for algorithm in algorithms:
            try:
                if relative_error(self.multiply(x, algorithm, 0), expected) <= allowed:
                    times[algorithm] = self._quick(x, algorithm, captured)
                else:
                    wrong += 1
            except RuntimeError:
                refused += 1
        if not times:
            raise UnsupportedError(f"of its algorithms {refused} refuse and {wrong} are wrong")
        fastest = min(times, key=lambda algorithm: times[algorithm])
        return Screening(fastest, captured, len(times), refused, wrong)

    def _algorithms(self, x: Tensor, own_choice: bool) -> Iterator[Algorithm]:
        """Its own choice, then, if asked for, every id with k whole; for both layouts of y."""
        for transposed in (True, False):
            try:
                alg_id, split_k, split_k_mode, most = torch._C._cusparselt.mm_search(
                    self.packed[0], padded(x).t(), None, None, None, transposed
                )
            except (AttributeError, RuntimeError) as error:
                raise UnsupportedError(first_line(error)) from error
            yield Algorithm(alg_id, split_k, split_k_mode, transposed)
            for i in range(0 if own_choice else most + 1):
                yield Algorithm(i, 1, -1, transposed)

    def _can_be_captured(self, x: Tensor, algorithm: Algorithm) -> bool:
        try:
            self._quick(x, algorithm, True)
        except RuntimeError:
            return False
        return True

    def _quick(self, x: Tensor, algorithm: Algorithm, captured: bool) -> float:
        calls = max(SCREENED_CALLS, len(self.packed))

        def run(i: int) -> Tensor:
            return self.multiply(x, algorithm, i)

        if captured:
            graph = capture(run, len(self.packed), calls, RELAXED)
            return min(milliseconds(graph.replay) for _ in range(3))
        return min(milliseconds(lambda: [run(0) for _ in range(calls)]) for _ in range(3))


class Cutlass:
    """Copies of a weight [copies, n, k] as torch's semi-structured tensors on CUTLASS."""

    def __init__(self, weights: Tensor) -> None:
        kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is a prototype, says torch
                small = kind.from_dense(weights[0, :128, :128].contiguous())
                torch.nn.functional.linear(weights[0, :M_MULTIPLE, :128].contiguous(), small)
                self.packed = [kind.from_dense(weight) for weight in weights]
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedError(first_line(error)) from error

    def multiply(self, x: Tensor, i: int) -> Tensor:
        y: Tensor = torch.nn.functional.linear(x, self.packed[i])
        return y


def padded(x: Tensor) -> Tensor:
    """x with its rows filled up to a multiple of M_MULTIPLE."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % M_MULTIPLE))


def relative_error(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected|, in the precision of `expected` or of float32."""
    error = size = 0.0
    for part, exact in zip(y.split(1024), expected.split(1024), strict=True):
        wide = exact if exact.dtype == torch.float64 else exact.float()
        error += float((part.to(wide.dtype) - wide).square().sum())
        size += float(wide.square().sum())
    return (error / size) ** 0.5
