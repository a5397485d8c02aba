"""Timing on a CUDA device: CUDA graphs over rotating buffers, entrants interleaved.

An entrant's graph calls it once for each buffer; the buffers are more than the L2 cache holds, so
that every call finds its data in memory. Before a replay, untimed, all buffers are written anew.
What cannot be captured (torch code that waits for the device) is timed call by call with events.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness import Case, timing_of

BUFFER_BYTES = 1 << 30  # of all buffers together: many times an L2 cache
MAX_BUFFERS = 20


@dataclass
class GpuEntrant:
    """`run(i)` does the work on buffer i, on the current stream."""

    name: str
    run: Callable[[int], object]
    captured: bool = True
    repeats: int | None = None  # fewer than the case's for entrants that take long


def buffer_count(bytes_each: int) -> int:
    """How many buffers rotate: BUFFER_BYTES in all, but 2 at least, MAX_BUFFERS at most."""
    return max(2, min(MAX_BUFFERS, -(-BUFFER_BYTES // bytes_each)))


def _capture(entrant: GpuEntrant, buffers: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        entrant.run(0)  # lazy initialisation must not fall into the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(buffers):
            entrant.run(i)
    return graph


def _milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def time_gpu_case(
    name: str,
    entrants: list[GpuEntrant],
    buffers: int,
    restore: Callable[[], object],
    repeats: int = 30,
    seconds: float = 2.0,
) -> Case:
    """Milliseconds a call: at least `repeats` rounds, and as many as `seconds` hold."""
    graphs = {e.name: _capture(e, buffers) for e in entrants if e.captured}
    samples: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}

    def time_once(entrant: GpuEntrant, i: int) -> float:
        if entrant.captured:
            return _milliseconds(graphs[entrant.name].replay) / buffers
        return _milliseconds(lambda: entrant.run(i))

    deadline = time.monotonic() + seconds
    rounds = 0
    while rounds < repeats or time.monotonic() < deadline:
        for entrant in entrants:
            if entrant.repeats is not None and rounds >= entrant.repeats:
                continue
            restore()
            samples[entrant.name].append(time_once(entrant, rounds % buffers))
        rounds += 1
    case = Case(name)
    for entrant_name, milliseconds in samples.items():
        case.timings[entrant_name] = timing_of(milliseconds)
    return case


def device_state() -> dict[str, str]:
    """Clocks, power and temperature now, as nvidia-smi says them; empty without nvidia-smi."""
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields.split(","), text.strip().split(", "), strict=True))
