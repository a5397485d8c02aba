"""Timing on a CUDA device: CUDA graphs over rotating buffers, entrants interleaved.

An entrant's graph calls it once for each buffer, or as often as a case asks, buffer after buffer.
The buffers are more than the L2 cache holds, so that every call finds its data in memory. Before a
replay, untimed, all buffers are written anew. Entrants take turns, in another order each round:
what one draws of the device's power slows the next. What cannot be captured (torch code that waits
for the device) is timed call by call with events. An entrant that is wrong is recorded, not timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
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
NO_DEVICE = 3  # exit status
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
    case = Case(name)
    graphs = {}
    for entrant in entrants:
        try:
            if entrant.captured:
                graphs[entrant.name] = capture(entrant.run, buffers, calls, entrant.mode)
        except RuntimeError as error:
            case.wrong[entrant.name] = first_line(error)
    racing = [entrant for entrant in entrants if entrant.name not in case.wrong]
    samples: dict[str, list[float]] = {entrant.name: [] for entrant in racing}

    def time_once(entrant: GpuEntrant, i: int) -> float:
        if entrant.captured:
            return milliseconds(graphs[entrant.name].replay) / calls
        return milliseconds(lambda: entrant.run(i))

    deadline = time.monotonic() + seconds
    rounds = 0
    while racing and (rounds < repeats or time.monotonic() < deadline):
        first = rounds % len(racing)
        for entrant in racing[first:] + racing[:first]:
            if entrant.repeats is not None and rounds >= entrant.repeats:
                continue
            restore()
            samples[entrant.name].append(time_once(entrant, rounds % buffers))
        rounds += 1
    for entrant_name, times in samples.items():
        case.timings[entrant_name] = timing_of(times)
    return case


def right_ones(
    entrants: Iterable[GpuEntrant], check: Callable[[GpuEntrant], None], wrong: dict[str, str]
) -> list[GpuEntrant]:
    """Those that `check` accepts; `wrong` receives the others: a WrongError's text, or CUDA's."""
    right = []
    for entrant in entrants:
        try:
            check(entrant)
            right.append(entrant)
        except (WrongError, RuntimeError) as error:
            wrong[entrant.name] = first_line(error)
    return right


class WrongError(Exception):
    """A result is not what it should be."""


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def gpu_or_exit(otherwise: str = "") -> torch.device:
    """The CUDA device; without one the program ends with status NO_DEVICE, and says so."""
    if not torch.cuda.is_available():
        print(f"it times a CUDA GPU, and torch sees none{otherwise}", file=sys.stderr, flush=True)
        raise SystemExit(NO_DEVICE)
    return torch.device("cuda")


def print_cell(what: str, cell: dict[str, Any] | Case) -> None:
    """A result as a line of JSON, as soon as it is there."""
    values = cell if isinstance(cell, dict) else asdict(cell)
    name = f"{what} {values['name']}".strip()
    print(json.dumps({"cell": name, **values}, default=asdict), flush=True)


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
    """Gives the cell its timings, and the ratios of the others to `ours`, unless that is wrong.

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
    cell["wrong"] = {**cell.get("wrong", {}), **case.wrong}
    least = case.timings[ours].median_ms if ours in case.timings else None
    cell["ratios"] = {
        f"{name} / {ours}": round(timing.median_ms / least, 4)
        for name, timing in case.timings.items()
        if name != ours and least is not None
    }


def fill_table(
    name: str,
    description: str,
    small: tuple[list[tuple[int, int]], list[int]],
    weights: Callable[[int, int, torch.dtype, torch.device], Any],
    measure: Callable[..., dict[str, Any]],
    summary: Callable[[Iterable[dict[str, Any]]], dict[str, Any]],
    flags: dict[str, str] | None = None,
) -> None:
    """The program: measures the cells that the command line asks for and the file lacks.

    small: the shapes and the numbers of tokens of --small. weights: of n, k, dtype and device, what
    `measure` makes a cell of, with a number of tokens and the least seconds. flags: more options,
    and what they do; one that is given reaches `measure` by its name.
    """
    args = _arguments(description, flags or {})
    chosen = {name: True for name in flags or {} if getattr(args, name)}
    if args.small:
        device = torch.device("cpu")
        linears, tokens = small
    else:
        device = gpu_or_exit("; --small tries it on the CPU")
        parts = shapes.PARTS if args.part == "all" else {args.part: shapes.PARTS[args.part]}
        linears, tokens = [s for part in parts.values() for s in part], list(shapes.TOKENS)
    linears = args.shapes or linears
    path = args.out or (None if args.small or args.lines else RESULTS / f"{name}_{args.dtype}.json")
    results = {"device": [], "cells": []} if path is None else _resumed_table(path)
    dispatch.use(device)
    results["device"].append(device_state())
    for n, k in linears:
        there = {(cell["n"], cell["k"], cell["m"]) for cell in results["cells"]}
        missing = [m for m in args.m or tokens if (n, k, m) not in there]
        if not missing:
            continue
        w = weights(n, k, DTYPES[args.dtype], device)
        for m in missing:
            cell = measure(w, m, args.seconds, **chosen)
            results["cells"].append(cell)
            if args.lines:
                print_cell(name, cell)
            else:
                told = [cell[key] for key in ("name", "kernel", "ratios", "wrong") if key in cell]
                print(*told, flush=True)
        results["summary"] = summary(results["cells"])
        store(path, results)
        if not args.small:
            torch.cuda.empty_cache()
    results["device"].append(device_state())
    if not args.lines:
        print(json.dumps(results.get("summary", {})))
    if any(cell.get("wrong") for cell in results["cells"]):
        raise SystemExit("some entrants were wrong, and are recorded as such")


def _resumed_table(path: Path) -> dict[str, Any]:
    return resumed(path, {"device": [], "summary": {}, "cells": []})


def shapes_of(text: str) -> list[tuple[int, int]]:
    """[(4096, 11008), ...] of "4096x11008,..."."""
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(n), int(k)) for n, k in pairs]


def _arguments(description: str, flags: dict[str, str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=[*shapes.PARTS, "all"], default="all")
    parser.add_argument("--shapes", type=shapes_of, help="NxK,... instead of a part's")
    parser.add_argument("--m", type=lambda text: [int(m) for m in text.split(",")])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=0.2, help="of every cell, at least")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lines", action="store_true", help="prints cells as lines of JSON")
    parser.add_argument("--small", action="store_true")
    for name, what in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=what)
    return parser.parse_args()
