"""CUDA graphs, events and streams on the CPU, for the benchmarks that use them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from fake_gpu import pose_as_gpu


class FakeGraph:
    """What it captures runs at once, and not again."""

    def capture_begin(self, capture_error_mode: str) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


class FakeEvent:
    """Takes the time of the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


def pose_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the CPU is a GPU, CUDA graphs included."""
    pose_as_gpu(monkeypatch)
    fakes: dict[str, Any] = {"CUDAGraph": FakeGraph, "Event": FakeEvent, "Stream": object}
    fakes |= {"stream": nullcontext}
    fakes |= dict.fromkeys(("synchronize", "empty_cache", "_sleep"), lambda *_: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def run_small(benchmark: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The program with --small."""
    monkeypatch.setattr("sys.argv", ["benchmark", "--small", *map(str, arguments)])
    benchmark.main()


@contextmanager
def one_thread() -> Iterator[None]:
    """Many threads wait long for each other on a machine with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
