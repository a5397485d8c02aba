"""The pruning kernels on a GPU: beside the original's torch code, torch's best, and a plain copy.

    python benchmarks/bench_prune_cuda.py [--model llama-7b|llama-13b|llama-70b|llama-3-8b|all |
                                           --shapes NxK,...] [--lines]
                                          [--only rows|groups|pack|statistics] [--seconds 2]

bf16 weights and activations. "copy" moves as many bytes from device memory to device memory as the
kernel must read and write, so copy / wanda_ext is the fraction of copy bandwidth that it reaches.
Writes benchmarks/results/prune_cuda_<model>.json, or prune_cuda_<model>_<only>.json; --lines:
prints every case as a line of JSON instead. An op whose results are not those of the CPU is
recorded, and not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import harness
import original
import shapes
from gpu_harness import (
    GpuEntrant,
    WrongError,
    buffer_count,
    device_state,
    gpu_or_exit,
    print_cell,
    right_ones,
    shapes_of,
    time_gpu_case,
)
from harness import Case, ratio
from wanda_ext import ops

MODELS = {
    "llama-7b": shapes.LLAMA_7B,
    "llama-13b": shapes.LLAMA_13B,
    "llama-70b": shapes.LLAMA_70B,
    "llama-3-8b": shapes.LLAMA3_8B,
}
BLOCKS_7B = 32
TOKENS = 2048
DTYPE = torch.bfloat16
CHECKED_ROWS = 32
SLOW = 5  # repeats of the original's code
OURS = "wanda_ext"
PATTERNS = ((2, 4), (4, 8), (16, 32))
WORK = ("rows", "groups", "pack", "statistics")


class Weights:
    """Copies of one weight [n, k], more than the caches hold, and its norms."""

    def __init__(self, n: int, k: int) -> None:
        g = torch.Generator(device="cuda").manual_seed(0)
        self.pristine = torch.randn(n, k, device="cuda", generator=g).to(DTYPE)
        self.scaler_row = torch.rand(k, device="cuda", generator=g).add_(0.1)
        self.norm = self.scaler_row.sqrt()
        count = buffer_count(self.pristine.nbytes)
        self.copies = self.pristine.repeat(count, 1, 1)
        self.count = count

    def restore(self) -> None:
        self.copies.copy_(self.pristine)


def _copy_entrant(like: Tensor, count: int, moved_bytes: int) -> GpuEntrant:
    """Reads moved_bytes / 2 and writes as many, for each buffer elsewhere."""
    n = moved_bytes // 2 // like.element_size()
    source, target = (torch.empty(count, n, dtype=like.dtype, device="cuda") for _ in range(2))
    return GpuEntrant("copy", lambda i: target[i].copy_(source[i]))


def _check(run: Callable[[Tensor, Tensor], object], weights: Weights) -> None:
    """On the first rows the device and the CPU give the same bits."""
    on_device = weights.pristine[:CHECKED_ROWS].clone()
    on_cpu = on_device.cpu()
    run(on_device, weights.norm)
    run(on_cpu, weights.norm.cpu())
    _same_bits(on_device, on_cpu)


def _same_bits(on_device: Tensor, on_cpu: Tensor) -> None:
    as_bits = torch.int64 if on_cpu.dtype == torch.float64 else torch.int16
    if not torch.equal(on_device.cpu().view(as_bits), on_cpu.view(as_bits)):
        raise WrongError("its bits are not those of the CPU")


def _timed(
    name: str,
    entrants: list[GpuEntrant],
    check: Callable[[], object],
    count: int,
    restore: Callable[[], object],
    seconds: float,
) -> Case:
    """Times the entrants; ours, if `check` finds nothing wrong."""
    wrong: dict[str, str] = {}

    def check_ours(entrant: GpuEntrant) -> None:
        if entrant.name == OURS:
            check()

    right = right_ones(entrants, check_ours, wrong)
    case = time_gpu_case(name, right, count, restore, seconds=seconds)
    case.wrong |= wrong
    for other in case.timings if OURS in case.timings else ():
        if other != OURS:
            ratio(case, other, OURS)
    return case


def _topk_and_scatter(weight: Tensor, norm: Tensor, n_prune: int) -> None:
    lowest = (weight.abs() * norm).topk(n_prune, dim=1, largest=False, sorted=False)[1]
    weight.scatter_(1, lowest, 0)


def _topk_of_groups(weight: Tensor, norm: Tensor, keep: int, group: int) -> None:
    groups = weight.view(weight.shape[0], -1, group)
    score = (weight.abs() * norm).view_as(groups)
    groups.scatter_(2, score.topk(group - keep, dim=2, largest=False, sorted=False)[1], 0)


def bench_rows(n: int, k: int, seconds: float) -> Case:
    """50 % of every row."""
    w, half = Weights(n, k), k // 2

    def by_topk(i: int) -> None:
        _topk_and_scatter(w.copies[i], w.norm, half)

    def by_original(i: int) -> None:
        original.prune_unstructured_(w.copies[i], w.scaler_row, 0.5)

    entrants = [
        GpuEntrant(OURS, lambda i: ops.prune_rows_(w.copies[i], w.norm, half)),
        _copy_entrant(w.pristine, w.count, 2 * w.pristine.nbytes),
        GpuEntrant("topk", by_topk, False, SLOW),
        GpuEntrant("original", by_original, False, SLOW),
    ]

    def check() -> None:
        _check(lambda weight, norm: ops.prune_rows_(weight, norm, half), w)

    name = f"prune_rows 50% {n}x{k} bf16"
    return _timed(name, entrants, check, w.count, w.restore, seconds)


def bench_groups(n: int, k: int, seconds: float, keep: int, group: int) -> Case:
    """keep:group in place."""
    w = Weights(n, k)

    def by_topk(i: int) -> None:
        _topk_of_groups(w.copies[i], w.norm, keep, group)

    def by_original(i: int) -> None:
        original.prune_group_(w.copies[i], w.scaler_row, keep, group)

    entrants = [
        GpuEntrant(OURS, lambda i: ops.prune_nm_(w.copies[i], w.norm, keep, group)),
        _copy_entrant(w.pristine, w.count, 2 * w.pristine.nbytes),
        GpuEntrant("topk of groups", by_topk, False, SLOW),
        GpuEntrant("original", by_original, False, 2),
    ]

    def check() -> None:
        _check(lambda weight, norm: ops.prune_nm_(weight, norm, keep, group), w)

    name = f"prune_nm {keep}:{group} {n}x{k} bf16"
    return _timed(name, entrants, check, w.count, w.restore, seconds)


def bench_pack(n: int, k: int, seconds: float) -> Case:
    """A 2:4 weight to values and metadata."""
    w = Weights(n, k)
    ops.prune_nm_(w.pristine, w.norm, 2, 4)
    w.restore()
    values, meta = ops.pack_24(w.pristine)
    moved = w.pristine.nbytes + values.nbytes + meta.nbytes
    packed = [(values, meta)] * w.count

    def pack(i: int) -> None:  # into memory of its own, so that no cache absorbs the writes
        packed[i] = ops.pack_24(w.copies[i])

    def check() -> None:
        on_cpu = ops.pack_24(w.pristine[:CHECKED_ROWS].cpu())
        _same_bits(values[:CHECKED_ROWS], on_cpu[0])
        _same_bits(meta[:CHECKED_ROWS], on_cpu[1])

    entrants = [GpuEntrant(OURS, pack), _copy_entrant(w.pristine, w.count, moved)]
    return _timed(f"pack_24 {n}x{k} bf16", entrants, check, w.count, w.restore, seconds)


def bench_statistics(k: int, seconds: float) -> Case:
    """One sequence of 2048 tokens added to a running statistic."""
    count = buffer_count(TOKENS * k * DTYPE.itemsize)
    x = torch.randn(count, 1, TOKENS, k, device="cuda").to(DTYPE)
    acc = torch.zeros(k, dtype=torch.float64, device="cuda")
    theirs = original.Statistic(k)
    theirs.scaler_row = theirs.scaler_row.cuda()

    def check() -> None:
        on_device, on_cpu = torch.zeros_like(acc), torch.zeros(k, dtype=torch.float64)
        ops.input_sumsq_(on_device, x[0])
        ops.input_sumsq_(on_cpu, x[0].cpu())
        _same_bits(on_device, on_cpu)

    entrants = [
        GpuEntrant(OURS, lambda i: ops.input_sumsq_(acc, x[i])),
        _copy_entrant(x, count, x[0].nbytes),
        GpuEntrant("float().pow(2).sum(0)", lambda i: x[i, 0].float().pow(2).sum(0)),
        GpuEntrant("original", lambda i: theirs.add_batch(x[i]), False, SLOW),
    ]
    name = f"input_sumsq {TOKENS}x{k} bf16"
    return _timed(name, entrants, check, count, lambda: None, seconds)


def cases_of(linears: list[tuple[int, int]], wanted: list[str], seconds: float) -> Iterator[Case]:
    """What is asked for, one after the other."""
    for n, k in linears:
        if "rows" in wanted:
            yield bench_rows(n, k, seconds)
        for pattern in PATTERNS if "groups" in wanted else ():
            yield bench_groups(n, k, seconds, *pattern)
        if "pack" in wanted:
            yield bench_pack(n, k, seconds)
        torch.cuda.empty_cache()
    for k in sorted({k for _, k in linears}) if "statistics" in wanted else ():
        yield bench_statistics(k, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS, "all"], default="llama-7b")
    parser.add_argument("--shapes", type=shapes_of, help="NxK,... instead of a model's")
    parser.add_argument("--only", choices=WORK)
    parser.add_argument("--seconds", type=float, default=2.0, help="of every case, at least")
    parser.add_argument("--lines", action="store_true", help="prints cases as lines of JSON")
    arguments = parser.parse_args()
    gpu_or_exit()
    chosen = MODELS.values() if arguments.model == "all" else [MODELS[arguments.model]]
    linears = arguments.shapes or sorted({shape for model in chosen for shape in model.values()})
    wanted = [arguments.only] if arguments.only else list(WORK)
    before = device_state()
    cases: list[Case] = []
    for case in cases_of(linears, wanted, arguments.seconds):
        cases.append(case)
        if arguments.lines:
            print_cell("", case)
        else:
            medians = {name: timing.median_ms for name, timing in case.timings.items()}
            print(case.name, medians, case.ratios, case.wrong, flush=True)
    if not arguments.lines:
        save(arguments.model, arguments.only, cases, [before, device_state()])
    if any(case.wrong for case in cases):
        raise SystemExit("some entrants were wrong, and are recorded as such")


def save(model: str, only: str | None, cases: list[Case], device: list[dict[str, str]]) -> None:
    """Into benchmarks/results/."""
    results: dict[str, object] = {"cases": cases, "device": device}
    by_name = {case.name: case.timings for case in cases}
    selections = [f"prune_rows 50% {n}x{k} bf16" for n, k in shapes.LLAMA_7B.values()]
    if all(OURS in by_name.get(name, ()) for name in selections):
        total = BLOCKS_7B * sum(by_name[name][OURS].median_ms for name in selections)
        results["row selection of all Llama-7B linears, ms"] = round(total, 3)
    part = "" if only is None else f"_{only}"
    harness.save(f"prune_cuda_{model}{part}.json", results)


if __name__ == "__main__":
    main()
