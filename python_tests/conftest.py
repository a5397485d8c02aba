"""Fixtures that several test files ask for by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def calm() -> Iterator[None]:
    """Benchmarks on one thread."""
    from fake_cuda import one_thread

    with one_thread():
        yield


@pytest.fixture
def on_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is a GPU, CUDA graphs included, and the benchmarks' weights take little memory."""
    from fake_cuda import pose_with_graphs

    import gpu_harness

    pose_with_graphs(monkeypatch)
    monkeypatch.setattr(gpu_harness, "ROTATED_BYTES", 1 << 15)
