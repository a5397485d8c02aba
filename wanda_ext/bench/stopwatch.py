"""Times linear_24's kernels and torch's dense product on a GPU, one weight shape, one m at a time.

Each entrant is a CUDA graph of many calls that rotate over copies of the weight, more than an L2
cache holds: in a model, too, a weight comes from memory. The weights are random and 2:4, the
activations random, for zeros cost less power. A kernel is timed only if its result is dense's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from wanda_ext import ops
from wanda_ext.packed import dispatch
from wanda_ext.packed.dispatch import Choice, name_of
from wanda_ext.packed.dispatch_table import Gpu

ROTATED_BYTES = 1 << 28  # of packed copies together
MAX_COPIES = 64
CALLS = 20  # of a graph at least
HEATS, FINALISTS = 3, 4  # rounds that all candidates run; how many of them run the final
ROUNDS = 30  # of the final at least


class Weights:
    """Copies of one random 2:4 weight [n, k], packed and dense, on a GPU."""

    def __init__(self, dtype: torch.dtype, n: int, k: int, device: torch.device) -> None:
        self.n, self.k, self.dtype, self.device = n, k, dtype, device
        gpu = dispatch.gpu_of(device)
        assert gpu is not None
        self.gpu: Gpu = gpu
        self.generator = torch.Generator(device).manual_seed(0)
        self.order = dispatch.order_of(gpu.arch)
        dense = self.random(n) / math.sqrt(k)
        ops.prune_nm_(dense, None, 2, 4)
        values, meta = ops.pack_24(dense)
        meta = ops.order_meta_24(meta, n, k, 0, self.order)
        count = copies_of(values.nbytes + meta.nbytes)
        self.dense = [dense.clone() for _ in range(count)]
        self.packed = [(values.clone(), meta.clone()) for _ in range(count)]

    def random(self, rows: int) -> Tensor:
        """Gaussian [rows, k]."""
        return torch.randn(
            rows, self.k, dtype=self.dtype, device=self.device, generator=self.generator
        )


class Stopwatch:
    """Times calls of m rows. A choice is a kernel with its splits of k; None is torch's dense."""

    def __init__(self, weights: Weights, m: int) -> None:
        self._weights = weights
        self._x = weights.random(m)
        self._graphs: dict[Choice | None, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one for all: graphs run one after the other
        self._stream = torch.cuda.Stream(weights.device)  # type: ignore[no-untyped-call]
        self._calls = calls_of(len(weights.dense))
        self._expected = functional.linear(self._x, weights.dense[0])
        torch.cuda.synchronize(weights.device)  # before another stream reads them

    @torch.no_grad()
    def ready(self, choice: Choice | None) -> str:
        """Prepares what is to be timed; why it must not be, or ""."""
        w = self._weights
        problem = (w.gpu, name_of(w.dtype), w.n, w.k)
        by_choice = nullcontext() if choice is None else dispatch.forced(*problem, *choice)
        run = self._dense if choice is None else self._packed
        with torch.cuda.device(w.device), torch.cuda.stream(self._stream), by_choice:
            try:
                error = relative_error(run(0), self._expected)
                if not error <= tolerance(w.dtype):  # NaN is not, either
                    return f"its result is off by {error:.1e} of the largest"
                self._graphs[choice] = self._captured(run)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                return str(error)
        return ""

    def time_us(self, choice: Choice | None) -> float:
        """Microseconds a call, over one replay of its graph."""
        graph = self._graphs[choice]
        with torch.cuda.device(self._weights.device), torch.cuda.stream(self._stream):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            graph.replay()  # the device is busy with this one while the next is being launched
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / self._calls

    def _captured(self, run: Callable[[int], Tensor]) -> torch.cuda.CUDAGraph:
        graph, copies = torch.cuda.CUDAGraph(), len(self._weights.dense)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            for call in range(self._calls):
                run(call % copies)
        return graph

    def _dense(self, copy: int) -> Tensor:
        return functional.linear(self._x, self._weights.dense[copy])

    def _packed(self, copy: int) -> Tensor:
        return ops.linear_24(self._x, *self._weights.packed[copy], self._weights.order)


def race(
    choices: Sequence[Choice],
    time_us: Callable[[Choice | None], float],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Choice, float, float]:
    """The fastest choice, its median time and dense's, from rounds in which all take turns.

    A few rounds find the finalists; the times are those of the final, for the best of many short
    trials looks better than it is. Of equal medians the earlier choice wins.
    """
    heats = {choice: min(time_us(choice) for _ in range(HEATS)) for choice in choices}
    finalists = sorted(choices, key=lambda choice: heats[choice])[:FINALISTS]
    entrants: list[Choice | None] = [c for c in choices if c in finalists] + [None]
    samples: dict[Choice | None, list[float]] = {entrant: [] for entrant in entrants}
    start = clock()
    while len(samples[None]) < ROUNDS or clock() - start < seconds:
        for entrant in entrants:
            samples[entrant].append(time_us(entrant))
    medians = {entrant: statistics.median(times) for entrant, times in samples.items()}
    dense = medians.pop(None)
    winner = min((c for c in medians if c is not None), key=lambda c: medians[c])
    return winner, medians[winner], dense


def copies_of(nbytes: int) -> int:
    """How many copies of a packed weight rotate."""
    return max(2, min(MAX_COPIES, -(-ROTATED_BYTES // nbytes)))


def calls_of(copies: int) -> int:
    """How many calls a graph makes: each copy as often as the others, CALLS or more in all."""
    return copies * -(-CALLS // copies)


def relative_error(y: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest of `expected`; NaN where there is one. y is spent.

    Shapes: y, expected [m, n] of one dtype.
    """
    return float(y.sub_(expected).abs_().max() / expected.abs().max())


def tolerance(dtype: torch.dtype) -> float:
    """Of relative_error: both round once, and dense may add up in its own dtype."""
    return 4 * torch.finfo(dtype).eps
