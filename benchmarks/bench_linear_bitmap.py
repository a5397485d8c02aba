"""linear_bitmap beside dense and beside linear_24, for all shapes and numbers of tokens.

    python benchmarks/bench_linear_bitmap.py [--part 7b|13b|70b|8b|unfused|all | --shapes NxK,...]
                           [--m 1,8,...] [--dtype bf16|fp16] [--seconds 0.2]
                           [--out FILE | --lines] [--small]

Weights are normal, pruned by prune_nm_ with norms: 16:32 for the bitmap and for dense, 2:4 of the
same weight for linear_24; "exact 50 %" is the bitmap of a per-row mask with its surplus.
Activations are normal. Weights rotate through more than 256 MB, CUDA graphs hold 20 calls or more,
entrants take turns. Every y is compared with fp64 before it is timed; one that is wrong is
recorded, and left out. Cells that the file holds already, of the same binary, GPU and torch, stay.
After every shape it writes benchmarks/results/linear_bitmap_<dtype>.json, or with --lines prints
every cell as a line of JSON instead; its summary says whether m 1 to 8 reach 1.3 times torch.mm on
the shapes that decide.

--small: tiny shapes on the CPU, to try the program out; writes only where --out says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import shapes
from goals import BITMAP_TOKENS, DENSE, LEAST_BITMAP_RATIO
from gpu_harness import (
    ALLOWED,
    RIVALS_ALLOWED,
    GpuEntrant,
    WrongError,
    copies,
    fill_table,
    pristine,
    right_ones,
    time_cell,
)
from torch_24 import relative_error
from wanda_ext import ops
from wanda_ext.packed import dispatch
from wanda_ext.packed.bitmap import surplus_of

SMALL = ([(64, 64), (96, 160)], [1, 3, 8, 20])

BITMAP, EXACT, PACKED_24 = "linear_bitmap", "exact 50 %", "linear_24"
DECIDING = [(22016, 4096), (4096, 11008), (57344, 8192), (28672, 4096)]
FEW = {m for m in shapes.TOKENS if m in BITMAP_TOKENS}
GOAL = 1.5  # of torch.mm / linear_bitmap, for these


class Weights:
    """Copies of one weight in each form, more than an L2 cache holds."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.k = n, k
        weight, norm = pristine(n, k, dtype, device)
        balanced, two_four, exact = weight.clone(), weight.clone(), weight
        ops.prune_nm_(balanced, norm, 16, 32)
        ops.prune_nm_(two_four, norm, 2, 4)
        ops.prune_rows_(exact, norm, k // 2)
        values_24, meta = ops.pack_24(two_four)
        self.gpu = dispatch.gpu_of(device)
        self.order = dispatch.order_of(self.gpu.arch) if self.gpu else 0
        meta = ops.order_meta_24(meta, n, k, 0, self.order)
        forms: dict[str, tuple[Tensor, ...]] = {
            DENSE: (balanced,),
            BITMAP: ops.pack_bitmap(balanced),
            EXACT: (*ops.pack_bitmap(exact), *surplus_of(exact)),
            PACKED_24: (values_24, meta),
        }
        self.bytes = {name: sum(t.nbytes for t in form) for name, form in forms.items()}
        self.count = copies(self.bytes[BITMAP], self.gpu is not None)
        self.forms = {
            name: [tuple(t.clone() for t in form) for _ in range(self.count)]
            for name, form in forms.items()
        }
        self.plain = {DENSE: balanced, BITMAP: balanced, EXACT: exact, PACKED_24: two_four}

    def runs(self, x: Tensor) -> dict[str, Callable[[int], Tensor]]:
        forms = self.forms

        def bitmap(name: str) -> Callable[[int], Tensor]:
            def run(i: int) -> Tensor:
                values, mask, *surplus = forms[name][i]
                return ops.linear_bitmap(x, values, mask, self.n, None, *surplus)

            return run

        def packed_24(i: int) -> Tensor:
            values, meta = forms[PACKED_24][i]
            return ops.linear_24(x, values, meta, self.order)

        return {
            DENSE: lambda i: torch.mm(x, forms[DENSE][i][0].t()),
            BITMAP: bitmap(BITMAP),
            EXACT: bitmap(EXACT),
            PACKED_24: packed_24,
        }


def measure(w: Weights, m: int, seconds: float) -> dict[str, Any]:
    """One cell: every entrant checked, then timed."""
    x = torch.randn(m, w.k, generator=torch.Generator().manual_seed(m))
    some = w.plain[DENSE]
    x = x.to(some.device, some.dtype)
    cell: dict[str, Any] = {"name": f"{w.n}x{w.k} m {m}", "n": w.n, "k": w.k, "m": m}
    cell["bytes_of_dense"] = {
        name: round(size / w.bytes[DENSE], 4) for name, size in w.bytes.items()
    }
    cell |= {"relative_error": {}, "wrong": {}}

    def check(entrant: GpuEntrant) -> None:
        y: Any = entrant.run(w.count - 1)
        error = relative_error(y, x.double() @ w.plain[entrant.name].double().t())
        cell["relative_error"][entrant.name] = round(error, 7)
        allowed = RIVALS_ALLOWED if entrant.name == DENSE else ALLOWED[x.dtype]
        if not error <= allowed:  # NaN is not, either
            raise WrongError(f"{error} from fp64")

    entrants = [GpuEntrant(name, run) for name, run in w.runs(x).items()]
    time_cell(cell, right_ones(entrants, check, cell["wrong"]), w, BITMAP, seconds)
    return cell


def summary(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The lowest ratio over m 1 to 8 of each shape that decides, if all of these were measured."""
    result: dict[str, Any] = {"least": LEAST_BITMAP_RATIO, "goal": GOAL}
    cells = list(cells)
    for n, k in DECIDING:
        of_shape = [c for c in cells if (c["n"], c["k"]) == (n, k) and c["m"] in BITMAP_TOKENS]
        found_ratios = [cell["ratios"].get(f"{DENSE} / {BITMAP}") for cell in of_shape]
        ratios = [ratio for ratio in found_ratios if ratio is not None]
        lowest = min(ratios, default=None)
        measured = {cell["m"] for cell in of_shape}
        reached = lowest >= LEAST_BITMAP_RATIO if measured >= FEW and lowest is not None else None
        goal = lowest >= GOAL if reached is not None and lowest is not None else None
        found = {"cells": len(ratios), "lowest": lowest, "reached": reached, "goal reached": goal}
        result[f"{n}x{k}"] = found
    return result


def main() -> None:
    fill_table("linear_bitmap", __doc__ or "", SMALL, Weights, measure, summary)


if __name__ == "__main__":
    main()
