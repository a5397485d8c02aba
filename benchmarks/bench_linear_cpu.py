"""Packed products on the CPU beside the best dense one: F.linear or oneDNN with packed weights.

    python benchmarks/bench_linear_cpu.py [--threads 1 2] [--kernels avx2] [--small]

Linears of Llama-7B in bf16, weights in 2:4 (linear_24), 16:32 (linear_bitmap) and exact 50, 60 and
70 % of each row (linear_stream), and 1 to 2048 tokens. Everything is interleaved in one process.
Each side has as many copies of its weight as take four times the last-level cache, so that all of
them are read from memory. Ratios are of lower quartiles. A plain read of the dense weight says what
the memory gives meanwhile. Each product is checked against fp64 before it is timed. Writes
benchmarks/results/linear_cpu.json, or linear_cpu_KERNELS.json.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import harness
from harness import Case, Entrant, time_case
from shapes import CPU
from wanda_ext import _C, ops

TOKENS = (1, 4, 8, 16, 64, 256, 2048)
GROUPS = {"2:4": (2, 4), "16:32": (16, 32)}
PATTERNS = (*GROUPS, "50%", "60%", "70%")
DENSE = ("F.linear", "oneDNN")
SMALL = [(64, 128)]

Product = Callable[..., Tensor]


def cache_bytes() -> int:
    """Of the last level, as Linux tells it."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [path.read_text().strip() for path in caches]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 << 20)


def packed_as(pattern: str, weight: Tensor) -> tuple[Product, list[Tensor], Tensor]:
    """product(x, *tensors), its tensors, and the weight pruned."""
    pruned = weight.clone()
    if pattern in GROUPS:
        ops.prune_nm_(pruned, None, *GROUPS[pattern])
    else:
        ops.prune_rows_(pruned, None, int(weight.shape[1] * float(pattern.strip("%")) / 100))
    if pattern == "2:4":
        return ops.linear_24, list(ops.pack_24(pruned)), pruned
    if pattern == "16:32":
        n = len(weight)
        return lambda x, *t: ops.linear_bitmap(x, *t, n), list(ops.pack_bitmap(pruned)), pruned
    return ops.linear_stream, list(ops.pack_stream(pruned, int(pruned.count_nonzero()))), pruned


def rotated(tensors: list[Tensor], nbytes: int) -> Iterator[list[Tensor]]:
    """Copies that take nbytes together, again and again."""
    copies = 1 + nbytes // sum(tensor.nbytes for tensor in tensors)
    return itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(copies)])


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within the rounding of bf16."""
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T * 2**-8
    assert bool(((y.double() - exact).abs() <= bound).all())


def entrants(weight: Tensor, nbytes: int) -> dict[str, Entrant]:
    """Those whose weights do not depend on the number of tokens; run(x, tensors)."""
    linear = torch.nn.functional.linear
    products: dict[str, tuple[Product, list[Tensor]]] = {"F.linear": (linear, [weight])}
    x = torch.randn(16, weight.shape[1]).to(weight.dtype)
    for pattern in PATTERNS:
        product, tensors, pruned = packed_as(pattern, weight)
        for m in (1, 16):
            check(product(x[:m], *tensors), x[:m], pruned)
        products[pattern] = product, tensors
    made = {}
    for name, (product, tensors) in products.items():
        copies = rotated(tensors, nbytes)
        made[name] = Entrant(
            name, lambda state, f=product: f(state[0], *state[1]), lambda c=copies: next(c)
        )
    dense = rotated([weight], nbytes)
    made["read"] = Entrant(
        "read", lambda state: state[1][0].view(torch.float32).sum(), lambda: next(dense)
    )
    return made


def onednn(weight: Tensor, m: int, nbytes: int) -> Entrant:
    """With weights packed for m tokens, as a frozen model runs it."""
    kernels = torch.ops.mkldnn
    copies = 1 + nbytes // weight.nbytes
    packed = itertools.cycle([kernels._reorder_linear_weight(weight, m) for _ in range(copies)])

    def run(state: tuple[Tensor, Tensor]) -> Tensor:
        y: Tensor = kernels._linear_pointwise(*state, None, "none", [], "")
        return y

    return Entrant("oneDNN", run, lambda: next(packed))


def bench(made: dict[str, Entrant], weight: Tensor, m: int, nbytes: int, repeats: int) -> Case:
    x = torch.randn(m, weight.shape[1]).to(weight.dtype)
    sides = [*made.values(), onednn(weight, m, nbytes)]
    timed = [Entrant(side.name, side.run, lambda setup=side.setup: (x, setup())) for side in sides]
    case = time_case(str(m), timed, repeats)
    best = min(case.timings[name].p25_ms for name in DENSE)
    for pattern in PATTERNS:
        case.ratios[pattern] = round(best / case.timings[pattern].p25_ms, 2)
    return case


def means(shapes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tokens -> pattern -> geometric mean and lowest ratio over the shapes."""
    found: dict[str, dict[str, Any]] = {}
    for calls in zip(*(shape["calls"] for shape in shapes), strict=True):
        ratios = {p: [call.ratios[p] for call in calls] for p in PATTERNS}
        found[calls[0].name] = {
            p: {"mean": round(math.prod(r) ** (1 / len(r)), 2), "lowest": min(r)}
            for p, r in ratios.items()
        }
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--kernels", help="amx, avx512_bf16, avx512, avx2 or plain")
    parser.add_argument("--small", action="store_true", help="a small linear; nothing is saved")
    args = parser.parse_args()
    if args.kernels:
        _C.use_cpu_kernels(args.kernels)
    cache = cache_bytes()
    nbytes, wanted = (0, SMALL) if args.small else (4 * cache, CPU)
    runs = {threads: [] for threads in args.threads}  # type: dict[int, list[dict[str, Any]]]
    for n, k in wanted:
        torch.manual_seed(0)
        weight = torch.randn(n, k, dtype=torch.bfloat16)
        made = entrants(weight, nbytes)
        for threads in args.threads:
            torch.set_num_threads(threads)
            calls = []
            for m in args.tokens:
                repeats = 3 if args.small else 21 if m <= 64 else 7 if m <= 256 else 3
                calls.append(bench(made, weight, m, nbytes, repeats))
                print(f"{n}x{k}, {threads} threads, {m}: {calls[-1].ratios}", flush=True)
            runs[threads].append({"name": f"{n}x{k}", "calls": calls})
    results = {
        "kernels": _C.cpu_kernels(),
        "last-level cache": cache,
        "threads": [
            {"name": str(threads), "means": means(shapes), "shapes": shapes}
            for threads, shapes in runs.items()
        ],
    }
    if not args.small:
        name = f"linear_cpu_{args.kernels}.json" if args.kernels else "linear_cpu.json"
        harness.save(name, {"dtype": "bfloat16", **results})


if __name__ == "__main__":
    main()
