"""Timing on a CUDA device: CUDA graphs over rotating buffers, entrants interleaved.

An entrant's graph calls it once for each buffer, or as often as a case asks, buffer after buffer.
The buffers are more than the L2 cache holds, so that every call finds its data in memory. Before a
replay, untimed, all buffers are written anew.
What cannot be captured (torch code that waits for the device) is timed call by call with events.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import wanda_ext
from harness import Case, environment, timing_of

BUFFER_BYTES = 1 << 30  # of all buffers together: many times an L2 cache
MAX_BUFFERS = 20
BUSY_CYCLES = 200_000  # the device works on these, about 0.1 ms, while the next work is launched


@dataclass
class GpuEntrant:
    """`run(i)` does the work on buffer i, on the current stream."""

    name: str
    run: Callable[[int], object]
    captured: bool = True
    repeats: int | None = None  # fewer than the case's for entrants that take long
    mode: str = "global"  # of its capture


def buffer_count(bytes_each: int, total: int = BUFFER_BYTES, most: int = MAX_BUFFERS) -> int:
    """How many buffers rotate: `total` bytes in all, but 2 at least, `most` at most."""
    return max(2, min(most, -(-total // bytes_each)))


def capture(
    run: Callable[[int], object], buffers: int, calls: int, mode: str = "global"
) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls of run(i), i from 0 to buffers - 1 and again.

    mode: what CUDA forbids meanwhile ("relaxed": nothing, for libraries that allocate).
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run(0)  # lazy initialisation must not fall into the capture
        torch.cuda.synchronize()
        graph.capture_begin(capture_error_mode=mode)
        try:
            for i in range(calls):
                run(i % buffers)
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def milliseconds(work: Callable[[], object]) -> float:
    """What the work takes on the current stream."""
    torch.cuda._sleep(BUSY_CYCLES)
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
    calls: int | None = None,
) -> Case:
    """Milliseconds a call: at least `repeats` rounds, and as many as `seconds` hold.

    calls: in a graph; by default one for each buffer.
    """
    calls = buffers if calls is None else calls
    graphs = {e.name: capture(e.run, buffers, calls, e.mode) for e in entrants if e.captured}
    samples: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}

    def time_once(entrant: GpuEntrant, i: int) -> float:
        if entrant.captured:
            return milliseconds(graphs[entrant.name].replay) / calls
        return milliseconds(lambda: entrant.run(i))

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
    for entrant_name, times in samples.items():
        case.timings[entrant_name] = timing_of(times)
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


# --- A file of results that grows run by run -----------------------------------------------------


def resumed(path: Path | None, empty: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, if it is of this GPU, torch and binary of wanda_ext; else `empty`."""
    binaries = sorted(Path(wanda_ext.__file__).parent.glob("_C*.so"))
    digest = hashlib.sha256(b"".join(binary.read_bytes() for binary in binaries)).hexdigest()
    made_by = {"environment": environment(), "binary": digest[:16]}
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if all(found.get(key) == value for key, value in made_by.items()):
            return found
    return {**made_by, **empty}


def store(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, default=asdict) + "\n")
