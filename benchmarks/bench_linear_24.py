"""linear_24 beside dense and beside torch's own 2:4, for all shapes and numbers of tokens.

    python benchmarks/bench_linear_24.py [--part 7b|13b|70b|8b|unfused|all | --shapes NxK,...]
                                         [--m 1,16,...] [--dtype bf16|fp16] [--seconds 0.2]
                                         [--out FILE | --lines] [--small]

Weights are normal, pruned by prune_nm_ with norms; activations are normal. In every cell: the
packed op alone, torch.mm (cuBLAS), cuSPARSELt with the fastest of all its algorithms, torch's own
CUTLASS path. Weights rotate through more than 256 MB, CUDA graphs hold 20 calls or more, entrants
take turns. Every y is compared with fp64 before it is timed; one that is wrong is recorded, and
left out. A part takes minutes; cells that the file holds already, of the same binary, GPU and
torch, stay. Writes benchmarks/results/linear_24_<dtype>.json after every shape. --lines: prints
every cell as a line of JSON instead. --own-choice: of cuSPARSELt's algorithms only the one it takes
by itself.

--small: tiny shapes on the CPU, to try the program out; writes only where --out says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import shapes
from goals import CUSPARSELT, DENSE, LINEAR_24
from gpu_harness import (
    ALLOWED,
    RIVALS_ALLOWED,
    GpuEntrant,
    WrongError,
    copies,
    fill_table,
    first_line,
    pristine,
    right_ones,
    time_cell,
)
from torch_24 import RELAXED, CuSparseLt, Cutlass, UnsupportedError, relative_error
from wanda_ext import ops
from wanda_ext.packed import dispatch

CHECKED_ROWS = 128  # against fp64 at each end of y
SMALL = ([(64, 64), (96, 32)], [1, 3, 8, 2048])

PACKED, CUTLASS = "wanda_ext", "torch CUTLASS"


class Weights:
    """Copies of one pruned weight, more than an L2 cache holds: dense, packed, and torch's own."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.k = n, k
        weight, norm = pristine(n, k, dtype, device)
        ops.prune_nm_(weight, norm, 2, 4)
        values, meta = ops.pack_24(weight)
        self.gpu = dispatch.gpu_of(device)
        self.order = dispatch.order_of(self.gpu.arch) if self.gpu else 0
        meta = ops.order_meta_24(meta, n, k, 0, self.order)
        bytes_each = values.nbytes + meta.nbytes
        self.count = copies(bytes_each, self.gpu is not None)
        self.dense, self.values, self.meta = (
            t.repeat(self.count, *[1] * t.dim()) for t in (weight, values, meta)
        )
        self.theirs: dict[str, CuSparseLt | Cutlass | str] = {}  # or why not
        for name, kind in ((CUSPARSELT, CuSparseLt), (CUTLASS, Cutlass)) if self.gpu else ():
            try:
                self.theirs[name] = kind(self.dense)
            except UnsupportedError as error:
                self.theirs[name] = str(error)

    def multiply(self, x: Tensor, i: int) -> Tensor:
        return torch.mm(x, self.dense[i].t())

    def multiply_packed(self, x: Tensor, i: int) -> Tensor:
        return ops.linear_24(x, self.values[i], self.meta[i], self.order)

    def exact(self, x: Tensor) -> Tensor:
        """y in fp64."""
        return x.double() @ self.dense[0].double().t()


def measure(w: Weights, m: int, seconds: float, own_choice: bool = False) -> dict[str, Any]:
    """One cell: every entrant checked, then those that are right timed."""
    device, dtype = w.dense.device, w.dense.dtype
    g = torch.Generator(device=device).manual_seed(m)
    x = torch.randn(m, w.k, device=device, generator=g).to(dtype)
    dense = w.multiply(x, 0)
    entrants = [
        GpuEntrant(DENSE, lambda i: w.multiply(x, i)),
        GpuEntrant(PACKED, lambda i: w.multiply_packed(x, i)),
    ]
    cell: dict[str, Any] = {"name": f"{w.n}x{w.k} m {m}", "n": w.n, "k": w.k, "m": m}
    for name, rival in w.theirs.items():
        try:
            if isinstance(rival, str):
                raise UnsupportedError(rival)
            entrants.append(_rival(name, rival, x, dense, own_choice, cell))
        except (UnsupportedError, RuntimeError) as error:
            cell[name] = f"unsupported: {first_line(error)}"
    cell |= {"relative_error": {}, "wrong": {}}
    entrants = right_ones(entrants, lambda e: _check(e, w, x, dense, cell), cell["wrong"])
    if w.gpu:
        kernel, splits = dispatch.choose(w.gpu, dispatch.name_of(dtype), w.n, w.k, m)
        cell["kernel"] = f"{kernel}/{splits}"
    time_cell(cell, entrants, w, PACKED, seconds)
    return cell


def _rival(
    name: str,
    rival: CuSparseLt | Cutlass,
    x: Tensor,
    dense: Tensor,
    own_choice: bool,
    cell: dict[str, Any],
) -> GpuEntrant:
    if isinstance(rival, Cutlass):
        rival.multiply(x, 0)
        return GpuEntrant(name, lambda i: rival.multiply(x, i))
    screening = rival.screen(x, dense, RIVALS_ALLOWED, own_choice)
    cell[name] = screening.record()
    return GpuEntrant(
        name,
        lambda i: rival.multiply(x, screening.fastest, i),
        screening.captured,
        mode=RELAXED,
    )


def _check(entrant: GpuEntrant, w: Weights, x: Tensor, dense: Tensor, cell: dict[str, Any]) -> None:
    """The first and the last rows against fp64; all rows against dense."""
    y: Any = entrant.run(w.count - 1)
    rows = torch.arange(x.shape[0], device=x.device)
    rows = rows[(rows < CHECKED_ROWS) | (rows >= x.shape[0] - CHECKED_ROWS)]
    error = relative_error(y[rows], w.exact(x[rows]))
    cell["relative_error"][entrant.name] = round(error, 7)
    allowed = ALLOWED[x.dtype] if entrant.name == PACKED else RIVALS_ALLOWED
    if not error <= allowed:  # NaN is not, either
        raise WrongError(f"{error} from fp64")
    apart = relative_error(y, dense)
    if not apart <= RIVALS_ALLOWED:
        raise WrongError(f"{apart} from dense")


def summary(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over the cells there are, beside the goals of the whole table."""
    cells = list(cells)
    expected = {(n, k, m) for p in shapes.PARTS.values() for n, k in p for m in shapes.TOKENS}
    result: dict[str, Any] = {}
    for name, (tokens, goals) in LINEAR_24.items():
        inside = [cell for cell in cells if cell["m"] in tokens]
        wanted = {key for key in expected if key[2] in tokens}
        there = {(cell["n"], cell["k"], cell["m"]) for cell in inside}
        result[name] = {"cells": len(inside), "all cells": wanted <= there}
        for rival, goal in goals.items():
            ratios = [cell["ratios"].get(f"{rival} / {PACKED}") for cell in inside]
            known = [ratio for ratio in ratios if ratio is not None]
            if known:
                mean = math.exp(sum(map(math.log, known)) / len(known))
                result[name][f"{rival} / {PACKED}"] = {
                    "geomean": round(mean, 4),
                    "lowest": min(known),
                    "cells": len(known),
                    "goal": goal,
                    "reached": mean >= goal,
                }
    return result


def main() -> None:
    own = {"own_choice": "of cuSPARSELt's algorithms only the one it takes by itself"}
    fill_table("linear_24", __doc__ or "", SMALL, Weights, measure, summary, own)


if __name__ == "__main__":
    main()
