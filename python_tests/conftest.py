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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `cpu_kernels` runs once with each set that this processor has."""
    if "cpu_kernels" in metafunc.fixturenames:
        from op_cases import cpu_kernel_sets

        metafunc.parametrize("cpu_kernels", cpu_kernel_sets(), indirect=True)


@pytest.fixture
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    from wanda_ext import _C

    before = _C.cpu_kernels()
    _C.use_cpu_kernels(request.param)
    yield request.param
    _C.use_cpu_kernels(before)


@pytest.fixture
def on_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is a GPU, CUDA graphs included, and the benchmarks' weights take little memory."""
    from fake_cuda import pose_with_graphs

    import gpu_harness

    pose_with_graphs(monkeypatch)
    monkeypatch.setattr(gpu_harness, "ROTATED_BYTES", 1 << 15)
