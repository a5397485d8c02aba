"""info: what it says for each combination of build, torch and device; no device needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import wanda_ext
from wanda_ext import _build_backend as backend
from wanda_ext import info

CPU_BUILD = {"torch": "2.13.0", "compiler": "gcc 12", "cuda": False}
CPU_BUILD |= {"cuda_stream": False, "cuda_archs": None, "nvcc": None, "cutlass": None}
CPU_BUILD |= {"wgmma": False}
CUDA_BUILD = CPU_BUILD | {"cuda": True, "cuda_archs": "80;90+PTX", "nvcc": "13.0.88"}
CUDA_BUILD |= {"wgmma": True}


def advice(compiled: dict[str, Any], torch_cuda: str | None, *capabilities: str) -> list[str]:
    devices = [{"name": "a device", "capability": c} for c in capabilities]
    return info._advice({"compiled": compiled, "torch_cuda": torch_cuda, "devices": devices})


def test_build_info_of_this_build() -> None:
    found = wanda_ext.build_info()
    assert found["version"] == wanda_ext.__version__
    assert found["torch"] == torch.__version__
    compiled = found["compiled"]
    assert set(compiled) == set(CPU_BUILD)
    assert isinstance(compiled["cuda"], bool)
    for key in ("cuda_archs", "nvcc", "cutlass"):
        assert (compiled[key] is not None) == compiled["cuda"]
    assert compiled["cutlass"] in (None, "4.2.0")
    # Found at run time, in the torch that is here and not the one built with.
    assert compiled["cuda_stream"] == (compiled["cuda"] and torch.version.cuda is not None)


def test_cuda_build_registers_its_kernel() -> None:
    built = wanda_ext.build_info()["compiled"]["cuda"]
    assert wanda_ext.ops.supports("input_sumsq_", "cuda") is built


@pytest.mark.skipif(not wanda_ext.build_info()["compiled"]["cuda"], reason="needs the CUDA kernels")
def test_wgmma_kernels_are_there_where_they_were_built() -> None:
    native = import_module("wanda_ext._C")
    compiled = wanda_ext.build_info()["compiled"]
    wgmma = compiled["wgmma"]
    assert wgmma is backend.has_wgmma(compiled["cuda_archs"].split(";"), compiled["nvcc"])
    names = native.linear_24_kernels()
    assert any(name.startswith("wgmma_") for name in names) is wgmma
    # The default for many tokens, on their own architecture and from its metadata.
    for arch, order, runs in ((90, 90, wgmma), (90, 80, False), (100, 90, False)):
        for dtype in ("bfloat16", "float16"):
            kernel, _, _ = native.linear_24_choose(arch, 132, 4096, 4096, 4096, dtype, order)
            assert names[kernel].startswith("wgmma_") is runs
    if wgmma:  # a table that is added again counts once
        native.add_linear_24_kernels(import_module("wanda_ext._C_sm90a").linear_24_kernels())
        assert native.linear_24_kernels() == names


def test_nothing_to_advise() -> None:
    assert advice(CPU_BUILD, None) == []
    assert advice(CPU_BUILD, "13.0") == []
    assert advice(CUDA_BUILD, "13.0", "9.0", "8.6") == []


def test_advice_names_what_to_do() -> None:
    assert "WANDA_EXT_CUDA=pypi" in advice(CPU_BUILD, "13.0", "9.0")[0]
    assert "install torch with CUDA" in advice(CUDA_BUILD, None)[0]
    assert "nvidia-smi" in advice(CUDA_BUILD, "13.0")[0]
    (old,) = advice(CUDA_BUILD, "13.0", "9.0", "7.5")
    assert "WANDA_EXT_CUDA_ARCHS=75 " in old
    without = CUDA_BUILD | {"wgmma": False}
    (slower,) = advice(without, "13.0", "8.0", "9.0")
    assert "(wgmma)" in slower
    assert "WANDA_EXT_CUDA_ARCHS=90 " in slower


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80", "8.0", True),
        ("80", "8.9", True),
        ("86", "8.0", False),
        ("80", "9.0", False),
        ("80+PTX", "9.0", True),
        ("90+PTX", "8.9", False),
        ("80;90a", "9.0", True),
        ("90a+PTX", "10.0", False),
        ("100", "10.3", True),
        ("80;120+PTX", "12.1", True),
    ],
)
def test_runs_on(archs: str, capability: str, runs: bool) -> None:
    assert info.runs_on(archs, capability) is runs


def run_info(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wanda_ext.info"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_prints_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "wanda_ext").symlink_to(Path(wanda_ext.__file__).parent)
    done = run_info(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"wanda_ext {wanda_ext.__version__}" in done.stdout
    assert f"torch     {torch.__version__}" in done.stdout
    assert done.stderr == ""


def test_works_without_the_compiled_part(tmp_path: Path) -> None:
    sources = Path(wanda_ext.__file__).parent
    shutil.copytree(sources, tmp_path / "wanda_ext", ignore=shutil.ignore_patterns("*.so", "_*_"))
    (tmp_path / "wanda_ext" / "_C.py").write_text("raise ImportError('libmissing.so.1')")
    done = run_info(tmp_path)
    assert done.returncode == 1
    assert "nothing that loads" in done.stdout
    assert "does not load (libmissing.so.1)" in done.stdout
    assert "pip install ." in done.stdout
    assert "Traceback" not in done.stderr
