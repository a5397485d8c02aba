"""Honest timing: interleaved repetitions, fresh inputs, median and spread, one JSON a run.

Every benchmark times its rivals side by side in one process: a `Case` names the work, each entrant
is a callable, and the repetitions go round robin (A B C, A B C, ...), so that a slow minute of the
machine hits everybody alike. Inputs that an entrant changes are restored outside the timed region.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass
class Entrant:
    """One way to do a case's work: `setup()` untimed, then `run(setup's value)` timed."""

    name: str
    run: Callable[[Any], object]
    setup: Callable[[], Any] = lambda: None
    repeats: int | None = None  # fewer than the case's for entrants that take seconds


@dataclass
class Timing:
    """Milliseconds of one entrant."""

    median_ms: float
    p10_ms: float
    p25_ms: float
    p90_ms: float
    min_ms: float
    repeats: int


@dataclass
class Case:
    """The same work done by every entrant; `ratios` says who is compared with whom."""

    name: str
    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # entrants that were not timed, and why


def _percentile(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[round(fraction * (len(ordered) - 1))]


def time_case(name: str, entrants: list[Entrant], repeats: int) -> Case:
    """Times all entrants round robin, after one untimed warm-up each."""
    seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for entrant in entrants:
        entrant.run(entrant.setup())
    for repeat in range(repeats):
        for entrant in entrants:
            if entrant.repeats is not None and repeat >= entrant.repeats:
                continue
            state = entrant.setup()
            start = time.perf_counter()
            entrant.run(state)
            seconds[entrant.name].append(time.perf_counter() - start)
    case = Case(name)
    for entrant_name, values in seconds.items():
        case.timings[entrant_name] = timing_of([1e3 * value for value in values])
    return case


def timing_of(ms: list[float]) -> Timing:
    return Timing(
        median_ms=round(statistics.median(ms), 6),
        p10_ms=round(_percentile(ms, 0.1), 6),
        p25_ms=round(_percentile(ms, 0.25), 6),
        p90_ms=round(_percentile(ms, 0.9), 6),
        min_ms=round(min(ms), 6),
        repeats=len(ms),
    )


def ratio(case: Case, slow: str, fast: str) -> float:
    """Median of `slow` over median of `fast`, kept in the case."""
    value = round(case.timings[slow].median_ms / case.timings[fast].median_ms, 2)
    case.ratios[f"{slow} / {fast}"] = value
    return value


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """How far resident memory rises above its start while `call` runs (Linux's high-water mark)."""
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again here
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def show(cases: list[Case]) -> None:
    """A case's medians and ratios, for a person."""
    for case in cases:
        times = ", ".join(f"{name} {timing.median_ms:.2f}" for name, timing in case.timings.items())
        print(f"{case.name}\n    ms: {times}")
        for name, value in case.ratios.items():
            print(f"    {name} = {value:.2f}")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        call = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        return call.stdout.strip()

    dirty = "-dirty" if git("status", "--porcelain", "--", "csrc", "wanda_ext", "setup.py") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + dirty


def environment() -> dict[str, Any]:
    """The device, the versions and the commit that a result holds for."""
    import transformers

    import wanda_ext

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "wanda_ext": wanda_ext.__version__,
        "commit": _commit(),
    }


def save(file_name: str, results: dict[str, Any], show: bool = True) -> Path:
    """Writes benchmarks/results/<file_name> and, with `show`, prints the JSON as the last line."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / file_name
    payload = {"environment": environment(), **results}
    path.write_text(json.dumps(payload, indent=1, default=asdict) + "\n")
    if show:
        print(json.dumps(payload, default=asdict))
    return path
