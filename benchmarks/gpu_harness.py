"""Timing on a CUDA device: CUDA graphs over rotating buffers, entrants interleaved.

An entrant's graph calls it once for each buffer, or as often as a case asks, buffer after buffer.
The buffers are more than the L2 cache holds, so that every call finds its data in memory. Before a
replay, untimed, all buffers are written anew.
What cannot be captured (torch code that waits for the device) is timed call by call with events.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import shapes
import wanda_ext
from harness import RESULTS, Case, Entrant, environment, time_case, timing_of
from wanda_ext.packed import dispatch

BUFFER_BYTES = 1 << 30  # of all buffers together: many times an L2 cache
MAX_BUFFERS = 20
ROTATED_BYTES = 1 << 28  # of the copies of a packed weight
LEAST_CALLS = 20  # of a graph of one linear
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALLOWED = {torch.bfloat16: 4e-3, torch.float16: 6e-4}  # |y - fp64| / |fp64|
RIVALS_ALLOWED = 2e-2  # they may add in lower precision
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


# --- A table of linears: every shape by every number of tokens ------------------------------------


def pristine(
    n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight to prune, and the norms to prune it by: the same on every call."""
    g = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(n, k, device=device, generator=g).to(dtype)
    return weight, torch.randn(k, device=device, generator=g).abs()


def copies(bytes_each: int, on_gpu: bool) -> int:
    """How many copies of a weight rotate."""
    return buffer_count(bytes_each, ROTATED_BYTES, 1 << 20) if on_gpu else 2


def time_cell(
    cell: dict[str, Any], entrants: list[GpuEntrant], w: Any, ours: str, seconds: float
) -> None:
    """Gives the cell its timings, and the ratios of the others to `ours`.

    w: the weights of the cell: `count` copies, on `gpu` if that is not None.
    """
    if w.gpu:
        calls = max(LEAST_CALLS, w.count)
        case = time_gpu_case(
            cell["name"], entrants, w.count, lambda: None, seconds=seconds, calls=calls
        )
    else:
        plain = [Entrant(entrant.name, lambda _, e=entrant: e.run(0)) for entrant in entrants]
        case = time_case(cell["name"], plain, 5)
    cell["timings"] = case.timings
    least = case.timings[ours].median_ms
    cell["ratios"] = {
        f"{name} / {ours}": round(timing.median_ms / least, 4)
        for name, timing in case.timings.items()
        if name != ours
    }


def fill_table(
    name: str,
    description: str,
    small: tuple[list[tuple[int, int]], list[int]],
    weights: Callable[[int, int, torch.dtype, torch.device], Any],
    measure: Callable[[Any, int, float], dict[str, Any]],
    summary: Callable[[Iterable[dict[str, Any]]], dict[str, Any]],
) -> None:
    """The program: measures the cells that the command line asks for and the file lacks.

    small: the shapes and the numbers of tokens of --small. weights: of n, k, dtype and device, what
    `measure` makes a cell of, with a number of tokens and the least seconds.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=[*shapes.PARTS, "all"], default="all")
    parser.add_argument("--m", type=lambda text: [int(m) for m in text.split(",")])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=0.2, help="of every cell, at least")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        parser.error("it times a CUDA GPU, and torch sees none; --small tries it on the CPU")
    device = torch.device("cpu" if args.small else "cuda")
    parts = shapes.PARTS if args.part == "all" else {args.part: shapes.PARTS[args.part]}
    linears = [shape for part in parts.values() for shape in part]
    linears, tokens = small if args.small else (linears, list(shapes.TOKENS))
    path = args.out or (None if args.small else RESULTS / f"{name}_{args.dtype}.json")
    results = resumed(path, {"device": [], "summary": {}, "cells": []})
    dispatch.use(device)
    results["device"].append(device_state())
    for n, k in linears:
        there = {(cell["n"], cell["k"], cell["m"]) for cell in results["cells"]}
        missing = [m for m in args.m or tokens if (n, k, m) not in there]
        if not missing:
            continue
        w = weights(n, k, DTYPES[args.dtype], device)
        for m in missing:
            cell = measure(w, m, args.seconds)
            results["cells"].append(cell)
            told = [cell[key] for key in ("name", "kernel", "ratios") if key in cell]
            print(*told, flush=True)
        results["summary"] = summary(results["cells"])
        store(path, results)
        if not args.small:
            torch.cuda.empty_cache()
    results["device"].append(device_state())
    print(json.dumps(results["summary"]))
