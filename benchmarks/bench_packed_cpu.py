"""Packed linears on the CPU beside torch's dense one, by pattern: bytes, and times of a call.

    python benchmarks/bench_packed_cpu.py [--threads 2] [--small]

A linear of Llama-7B in bf16, half of it pruned in each pattern; its tensors as a checkpoint has
them; packing, and a call with 1, 16 and 256 rows. Writes benchmarks/results/packed_cpu.json;
checks what it computes against dense before it times it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import harness
from harness import Case, Entrant, ratio, time_case
from wanda_ext import ops
from wanda_ext.packed import formats

SHAPE = (11008, 4096)  # gate or up: 90 MB, more than most caches hold
SMALL = (256, 512)
TOKENS = (1, 16, 256)
GROUPS = {"2:4": (2, 4), "4:8": (4, 8), "8:16": (8, 16), "16:32": (16, 32)}
PATTERNS = (*GROUPS, "50%")


def prune_(weight: Tensor, norm: Tensor, pattern: str) -> None:
    if pattern in GROUPS:
        ops.prune_nm_(weight, norm, *GROUPS[pattern])
    else:
        ops.prune_rows_(weight, norm, weight.shape[1] // 2)


def check(packed: nn.Module, dense: nn.Linear, x: Tensor) -> None:
    """Both are within the rounding of bf16 of the product in fp64."""
    y = x.double() @ dense.weight.double().T
    bound = x.double().abs() @ dense.weight.double().abs().T * 2**-8
    for linear in (packed, dense):
        assert bool(((linear(x).double() - y).abs() <= bound).all()), type(linear).__name__


@torch.no_grad()
def bench(pattern: str, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    n, k = shape
    torch.manual_seed(0)
    dense = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    prune_(dense.weight.data, torch.rand(k).add_(0.1), pattern)
    kind, tensors = formats.pack(dense.weight)
    packed = kind.holding(dense, tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    calls: list[Case] = []
    for m in TOKENS:
        x = torch.randn(m, k, dtype=torch.bfloat16)
        check(packed, dense, x[:16])
        entrants = [
            Entrant("packed", lambda _, x=x: packed(x)),
            Entrant("dense", lambda _, x=x: dense(x)),
        ]
        calls.append(time_case(str(m), entrants, repeats if m < 256 else repeats // 4 + 1))
        ratio(calls[-1], "dense", "packed")
    packing = [
        Entrant("pack", lambda _: kind.pack(dense.weight)),
        Entrant("unpack", lambda _: kind.unpack(tensors)),
    ]
    made = time_case("pack", packing, repeats // 4 + 1)
    return {
        "name": pattern,
        "format": kind.FORMAT,
        "bytes": nbytes,
        "bytes of dense": nbytes / dense.weight.nbytes,
        "surplus": kind.options(tensors).get("surplus", 0),
        "calls": calls,
        "packing": made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small linear; nothing is saved")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, repeats = (SMALL, 3) if args.small else (SHAPE, 40)
    rows = [bench(pattern, shape, repeats) for pattern in PATTERNS]
    for row in rows:
        print(f"{row['name']} as {row['format']}: {row['bytes of dense']:.4f} of the dense bytes")
        harness.show([*row["calls"], row["packing"]])
    if not args.small:
        harness.save("packed_cpu.json", {"shape": shape, "dtype": "bfloat16", "patterns": rows})


if __name__ == "__main__":
    main()
