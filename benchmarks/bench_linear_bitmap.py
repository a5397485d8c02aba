"""linear_bitmap beside dense and beside linear_24, for all shapes and numbers of tokens.

    python benchmarks/bench_linear_bitmap.py [--part 7b|13b|70b|8b|unfused|all] [--m 1,8,...]
                           [--dtype bf16|fp16] [--seconds 0.2] [--out FILE] [--small]

Weights are normal, pruned by prune_nm_ with norms: 16:32 for the bitmap and for dense, 2:4 of the
same weight for linear_24; "exact 50 %" is the bitmap of a per-row mask with its surplus.
Activations are normal. Weights rotate through more than 256 MB, CUDA graphs hold 20 calls or more,
entrants take turns. Every y is compared with fp64 before it is timed. Cells that the file holds
already, of the same binary, GPU and torch, stay. After every shape it writes
benchmarks/results/linear_bitmap_<dtype>.json; its summary says whether m 1 to 8 reach 1.3 times
torch.mm on the shapes that decide.

--small: tiny shapes on the CPU, to try the program out; writes only where --out says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import harness
import shapes
from gpu_harness import GpuEntrant, buffer_count, device_state, resumed, store, time_gpu_case
from harness import Entrant, time_case
from torch_24 import relative_error
from wanda_ext import dispatch, ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALLOWED = {torch.bfloat16: 4e-3, torch.float16: 6e-4}  # |y - fp64| / |fp64|
ROTATED_BYTES = 1 << 28
LEAST_CALLS = 20  # of a graph
SMALL = ([(64, 64), (96, 160)], [1, 3, 8, 20])

DENSE, BITMAP, EXACT, PACKED_24 = "torch.mm", "linear_bitmap", "exact 50 %", "linear_24"
DECIDING = [(22016, 4096), (4096, 11008), (57344, 8192), (28672, 4096)]
LEAST_RATIO, GOAL = 1.3, 1.5  # of torch.mm / linear_bitmap, for 1 to 8 tokens


def with_room(weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """What the records of a weight have room for, and its surplus: rows, columns, values."""
    body = ops.unpack_bitmap(*ops.pack_bitmap(weight), *weight.shape)
    rest = torch.where(body == 0, weight, 0)
    row, column = rest.nonzero(as_tuple=True)
    rows = torch.zeros(weight.shape[0] + 1, dtype=torch.int32, device=weight.device)
    rows[1:] = rest.count_nonzero(1).cumsum(0)
    return body, (rows, column.int(), rest[row, column])


class Weights:
    """Copies of one weight in each form, more than an L2 cache holds."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.k = n, k
        g = torch.Generator(device=device).manual_seed(0)
        weight = torch.randn(n, k, device=device, generator=g).to(dtype)
        norm = torch.randn(k, device=device, generator=g).abs()
        balanced, two_four, exact = weight.clone(), weight.clone(), weight
        ops.prune_nm_(balanced, norm, 16, 32)
        ops.prune_nm_(two_four, norm, 2, 4)
        ops.prune_rows_(exact, norm, k // 2)
        body, surplus = with_room(exact)
        values_24, meta = ops.pack_24(two_four)
        self.gpu = dispatch.gpu_of(device)
        self.order = dispatch.order_of(self.gpu.arch) if self.gpu else 0
        meta = ops.order_meta_24(meta, n, k, 0, self.order)
        forms: dict[str, tuple[Tensor, ...]] = {
            DENSE: (balanced,),
            BITMAP: ops.pack_bitmap(balanced),
            EXACT: (*ops.pack_bitmap(body), *surplus),
            PACKED_24: (values_24, meta),
        }
        self.bytes = {name: sum(t.nbytes for t in form) for name, form in forms.items()}
        least = self.bytes[BITMAP]
        self.count = buffer_count(least, ROTATED_BYTES, 1 << 20) if self.gpu else 2
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
    runs = w.runs(x)
    cell: dict[str, Any] = {"name": f"{w.n}x{w.k} m {m}", "n": w.n, "k": w.k, "m": m}
    cell["bytes_of_dense"] = {
        name: round(size / w.bytes[DENSE], 4) for name, size in w.bytes.items()
    }
    cell["relative_error"] = {}
    for name, run in runs.items():
        error = relative_error(run(w.count - 1), x.double() @ w.plain[name].double().t())
        assert error <= ALLOWED[x.dtype] or name == DENSE, f"{cell['name']}, {name}: {error}"
        cell["relative_error"][name] = round(error, 7)
    if w.gpu:
        entrants = [GpuEntrant(name, run) for name, run in runs.items()]
        calls = max(LEAST_CALLS, w.count)
        case = time_gpu_case(
            cell["name"], entrants, w.count, lambda: None, seconds=seconds, calls=calls
        )
    else:
        plain = [Entrant(name, partial(_first, run)) for name, run in runs.items()]
        case = time_case(cell["name"], plain, 5)
    cell["timings"] = case.timings
    ours = case.timings[BITMAP].median_ms
    cell["ratios"] = {
        f"{name} / {BITMAP}": round(timing.median_ms / ours, 4)
        for name, timing in case.timings.items()
        if name != BITMAP
    }
    return cell


def _first(run: Callable[[int], Tensor], _: object) -> Tensor:
    return run(0)


def summary(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The lowest ratio over m 1 to 8 of each shape that decides, if it was measured."""
    result: dict[str, Any] = {"least": LEAST_RATIO, "goal": GOAL}
    cells = list(cells)
    for n, k in DECIDING:
        ratios = [
            cell["ratios"][f"{DENSE} / {BITMAP}"]
            for cell in cells
            if (cell["n"], cell["k"]) == (n, k) and cell["m"] <= 8
        ]
        lowest = min(ratios, default=None)
        reached = None if lowest is None else lowest >= LEAST_RATIO
        result[f"{n}x{k}"] = {"cells": len(ratios), "lowest": lowest, "reached": reached}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=[*shapes.PARTS, "all"], default="all")
    parser.add_argument("--m", type=lambda text: [int(m) for m in text.split(",")])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=0.2, help="of every cell, at least")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.small else "cuda")
    parts = shapes.PARTS if args.part == "all" else {args.part: shapes.PARTS[args.part]}
    linears = [shape for part in parts.values() for shape in part]
    linears, tokens = SMALL if args.small else (linears, list(shapes.TOKENS))
    path = args.out or (
        None if args.small else harness.RESULTS / f"linear_bitmap_{args.dtype}.json"
    )
    results = resumed(path, {"device": [], "summary": {}, "cells": []})
    dispatch.use(device)
    results["device"].append(device_state())
    for n, k in linears:
        there = {(cell["n"], cell["k"], cell["m"]) for cell in results["cells"]}
        missing = [m for m in args.m or tokens if (n, k, m) not in there]
        if not missing:
            continue
        weights = Weights(n, k, DTYPES[args.dtype], device)
        for m in missing:
            cell = measure(weights, m, args.seconds)
            results["cells"].append(cell)
            print(cell["name"], cell["ratios"], flush=True)
        results["summary"] = summary(results["cells"])
        store(path, results)
        if not args.small:
            torch.cuda.empty_cache()
    results["device"].append(device_state())
    print(json.dumps(results["summary"]))


if __name__ == "__main__":
    main()
