"""What is here, and how fast it is at best: a copy in device memory, a large dense product.

    python benchmarks/gpu_ceilings.py

Prints what wanda_ext was built with, runs its ops on the CPU against reference.py, and then, on a
GPU, prints two cells as lines of JSON: TB/s of a copy of 4 GiB, bytes read plus bytes written, and
TFLOP/s of an 8192^3 product in bf16 of random numbers.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

import wanda_ext
from gpu_harness import gpu_or_exit, milliseconds, print_cell
from wanda_ext import ops, reference

COPY_BYTES = 1 << 32
SIDE = 8192
REPEATS, WARM_UP = 10, 3


def check_cpu_ops() -> None:
    """A few ops whose bits reference.py gives too: the compiled part works with this torch."""
    g = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(48, 96, generator=g), torch.rand(96, generator=g)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pruned: list[Any] = []
        for module in (ops, reference):
            two_four, even, rows = (weight.to(dtype) for _ in range(3))
            module.prune_nm_(two_four, norm, 2, 4)
            module.prune_nm_(even, norm, 16, 32)
            module.prune_rows_(rows, norm, 31)
            packed, bitmap = module.pack_24(two_four), module.pack_bitmap(even)
            pruned.append([two_four, even, rows, *packed, *bitmap])
            assert torch.equal(module.unpack_24(*packed), two_four)
            assert torch.equal(module.unpack_bitmap(*bitmap, 48, 96), even)
        assert all(torch.equal(a, b) for a, b in zip(*pruned, strict=True))


def median_ms(work: Any) -> float:
    for _ in range(WARM_UP):
        work()
    return statistics.median(milliseconds(work) for _ in range(REPEATS))


def main() -> None:
    print(wanda_ext.__file__, wanda_ext.build_info(), flush=True)
    check_cpu_ops()
    print("the CPU ops give the bits of reference.py", flush=True)
    device = gpu_or_exit()
    print_cell("", copy_cell(device))
    print_cell("", dense_cell(device))


def copy_cell(device: torch.device) -> dict[str, Any]:
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    ms = median_ms(lambda: target.copy_(source))
    return {"name": "ceiling: copy", "ms": ms, "TB/s": round(2 * COPY_BYTES / ms / 1e9, 3)}


def dense_cell(device: torch.device) -> dict[str, Any]:
    a, b = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(2))
    ms = median_ms(lambda: torch.mm(a, b))
    tflops = round(2 * SIDE**3 / ms / 1e9, 1)
    return {"name": f"ceiling: dense {SIDE}^3 bf16", "ms": ms, "TFLOP/s": tflops}


if __name__ == "__main__":
    main()
